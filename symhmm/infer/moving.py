"""Moving: the log-density in the coordinates in which a sampler moves, captured once, with its gradient."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from symhmm.compiler.layout import Entry
from symhmm.compiler.step import Step, trace
from symhmm.errors import FitError
from symhmm.infer.noncentred import Coordinates
from symhmm.infer.target import Array, Target, value_and_gradient

Replay = Callable[..., tuple[Tensor, Tensor]]


class Moving:
    """Log-density of the sampler's coordinates and its gradient, nats; counts its own calls."""

    def __init__(self, goal: Target, coordinates: Coordinates, native: bool) -> None:
        self.goal, self.calls = goal, 0
        self.constants = coordinates.centred, coordinates.signed
        self.replay = _replay(goal, coordinates, native)

    def move(self, coordinates: Coordinates) -> None:
        """Go on in other coordinates of the same sites; nothing is captured anew."""
        self.constants = coordinates.centred, coordinates.signed

    def __call__(self, x: Array) -> tuple[float, Array]:
        self.calls += 1
        with torch.no_grad():
            value, gradient = self.replay(
                self.goal.embed(torch.from_numpy(x).to(self.goal.start.dtype)), *self.constants
            )
        return value.item(), gradient[self.goal.free].double().numpy()


def _replay(goal: Target, coordinates: Coordinates, native: bool) -> Replay:
    """Value and gradient as a function of the vector, its centredness and its signs."""
    density, names = goal.density, coordinates.names

    def gradient(vector: Tensor, centred: Tensor, signed: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
        # With its data as inputs, so that one capture serves all data of a shape.
        own = replace(goal, density=replace(density, data=data, _constants={})) if data else goal
        return value_and_gradient(lambda w: log_density(Coordinates(own, names, centred, signed), w), vector)

    compiled = density.compiled
    if compiled.mode == "eager":
        return gradient
    data = density.data if compiled.mode == "captured" else ()

    def make() -> tuple[Step, Replay]:
        step = trace(gradient, (goal.start, coordinates.centred, coordinates.signed), data, gradients=True)
        return step, torch.compile(step.body, fullgraph=True, dynamic=False) if native else step.body

    # What is held at given values is written into the capture, which then serves this fit alone.
    step, body = make() if goal.fixed else compiled.once(("nuts", names, native), make)
    fixed = step.constants(data)
    return lambda *inputs: body(*inputs, *fixed)


def log_density(at: Coordinates, w: Tensor) -> Tensor:
    """Log-density of the sampler's coordinates, nats, shape (): latents with their priors, parameters with flat ones."""
    vector, volume = at.forward(w)
    goal = at.goal
    return goal.density.log_prob(goal.values(vector)) + natural_volume(goal, vector) + volume


def natural_volume(goal: Target, vector: Tensor) -> Tensor:
    """Log volume change from the unconstrained vector to natural values, parameters included, nats, shape ()."""
    total = goal.log_abs_det_jacobian(vector)
    for e in goal.entries:
        if e.is_param:
            total = total + _volume(e, vector)
    return total


def require_volumes(goal: Target) -> None:
    """Raise a `FitError` for values whose flat prior on the natural scale has no formula on the unconstrained one."""
    for e in goal.entries:
        try:
            _volume(e, goal.start)
        except NotImplementedError as error:
            raise FitError(
                f"{e.name!r} cannot be sampled: its support {e.constraint} has no volume element.",
                suggestion=f"fix={{{e.name!r}: ...}}, or another parameterisation",
            ) from error


def _volume(e: Entry, vector: Tensor) -> Tensor:
    free = vector[e.start : e.stop].reshape(e.free_shape)
    out: Tensor = e.transform.log_abs_det_jacobian(free, e.transform(free)).sum()
    return out
