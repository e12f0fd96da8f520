"""Marginal maximum likelihood: the Laplace density climbed, its effects' modes kept, its error measured or removed."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import log
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import FitError
from symhmm.infer.information import EDGE, support
from symhmm.infer.laplace import Laplace, laplace
from symhmm.infer.laplace_exact import Nodes, integral, integral_and_gradient, nodes
from symhmm.infer.laplace_modes import Modes
from symhmm.infer.lbfgs import Ascent, Evaluate
from symhmm.infer.metric import climb
from symhmm.infer.progress import Listener, Reporter
from symhmm.infer.restrict import Order, Tie
from symhmm.infer.target import Array, Target, target
from symhmm.infer.verdict import STOPPED_WARM, of_ascent
from symhmm.infer.warm import Interrupted, warm_start
from symhmm.tables.results import (
    LAPLACE,
    LAPLACE_POSTERIOR,
    LOG_LIKELIHOOD,
    LOG_POSTERIOR,
    Estimate,
    Normal,
    Optima,
    Posterior,
    Status,
)

WARM = "joint maxima with the random effects held alike, from the best of which the fit starts"
ROUNDS = 8  # times that nodes are moved to the modes at the new maximum
SMALL = 100 * EDGE  # values below which a spread may stand for zero
NOISE = 1e-7  # nats, what differences leave of the log-determinants
STILL = 1e-3  # nats that a round must gain for another one


@dataclass(frozen=True, eq=False)
class State:
    """A fit between two climbs: ``ascent`` is the last one, ``nodes`` what the next one integrates with, if anything."""

    goal: Target
    marginal: Laplace
    ascents: tuple[Ascent, ...]
    optima: Optima
    evaluations: int
    nodes: Nodes | None = None

    @property
    def x(self) -> Array:
        """Where the last climb ended, shape (n,)."""
        return self.ascents[-1].x if self.ascents else self.goal.x


def run(
    density: Density,
    *,
    over: str | Iterable[str] | None = None,
    correct: bool = False,
    fix: Mapping[str, Any] | None = None,
    tie: Tie | None = None,
    order: Order | None = None,
    start: Mapping[str, Any] | None = None,
    seed: int = 0,
    restarts: int = 4,
    draws: int = 2000,
    grid: int = 15,
    tolerance: float = 1e-5,
    max_evaluations: int = 2000,
    progress: bool | Listener | None = None,
) -> Estimate:
    """Maximise the likelihood with the random effects integrated out.

    The climb starts from the best of ``restarts`` maxima without random effects (see `symhmm.infer.warm`).

    Args:
        over: plate or names of the latents to integrate; all random effects by default.
        correct: maximise the integral itself, by adaptive Gauss-Hermite quadrature for one or two effects a member and by
            importance sampling for more, instead of Laplace's approximation of it.
        fix, tie, order: of the values that remain, as in `symhmm.infer.mle.run`.
        start: constrained values to start from, by name, instead of the program's own.
        seed: of the starts and of the draws.
        draws: of each member's effects, for importance sampling; ``grid`` nodes per effect, for quadrature.
        tolerance: nats that a further Newton step may still promise at convergence.
        max_evaluations: marginal gradients in one climb.
        progress: as in `symhmm.infer.mle.run`.

    Returns:
        The maximum; the conditional modes and covariances of the effects are its posterior. ``marginal`` is the integral
        without Laplace's approximation, at the same values, and its standard error (for quadrature, the difference that
        four nodes less would make). Ctrl-C returns the best point so far.

    Raises:
        FitError: nothing to fit or to integrate, a subsampled plate, float32, or a restriction of what is integrated.
    """
    began = time.perf_counter()
    marginal = laplace(density, over)
    goal = _goal(marginal, fix or {}, start, tie, order)
    state, stopped = None, False
    report = Reporter(progress, "laplace", max_evaluations)
    try:
        state = init(marginal, goal, start, seed=seed, restarts=restarts)
        state = step(state, report, tolerance=tolerance, max_evaluations=max_evaluations)
        before = -np.inf
        for _ in range(ROUNDS if correct else 0):
            if state.ascents[-1].interrupted or not np.isfinite(state.ascents[-1].value):
                break
            state = recentre(state, draws=draws, grid=grid, seed=seed)
            state = step(state, report, tolerance=tolerance, max_evaluations=max_evaluations)
            if state.ascents[-1].value - before < STILL:
                break
            before = state.ascents[-1].value
    except Interrupted as cut:
        state, stopped = _started(cut.goal, cut.ascents, cut.evaluations, goal, marginal), True
    except KeyboardInterrupt:
        stopped = True
        state = state or State(goal, marginal, (), Optima(), 0)
    finally:
        report.close()
    return _estimate(state, stopped, draws, grid, seed, max_evaluations, began)


def init(marginal: Laplace, goal: Target, start: Mapping[str, Any] | None, *, seed: int, restarts: int) -> State:
    """Maximise without random effects and start from there, or nearby where ``goal`` has restrictions."""
    whole = target(marginal.density, goal.fixed, "laplace", start)
    return _started(*warm_start(whole, seed=seed, restarts=restarts), goal, marginal)


def _started(warm: Target, ascents: list[Ascent], evaluations: int, goal: Target, marginal: Laplace) -> State:
    optima = Optima(tuple(a.value for a in ascents), tuple(a.converged for a in ascents), of=WARM)
    return State(goal.at(warm.start[_positions(marginal)]), marginal, (), optima, evaluations)


def step(state: State, report: Reporter, *, tolerance: float, max_evaluations: int) -> State:
    """Climb from where the last climb ended."""
    members, goal, best = state.marginal.members, state.goal, -np.inf
    done = 0

    def evaluate(x: Array) -> tuple[float, Array]:
        nonlocal done, best
        if state.nodes is None:
            value, gradient = goal.evaluate(x)
        else:
            value, gradient = _integrated(goal, members.flat, x, state)
        done, best = done + 1, max(best, value) if np.isfinite(value) else best
        report(done, best)
        return value, gradient

    ascent = climb(evaluate, state.x, tolerance=tolerance, max_evaluations=max_evaluations, noise=NOISE)
    if ascent.converged:
        try:
            ascent = _settled(goal, evaluate, ascent, tolerance)
        except KeyboardInterrupt:
            ascent = replace(ascent, interrupted=True)
    return replace(state, ascents=(*state.ascents, ascent), evaluations=state.evaluations + len(ascent.trace))


def recentre(state: State, *, draws: int, grid: int, seed: int) -> State:
    """Put the nodes of the integral around the modes at the last maximum."""
    modes, _ = _modes(state)
    return replace(state, nodes=nodes(modes, draws=draws, grid=grid, seed=seed))


def _settled(goal: Target, evaluate: Evaluate, ascent: Ascent, tolerance: float) -> Ascent:
    """The ascent with small spreads moved to where they count as zero, if this costs nothing.

    Towards a spread of zero the marginal becomes flat, so that a climb may end anywhere: before it, or so close to it that
    what lies between the effects is lost to rounding.
    """
    positive = {i for e in goal.entries if support(e.constraint) == "positive" for i in range(e.start, e.stop)}
    ordered = set() if goal.restriction is None else {int(k) for c in goal.restriction.chains for k in c}
    for k, position in enumerate(goal.moved.tolist()):
        if position in positive and k not in ordered and ascent.x[k] < log(SMALL):
            x = ascent.x.copy()
            x[k] = log(EDGE / 2)
            value, gradient = evaluate(x)
            if value >= ascent.value - tolerance and np.isfinite(gradient).all():
                ascent = replace(ascent, x=x, value=value, gradient=gradient, trace=[*ascent.trace, value])
    return ascent


def _goal(
    marginal: Laplace,
    fix: Mapping[str, Any],
    start: Mapping[str, Any] | None,
    tie: Tie | None = None,
    order: Order | None = None,
) -> Target:
    if gone := sorted(set(fix) & set(marginal.members.names)):
        raise FitError(
            f"{gone[0]!r} cannot be held and integrated.", suggestion=f"over= without {gone[0]!r}, or no fix= for it"
        )
    kept = {n: v for n, v in (start or {}).items() if n not in marginal.members.names}
    return target(marginal, fix, "laplace", kept, tie=tie, order=order)  # type: ignore[arg-type]


def _positions(marginal: Laplace) -> Tensor:
    """Positions in the whole vector of what remains."""
    kept = {e.name for e in marginal.layout.entries}
    where = [i for e in marginal.density.layout.entries if e.name in kept for i in range(e.start, e.stop)]
    return torch.tensor(where, dtype=torch.long)


def _integrated(goal: Target, flat: Any, x: Array, state: State) -> tuple[float, Array]:
    """The corrected marginal and its gradient over the free coordinates, nodes held still."""
    assert state.nodes is not None
    with torch.enable_grad():
        free = torch.from_numpy(x).requires_grad_()
        theta = flat(goal.values(goal.embed(free)))
    value, gradient = integral_and_gradient(state.marginal.members, theta.detach(), state.nodes)
    if not theta.requires_grad:
        return value.item(), np.zeros_like(x)
    (out,) = torch.autograd.grad(theta, free, gradient)
    return value.item(), out.numpy()


def _modes(state: State) -> tuple[Modes, Tensor]:
    """Modes and flat constrained values where the last climb ended."""
    goal = state.goal
    with torch.no_grad():
        theta = state.marginal.members.flat(goal.values(goal.embed(torch.from_numpy(state.x))))
        return state.marginal.modes_at(theta), theta


def _estimate(state: State, stopped: bool, draws: int, grid: int, seed: int, allowed: int, began: float) -> Estimate:
    goal, marginal = state.goal, state.marginal
    members, density = marginal.members, marginal.density
    best = state.ascents[-1] if state.ascents else Ascent(goal.x, -np.inf, np.zeros(goal.size))
    vector = goal.embed(torch.from_numpy(best.x))
    modes, theta = _modes(state)
    whole = density.pack(density.initial()).detach().index_put((_positions(marginal),), vector)
    whole[members.index] = modes.u
    kept = {n: v.detach() for n, v in goal.values(vector).items()}
    values = {e.name: {**kept, **members.effects(modes.u)}[e.name] for e in density.layout.entries}
    status = of_ascent(goal, best, vector, kept, allowed, stopped or best.interrupted)
    if stopped or best.interrupted:
        status = replace(status, try_=STOPPED_WARM.try_) if np.isfinite(best.value) else STOPPED_WARM
    prior = any(not e.is_param for e in marginal.layout.entries)
    exact, error, name = None, 0.0, LAPLACE_POSTERIOR if prior else LAPLACE
    if np.isfinite(best.value):
        status = _remark(status, modes)
        at = nodes(modes, draws=draws, grid=grid, seed=seed)
        value, error = integral(members, theta, at)
        if at.groups == 1:
            error = abs(value - integral(members, theta, nodes(modes, grid=max(grid - 4, 1)))[0])
        exact = value, error
        if state.nodes is not None:
            name = f"{LOG_POSTERIOR if prior else LOG_LIKELIHOOD} ({at.kind})"
    plates = (members.plate,) if members.plate else ()
    block = Normal(plates, members.index, modes.u, torch.linalg.cholesky(modes.root @ modes.root.mT))
    corrected = state.nodes is not None and exact is not None
    return Estimate(
        method="laplace",
        values=values,
        vector=whole,
        objective=exact[0] if corrected and exact else best.value,
        objective_name=name,
        error=error if corrected else 0.0,
        trace=torch.tensor([v for a in state.ascents for v in a.trace], dtype=torch.float64),
        status=status,
        n_evaluations=state.evaluations,
        seconds=time.perf_counter() - began,
        counts=goal.counts,
        optima=state.optima,
        posterior=Posterior(whole, (block,)),
        marginal=exact,
        fixed=tuple(goal.fixed),
        tie=() if goal.restriction is None else goal.restriction.tie,
        order=() if goal.restriction is None else goal.restriction.order,
        integrated=members.names,
    )


def _remark(status: Status, modes: Modes) -> Status:
    if modes.found:
        return status
    lost = int((~modes.proper & ((modes.decrement > 1e-6) | ~modes.concave)).sum())
    if not lost:
        return status
    cause = f"no proper mode of the effects of {lost} of {len(modes.value)} members"
    return Status(False, status.reason, (*status.causes, cause), "correct=True, or method='svi'")
