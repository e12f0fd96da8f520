"""Parameters, continuous latents and subsamples get their values, in a vectorised loop those of all steps at once."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pyro.poutine.runtime import _PYRO_PARAM_STORE
from torch import Tensor
from torch.distributions import constraints, transform_to

from symhmm.capture.inputs import Inputs, initial_latent, initial_param
from symhmm.capture.records import Result
from symhmm.capture.time_index import NotVectorisable
from symhmm.capture.tracking import Position, Tracker
from symhmm.errors import ProgramError
from symhmm.graph import Latent, Param


class Giver:
    """Gives values to the messages of one run, and records what it gave.

    Args:
        position: where the program is.
        tracker: what is known of the tensors; a given value stands on its own.
        inputs: the values.
        result: parameters, latents and subsamples are recorded here.
    """

    def __init__(self, position: Position, tracker: Tracker, inputs: Inputs, result: Result) -> None:
        self.position, self.tracker, self.inputs, self.result = position, tracker, inputs, result

    def param(self, msg: dict[str, Any]) -> None:
        """Give a parameter its value; a network's parameter is replaced wherever it is used."""
        name, init = msg["name"], (msg["args"][1] if len(msg["args"]) > 1 else None)
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if init is None and name in _PYRO_PARAM_STORE:
            # Only a PyroModule can have put it there: the store is empty while the program runs.
            constraint = _PYRO_PARAM_STORE._constraints[name]
            free = _PYRO_PARAM_STORE._params[name]

            def init() -> Tensor:
                return transform_to(constraint)(free)

        def default() -> Tensor:
            if init is None:
                raise ProgramError(
                    f"parameter {name!r} has no initial value.", suggestion=f"pyro.param({name!r}, tensor)"
                )
            value = init() if callable(init) and not isinstance(init, Tensor) else init
            return value if isinstance(value, torch.nn.Parameter) else initial_param(name, value, constraint)

        value = self._by_step(name, default, lambda n, v: None)
        event_dim = msg["kwargs"].get("event_dim")
        for concrete, own in self._concrete(name):
            self.result.params[concrete] = Param(own, constraint, event_dim)
        if isinstance(init, torch.nn.Parameter) and value is not init:
            # Networks use their parameters directly, whatever pyro.param returns.
            self.tracker.instead[id(init)] = (init, value)
        if any(f.full_size not in (None, f.size) for f in msg["cond_indep_stack"]):
            value = value.view_as(value)
            value._pyro_unconstrained_param = torch.empty(0)  # type: ignore[attr-defined]  # a plate notes its subsample
        msg["value"], msg["done"] = value, True

    def subsample(self, msg: dict[str, Any]) -> None:
        """Fix the members of a plate that are used."""
        fn, name = msg["fn"], msg["name"]
        given = msg["value"]
        if name in self.inputs.subsamples:
            msg["value"] = self.inputs.subsamples[name]
        elif given is not None:
            self.result.subsamples[name] = torch.as_tensor(given)
            return
        elif fn.subsample_size is None or fn.subsample_size >= fn.size:
            return
        else:
            msg["value"] = self.inputs.subsample(name, fn)
        self.result.subsamples[name] = msg["value"]

    def latent(self, msg: dict[str, Any], nesting: int) -> None:
        """Give a continuous latent its value, for the members of subsampled plates that are used."""
        fn, name = msg["fn"], msg["name"]
        stack = [f for f in msg["cond_indep_stack"] if f.vectorized]
        batch = fn.batch_shape[max(0, len(fn.batch_shape) - nesting) :]
        part = [f for f in stack if f.full_size not in (None, f.size)]
        plates = {f.name: f.dim for f in reversed(stack)}
        if any(
            isinstance(v, Tensor) and level.holds(v)
            for v in vars(fn.support).values()
            for level in self.position.levels
        ):
            raise NotVectorisable(f"the support of continuous latent {name!r} depends on the loop variable")

        def default() -> Tensor:
            value = self._initial(fn, batch + fn.event_shape)
            for f in part:
                value = _spread(value, f.dim - fn.event_dim, f.full_size, self._indices(f.name))
            return value

        def record(concrete: str, value: Tensor) -> None:
            self.result.latents[concrete] = Latent(value, fn.support, fn.event_dim, plates)

        value = self._by_step(name, default, record)
        for f in part:
            dim = f.dim - fn.event_dim
            if value.dim() >= -dim and value.shape[dim] == f.full_size != f.size:
                value = value.index_select(dim, self._indices(f.name))
        msg["value"], msg["done"] = value, True

    def _initial(self, fn: Any, shape: torch.Size) -> Tensor:
        """Initial value of a latent; one per step where the loop's level is open, even if they are equal."""
        if not self.position.levels:
            return initial_latent(fn, shape)
        level = self.position.levels[-1]
        rows = [initial_latent(_at(fn, level, k), shape) for k in range(level.length)]
        return level.batch(torch.stack(rows))

    def _indices(self, plate: str) -> Tensor:
        return self.result.subsamples[plate]

    def _concrete(self, name: str) -> list[tuple[str, Tensor]]:
        """The values recorded for ``name`` at each step."""
        names = self.step_names(name)
        return [(n, self.inputs.values[n]) for n in names if n in self.inputs.values]

    def step_names(self, name: str) -> list[str]:
        """The site names that ``name`` stands for, one per step of the innermost vectorised loop."""
        tokens = self.result.names.of(name)
        if not tokens:
            return [name]
        level = self.position.levels[-1]
        if {t.loop for t in tokens} != {level.loop}:
            raise NotVectorisable(f"the name of {name!r} depends on several loops")
        return [self.result.names.resolve(name, {level.loop: k}) for k in range(level.length)]

    def _by_step(self, name: str, default: Callable[[], Tensor], record: Callable[[str, Tensor], None]) -> Tensor:
        """The value of a parameter or latent; in a vectorised loop those of all its steps at once."""
        self.tracker.quiet = True
        try:
            names = self.step_names(name)
            if names == [name]:
                value = self.inputs.get(name, lambda: self.tracker.forget(default()))
                record(name, value)
                return value
            level = self.position.levels[-1]
            if any(n not in self.inputs.values for n in names[: level.lag]):
                raise NotVectorisable(f"site {name!r} does not exist at the first steps", level.history)
            if any(n not in self.inputs.values for n in names):
                for n, row in zip(names, level.unbatch(default()).unbind(), strict=True):
                    self.inputs.get(n, partial(self._copy, row))
            for n in names:
                record(n, self.inputs.values[n])
            return level.batch(torch.stack([self.inputs.values[n] for n in names]))
        finally:
            self.tracker.quiet = False

    def _copy(self, row: Tensor) -> Tensor:
        return self.tracker.forget(row.clone())


def _at(fn: Any, level: Any, k: int) -> Any:
    """The distribution as it is at step ``k`` of a vectorised loop."""
    if not any(isinstance(v, Tensor) and level.holds(v) for v in vars(fn).values()) and not hasattr(fn, "base_dist"):
        return fn
    copy = object.__new__(type(fn))
    for key, v in vars(fn).items():
        if isinstance(v, Tensor) and level.holds(v):
            v = level.unbatch(v)[k]
        elif isinstance(v, torch.distributions.Distribution):
            v = _at(v, level, k)
        copy.__dict__[key] = v
    return copy


def _spread(value: Tensor, dim: int, size: int, index: Tensor) -> Tensor:
    """A value for all members of a plate from one for a subsample: the others start like the first of them."""
    if value.dim() < -dim or value.shape[dim] == 1:
        return value
    shape = list(value.shape)
    shape[dim] = size
    return value.narrow(dim, 0, 1).expand(shape).index_copy(dim, index, value)
