"""Values of parameters, continuous latents and subsamples: those given by the caller, else the program's own."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to

from symhmm.errors import ValuesError
from symhmm.recorder import tracing, untraced


class Inputs:
    """Values by site name, shared by all runs of one capture so that random starts and subsamples are drawn once.

    Args:
        values: constrained values of parameters and continuous latents; what is missing gets an initial value.
        subsamples: indices of the members of each subsampled plate.
    """

    def __init__(self, values: Mapping[str, Tensor] | None, subsamples: Mapping[str, Tensor] | None) -> None:
        self.values = dict(values or {})
        self.subsamples = {name: torch.as_tensor(index) for name, index in (subsamples or {}).items()}
        self._outer_state = torch.get_rng_state()
        self._start = self._outer_state

    def restart(self) -> None:
        """Every run of the program draws the same random numbers."""
        torch.set_rng_state(self._start)

    def finish(self) -> None:
        """Leave torch's generator as it was, but for the subsamples that were drawn."""
        torch.set_rng_state(self._outer_state)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Random numbers drawn here count as used: a second capture draws other subsamples."""
        inner = torch.get_rng_state()
        torch.set_rng_state(self._outer_state)
        try:
            yield
        finally:
            self._outer_state = torch.get_rng_state()
            torch.set_rng_state(inner)

    def get(self, name: str, default: Callable[[], Tensor]) -> Tensor:
        """The value of site ``name``; its initial value is computed at the first use."""
        if name not in self.values:
            self.values[name] = default()
        return self.values[name]

    def subsample(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """Indices of the members of plate ``name`` that are used."""
        if name not in self.subsamples:
            with self.drawing():
                self.subsamples[name] = draw()
        return self.subsamples[name]


def initial_param(name: str, value: Tensor, constraint: constraints.Constraint) -> Tensor:
    """The initial value of a parameter, brought into its support as Pyro does (rows of a simplex are normalised).

    Raises:
        ValuesError: there is no such point, as for a negative value of a positive parameter.
    """
    with torch.no_grad(), untraced():
        value = value.detach().clone()
        if bool(constraint.check(value).all()):
            return value
        transform = transform_to(constraint)
        inside = transform(transform.inv(value))
        if not bool(constraint.check(inside).all()):
            raise ValuesError(
                f"the initial value of parameter {name!r} lies outside its constraint {constraint}.",
                details=[f"seen {value}"],
                suggestion="an initial value inside",
            )
        return inside


def initial_latent(fn: Any, shape: torch.Size) -> Tensor:
    """A place to start for a continuous latent: the prior mean if it is usable, else the image of unconstrained zero.

    Args:
        fn: the prior; its batch may have further dimensions on the left, over which the mean is averaged.
        shape: batch and event shape of the value.

    Raises:
        ValuesError: while tracing, when a value must be given.
    """
    if tracing():
        raise ValuesError("a continuous latent has no value while the program is traced.", suggestion="pass values=")
    with torch.no_grad(), untraced():
        mean = _mean(fn)
        if mean is not None:
            extra = mean.dim() - len(shape)
            if extra > 0:
                mean = mean.mean(tuple(range(extra)))
            mean = mean.expand(shape)
            if bool(mean.isfinite().all()) and bool(torch.as_tensor(fn.support.check(mean)).all()):
                return mean.clone()
        return feasible_point(fn.support, shape, _dtype(fn)).expand(shape).clone()


def _mean(fn: Any) -> Tensor | None:
    try:
        return fn.mean
    except NotImplementedError:  # what torch's distributions say that have none, or none that is known
        return None


def _dtype(fn: Any) -> torch.dtype:
    parameters = (getattr(fn, name, None) for name in getattr(fn, "arg_constraints", ()))
    floating = (p.dtype for p in parameters if isinstance(p, Tensor) and p.is_floating_point())
    return next(floating, torch.get_default_dtype())


def feasible_point(support: Any, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A point inside ``support`` that depends on no data: what masked observations are replaced by.

    Args:
        support: constraint of a distribution.
        shape: shape of the value, which gives the size of its events.
        dtype: of the value.

    >>> feasible_point(constraints.positive, (2,), torch.float32)
    tensor(1.)
    """
    base = support
    while isinstance(base, constraints.independent):
        base = base.base_constraint
    lowest = getattr(base, "lower_bound", None)
    if base is constraints.one_hot:
        return torch.nn.functional.one_hot(torch.tensor(0), shape[-1]).to(dtype)
    if base.is_discrete:
        return torch.zeros((), dtype=dtype) if lowest is None else torch.as_tensor(lowest).detach().to(dtype)
    try:
        transform = biject_to(base)
    except NotImplementedError:
        return torch.zeros((), dtype=dtype)  # a support without a bijection: circular and the like
    event = tuple(shape[len(shape) - base.event_dim :])
    return transform(torch.zeros(transform.inverse_shape(event), dtype=dtype)).detach()
