"""State of a variational fit: what it was asked for, where it is, and both as plain arrays and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import FitError
from symhmm.infer.amortised import Amortised, amortised
from symhmm.infer.arrows import following
from symhmm.infer.guide import blocks_by_role, guide
from symhmm.infer.minibatch import Minibatches, minibatches
from symhmm.infer.objective import AnyGuide, Gradient
from symhmm.infer.points import points
from symhmm.infer.pyro_guide import PyroGuide, pyro_guide
from symhmm.infer.target import Target
from symhmm.tables.results import Optima

WARM = "warm starts: joint density with the random effects held equal"
SHARPER = 4  # draws per step while the rate falls, at least
MOVED = ("phi", "first", "second", "count", "mean")  # tensors that steps change
NUMBERS = ("cooling", "norm", "averaged", "evaluations")  # and numbers

Schedule = str | Callable[[int], float]


@dataclass(frozen=True)
class Options:
    """What `run` was asked for; see there."""

    guide: Any = "full"
    objective: str = "elbo"
    seed: int = 0
    restarts: int = 4
    steps: int = 3000
    cooldown: int = 300
    lr: float = 0.05
    schedule: Schedule = "plateau"
    clip: float = 10.0
    particles: int | None = None
    evaluate: int = 500

    @property
    def draws(self) -> tuple[int, int]:
        """Draws per step while the rate is level, and while it falls."""
        if self.objective == "iwelbo":
            return self.particles or 8, self.particles or 8
        return self.particles or 1, max(self.particles or SHARPER, SHARPER)

    @property
    def described(self) -> dict[str, Any]:
        """The options by name; functions by theirs."""
        own = {n: f"{v.__module__}.{v.__qualname__}" for n, v in vars(self).items() if hasattr(v, "__qualname__")}
        return {**vars(self), **own}


@dataclass
class State:
    """Where a run is. Mutable: `step` moves it in place, which saves copies of everything at each step.

    Args:
        unit: shape (size,), the scale on which each coordinate of the density is moved.
        phi: free numbers of the guide; ``first``, ``second`` and ``count`` are Adam's moments of each, and how often each
            has been moved, since those of a member move only when it is in the batch.
        gradients: captured objective by number of draws.
        owners: for each free number the position of its member in the subsampled plate, -1 if it moves at every step.
        cooling: the step at which the decay of the rate began, -1 before.
        norm: running mean of the gradient norm, for clipping.
        mean: of ``phi`` over the ``averaged`` last steps.
        trace: objective at each step, nats.
        moving: whether a step has changed some of this and not yet the rest.
    """

    goal: Target
    guide: AnyGuide
    unit: Tensor
    batches: Minibatches | None
    owners: Tensor
    generator: torch.Generator
    optima: Optima
    evaluations: int
    phi: Tensor
    first: Tensor
    second: Tensor
    count: Tensor
    mean: Tensor
    cooling: int = -1
    norm: float = 0.0
    averaged: int = 0
    trace: list[float] = field(default_factory=list)
    gradients: dict[int, Gradient] = field(default_factory=dict)
    moving: bool = False

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.trace)

    @property
    def result(self) -> Tensor:
        """The guide's numbers: the mean of the last steps, where it has begun."""
        return self.mean if self.averaged else self.phi


def build(goal: Target, options: Options, unit: Tensor) -> AnyGuide:
    """The guide that was asked for, at the start of ``goal``, with steps of ``unit``, shape (size,)."""
    wanted, index = options.guide, parameters(goal)
    limits = None if goal.restriction is None else goal.restriction.among(torch.isin(goal.free, index).nonzero()[:, 0])
    moved = points(goal.start, index, unit, limits)
    if isinstance(wanted, Amortised):
        return amortised(wanted, goal.start, moved, blocks_by_role(goal.entries, goal.density.graph), unit)
    if callable(wanted):
        return pyro_guide(wanted, goal, moved, options.seed)
    blocks = blocks_by_role(goal.entries, goal.density.graph, wanted)
    blocks, unit = following(goal, blocks, unit, minibatches(goal.density))
    return guide(goal.start, moved, blocks, unit)


def parameters(goal: Target) -> Tensor:
    """Positions of the parameters that are not fixed; the guide moves them as points."""
    where = [i for e in goal.entries if e.is_param for i in range(e.start, e.stop)]
    return torch.tensor(where, dtype=torch.long)


def assemble(goal: Target, options: Options, unit: Tensor, optima: Optima, evaluations: int) -> State:
    """A run before its first step."""
    made, batches = build(goal, options, unit), minibatches(goal.density)
    phi = made.initial()
    owners = torch.full(phi.shape, -1)
    if batches is not None:
        if isinstance(made, PyroGuide):
            raise FitError(
                f"a Pyro guide cannot follow the minibatches of {batches.plate!r}.",
                suggestion="guide='full', or the whole plate without subsample_size",
            )
        owners = batches.owners(made)
    generator = torch.Generator().manual_seed(options.seed)
    first, second, count, mean = torch.zeros(4, phi.numel(), dtype=phi.dtype).unbind()
    return State(goal, made, unit, batches, owners, generator, optima, evaluations, phi, first, second, count, mean)


def saved(state: State) -> dict[str, Any]:
    """A run as plain arrays."""
    return {
        "start": state.goal.start.numpy(),
        "unit": state.unit.numpy(),
        "generator": state.generator.get_state().numpy(),
        "trace": np.array(state.trace),
        "optima": np.array([state.optima.objectives, state.optima.converged], dtype=float),
        **{name: np.array(getattr(state, name)) for name in NUMBERS},
        **{name: getattr(state, name).numpy() for name in MOVED},
    }


def restored(goal: Target, options: Options, arrays: Mapping[str, Any]) -> State:
    """The run that `saved` made arrays of."""
    goal = goal.at(torch.from_numpy(arrays["start"]))
    objectives, converged = arrays["optima"].tolist()
    optima = Optima(tuple(objectives), tuple(map(bool, converged)), of=WARM)
    state = assemble(goal, options, torch.from_numpy(arrays["unit"]), optima, 0)
    for name in MOVED:
        setattr(state, name, torch.from_numpy(arrays[name]))
    for name in NUMBERS:
        setattr(state, name, arrays[name].item())
    state.generator.set_state(torch.from_numpy(arrays["generator"]))
    state.trace = arrays["trace"].tolist()
    return state
