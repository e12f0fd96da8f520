"""Moving: the log-density in the coordinates in which a sampler moves, captured once, with its gradient."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from symhmm.compiler.layout import Entry
from symhmm.compiler.step import Step, trace
from symhmm.compiler.taped import quick
from symhmm.errors import FitError
from symhmm.infer.noncentred import Coordinates
from symhmm.infer.target import Array, Target, value_and_gradient

Replay = Callable[[Tensor], tuple[Tensor, Tensor]]


class Moving:
    """Log-density of the free coordinates of the sampler and its gradient, nats; counts its own calls."""

    def __init__(self, goal: Target, coordinates: Coordinates, native: bool) -> None:
        self.goal, self.calls = goal, 0
        self._replay_in = _captured(goal, coordinates, native)
        self.move(coordinates)

    def move(self, coordinates: Coordinates) -> None:
        """Go on in other coordinates of the same sites; nothing is captured anew."""
        self._replay = self._replay_in(coordinates)

    def __call__(self, x: Array) -> tuple[float, Array]:
        self.calls += 1
        with torch.no_grad():
            value, gradient = self._replay(torch.from_numpy(x))
        return value.item(), gradient.numpy()


def _captured(goal: Target, coordinates: Coordinates, native: bool) -> Callable[[Coordinates], Replay]:
    """Value and gradient as a function of the free coordinates, in any coordinates of the same sites."""
    density, several = goal.density, len(coordinates.constants)

    def gradient(x: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        constants, data = inputs[:several], inputs[several:]
        # With its data as inputs, so that one capture serves all data of a shape.
        own = replace(goal, density=replace(density, data=data, _constants={})) if data else goal
        return value_and_gradient(lambda x: log_density(replace(coordinates, goal=own).given(*constants), x), x)

    compiled = density.compiled
    if compiled.mode == "eager":
        return lambda at: lambda x: gradient(x, *at.constants)
    data = density.data if compiled.mode == "captured" else ()

    def make() -> tuple[Step, Callable[..., tuple[Tensor, Tensor]] | None]:
        step = trace(gradient, [goal.coordinates(goal.start)], (*coordinates.constants, *data), gradients=True)
        return (step, step.native()) if native else (quick(step, 1), None)

    # What is held at given values, tied or ordered is written into the capture, which then serves this fit alone.
    own = bool(goal.fixed) or goal.restriction is not None
    step, body = make() if own else compiled.once(("nuts", coordinates.names, native), make)

    def replay_in(at: Coordinates) -> Replay:
        constants = step.constants((*at.constants, *data))
        if body is not None:
            return lambda x: body(x, *constants)
        return lambda x: step.numbers((x,), constants)

    return replay_in


def log_density(at: Coordinates, x: Tensor) -> Tensor:
    """Log-density of the free coordinates of the sampler, nats, shape (): latents with their priors, parameters flat."""
    vector, volume = natural(at, x)
    return at.goal.density.log_prob(at.goal.values(vector)) + volume


def natural(at: Coordinates, x: Tensor) -> tuple[Tensor, Tensor]:
    """The density's own vector, shape (size,), and the log volume change from ``x`` to natural values, nats, shape ()."""
    goal = at.goal
    vector, volume = at.forward(goal.embed(x))
    volume = volume + goal.log_abs_det_jacobian(vector) + _of_parameters(goal, vector)
    if goal.restriction is not None:
        volume = volume + goal.restriction.log_abs_det_jacobian(x)
    return vector, volume


def _of_parameters(goal: Target, vector: Tensor) -> Tensor:
    """Log volume change of the parameters, nats, shape (); of values that are tied it counts once."""
    total = vector.new_zeros(())
    counted = torch.zeros(vector.shape, dtype=torch.bool).index_fill(0, goal.moved, True)
    for e in goal.entries:
        if e.is_param:
            change, mine = _volume(e, vector), counted[e.start : e.stop].reshape(e.free_shape)
            for _ in range(mine.dim() - change.dim()):  # events are tied as a whole
                mine = mine[..., 0]
            total = total + (change if bool(mine.all()) else torch.where(mine, change, 0.0)).sum()
    return total


def require_volumes(goal: Target) -> None:
    """Raise a `FitError` for values whose flat prior on the natural scale has no formula on the unconstrained one."""
    for e in goal.entries:
        try:
            _volume(e, goal.start)
        # The one thing that torch's transforms raise where they have no formula (maps onto fewer dimensions, programs'
        # own transforms without one); anything else is a fault to be seen.
        except NotImplementedError as error:
            raise FitError(
                f"{e.name!r} cannot be sampled: its support {e.constraint} has no volume element.",
                suggestion=f"fix={{{e.name!r}: ...}}, or another parameterisation",
            ) from error


def _volume(e: Entry, vector: Tensor) -> Tensor:
    """Log volume change of each event of an entry, nats."""
    free = vector[e.start : e.stop].reshape(e.free_shape)
    out: Tensor = e.transform.log_abs_det_jacobian(free, e.transform(free))
    return out
