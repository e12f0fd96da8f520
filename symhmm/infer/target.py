"""Target: the part of a density that a driver may move, as a function of one plain vector."""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry
from symhmm.compiler.step import Constants, Step, trace
from symhmm.compiler.taped import quick
from symhmm.errors import FitError, ValuesError
from symhmm.infer.restrict import Order, Restriction, Tie, restriction

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Target:
    """A density with some values fixed and some coordinates held.

    Args:
        density: what is evaluated.
        fixed: constrained values that replace the density's own, by name; they may lie on an edge that the support includes.
        start: shape (size,), unconstrained starting point of the whole vector.
        free: shape (m,), positions in the vector that may move; all others keep their starting value.
        restriction: what is tied or ordered among them. The driver moves n coordinates: those of the restriction, or the
            free ones themselves.
    """

    density: Density
    fixed: Mapping[str, Tensor]
    start: Tensor
    free: Tensor
    restriction: Restriction | None = None
    _steps: dict[str, tuple[Step, Constants]] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        """Number n of coordinates that the driver moves."""
        return self.free.numel() if self.restriction is None else self.restriction.first.numel()

    @property
    def moved(self) -> Tensor:
        """Shape (n,), the position in the vector of each coordinate that the driver moves; the first of those tied."""
        return self.free if self.restriction is None else self.free[self.restriction.first]

    @property
    def counts(self) -> dict[str, int]:
        """Number of free values by name; what is tied counts once, for the first of its names."""
        moved = self.moved
        return {e.name: int(((moved >= e.start) & (moved < e.stop)).sum()) for e in self.entries}

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Entries of the layout that are not fixed."""
        return tuple(e for e in self.density.layout.entries if e.name not in self.fixed)

    @property
    def key(self) -> tuple[Hashable, ...]:
        """What the values are a function of, the numbers of ``fixed`` and ``start`` apart."""
        r = self.restriction
        tied = None if r is None else (tuple(r.source.tolist()), *(tuple(c.tolist()) for c in r.chains))
        return tuple(self.fixed), tuple(self.free.tolist()), tied

    @property
    def x(self) -> Array:
        """The driver's coordinates of the start, shape (n,)."""
        return self.coordinates(self.start).double().numpy().copy()

    def coordinates(self, vector: Tensor) -> Tensor:
        """The driver's coordinates, shape (n,), of a whole vector."""
        return vector[self.free] if self.restriction is None else self.restriction.inverse(vector[self.free])

    def embed(self, x: Tensor) -> Tensor:
        """The whole vector, shape (size,), at the driver's coordinates ``x`` of shape (n,); differentiable."""
        if self.restriction is not None:
            x = self.restriction(x)
        if self.free.numel() == self.start.numel():
            return x
        return self.start.index_put((self.free,), x)

    def values(self, vector: Tensor) -> dict[str, Tensor]:
        """Constrained values of a whole vector, fixed ones bit-equal to what was given; differentiable."""
        return {**self.density.unpack(vector), **self.fixed}

    def log_abs_det_jacobian(self, vector: Tensor) -> Tensor:
        """Log volume change of the continuous latents that are not fixed, nats, shape ()."""
        return self._volume(vector).sum()

    def member_jacobian(self, vector: Tensor, index: Tensor) -> Tensor:
        """The same for each member of a block whose coordinates are ``index`` of shape (M, D); shape (M,)."""
        return self._volume(vector)[index].sum(-1)

    def _volume(self, vector: Tensor) -> Tensor:
        """Log volume change, shape (size,); that of a multivariate latent stands at its first coordinates."""
        pieces = []
        for e in self.density.layout.entries:
            free = vector[e.start : e.stop].reshape(e.free_shape)
            zero = torch.zeros_like(free)
            if not e.is_param and e.name not in self.fixed:
                change = e.transform.log_abs_det_jacobian(free, e.transform(free))
                missing = free.dim() - change.dim()
                if missing:
                    shape = e.free_shape[-missing:]
                    first = (torch.arange(prod(shape)) == 0).to(free.dtype).reshape(shape)
                    change = change.reshape(*change.shape, *[1] * missing) * first
                zero = zero + change
            pieces.append(zero.reshape(-1))
        return torch.cat(pieces)

    def evaluate(self, x: Array) -> tuple[float, Array]:
        """Log-density (nats) and its gradient over the driver's coordinates, in float64."""
        u = torch.from_numpy(x).to(self.start.dtype)
        vector = self.embed(u)
        if self.fixed:
            value, gradient = self._with_fixed(vector)
        else:
            value, gradient = self.density.value_and_grad(vector)
        return value.item(), self.pulled_back(u, gradient).double().numpy()

    def pulled_back(self, x: Tensor, gradient: Tensor) -> Tensor:
        """A gradient over the whole vector as one over the driver's coordinates, shape (n,), where they are ``x``."""
        free = gradient if self.free.numel() == self.start.numel() else gradient[self.free]
        if self.restriction is None:
            return free
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            (out,) = torch.autograd.grad(self.restriction(leaf), leaf, free)
        return out

    def holding(self, names: set[str]) -> "Target":
        """The same target with the coordinates of ``names`` held at their start; restrictions are kept among the others."""
        held = {i for e in self.density.layout.entries if e.name in names for i in range(e.start, e.stop)}
        keep = torch.tensor([k for k, i in enumerate(self.free.tolist()) if i not in held], dtype=torch.long)
        left = None if self.restriction is None else self.restriction.among(keep)
        return Target(self.density, self.fixed, self.start, self.free[keep], left, self._steps)

    def at(self, vector: Tensor) -> "Target":
        """The same target with another starting point."""
        return replace(self, start=vector)

    def captured(self, key: str, f: Any, example: tuple[Tensor, ...]) -> Any:
        """``f``, which contains its own gradient, captured once; as it is where the program must run each time.

        What it returns is cut off from derivatives.
        """
        if self.density.compiled.mode == "eager":
            return f
        if key not in self._steps:
            step = quick(trace(f, example, (), gradients=True), len(example))
            self._steps[key] = step, step.constants(())
        step, constants = self._steps[key]
        return lambda *values: step.numbers(values, constants)

    def _with_fixed(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        def gradient(v: Tensor) -> tuple[Tensor, Tensor]:
            return value_and_gradient(lambda u: self.density.log_prob(self.values(u)), v)

        with torch.no_grad():
            out: tuple[Tensor, Tensor] = self.captured("fixed", gradient, (vector,))(vector)
        return out


def target(
    density: Density,
    fix: Mapping[str, Any],
    method: str,
    start: Mapping[str, Any] | None = None,
    *,
    tie: Tie | None = None,
    order: Order | None = None,
) -> Target:
    """The free part of ``density`` once the values in ``fix`` are held; ``start`` replaces the program's own start.

    ``tie`` and ``order`` are those of `symhmm.infer.restrict.restriction`.

    Raises:
        FitError: nothing is left to fit, or a name, shape or value in ``fix``, ``tie``, ``order`` or ``start`` is wrong.
    """
    initial = density.initial()
    try:
        checked = density.layout.check({**initial, **fix})
    except ValuesError as error:
        raise FitError(f"fix= cannot be used. {error}") from error
    try:
        vector = density.pack({**initial, **(start or {})}).detach()
    except ValuesError as error:
        raise FitError(f"the starting values cannot be used. {error}") from error
    fixed = {n: checked[n].detach().clone() for n in fix}
    for n, v in fixed.items():
        if not bool(torch.isfinite(v).all()):
            raise FitError(f"the value given to fix {n!r} is not finite.", details=[f"seen {v}"])
        if not bool(density.layout[n].constraint.check(v).all()):
            raise FitError(
                f"the value given to fix {n!r} lies outside of its support.",
                details=[f"seen {v.tolist()}, support {density.layout[n].constraint}"],
                suggestion="a small value such as 1e-4 in place of a scale of zero",
            )
    free = [i for e in density.layout.entries if e.name not in fixed for i in range(e.start, e.stop)]
    if not free:
        held = f"fixed: {', '.join(fixed)}" if fixed else "the program has no pyro.param and no continuous latent"
        raise FitError(
            f"there are no free values for method={method!r} to fit.",
            details=[held],
            suggestion="density.log_prob(density.initial()) evaluates it as it is",
        )
    positions = torch.tensor(free, dtype=torch.long)
    entries = [e for e in density.layout.entries if e.name not in fixed]
    return Target(density, fixed, vector, positions, restriction(entries, positions, tie, order))


def value_and_gradient(f: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a scalar function and its gradient, detached; zero where the value does not depend on ``x``."""
    with torch.enable_grad():
        free = x.detach().requires_grad_()
        value = f(free)
        if not value.requires_grad:
            return value.detach(), torch.zeros_like(free)
        (gradient,) = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)
    return value.detach(), gradient
