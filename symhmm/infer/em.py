"""EM: maximum likelihood by expected complete data, for any program; closed forms where there are some, and extrapolation."""

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from symhmm.compiler.density import Density
from symhmm.infer.checkpoint import Checkpoint, fingerprint, restored_ascents, saved_ascents
from symhmm.infer.closed_forms import Forms, Index
from symhmm.infer.expectation import Expectation, Measured, measured
from symhmm.infer.information import endless
from symhmm.infer.lbfgs import Ascent, ascend
from symhmm.infer.mle import assemble, check
from symhmm.infer.pooled import Search, starts
from symhmm.infer.progress import Listener, Reporter
from symhmm.infer.restrict import Order, Tie
from symhmm.infer.target import Array, Target, target
from symhmm.tables.results import Estimate

STRETCH, FARTHEST = 4.0, 1e3  # by which a longer step grows, and how long it may become
NOTHING = 1e-20  # a scale that has collapsed
STEPS = 20  # evaluations of the expected log-density that L-BFGS may use in one M-step


@dataclass(frozen=True, eq=False)
class Climb:
    """Where one start has come to.

    Args:
        at: the E-step there; None before the first and after a resumption.
        u: shape (n,), coordinates.
        points, moves: shape (k, n), the last points and the M-steps taken from them, for extrapolation.
        trace: log-density at each iteration, nats.
        stretch: factor by which the next M-step is lengthened where extrapolation points downhill.
        gain: nats that another step promises.
        done: nothing more to do; ``converged`` if the criterion was met.
    """

    u: Array
    points: Array
    moves: Array
    trace: tuple[float, ...] = ()
    stretch: float = 1.0
    gain: float = np.inf
    done: bool = False
    converged: bool = False
    at: Measured | None = None


@dataclass(frozen=True, eq=False)
class State:
    """A fit between two iterations: finished starts, and the one under way."""

    goal: Target
    forms: Forms
    starts: tuple[Array, ...]
    climb: Climb
    ascents: tuple[Ascent, ...] = ()
    evaluations: int = 0


@dataclass(frozen=True)
class Options(Search):
    """What `run` was asked for; see there."""

    memory: int = 8
    tolerance: float = 1e-5
    max_iterations: int = 2000
    precision: float = field(default=float(np.finfo(np.float64).eps), repr=False)


def run(
    density: Density,
    *,
    fix: Mapping[str, Any] | None = None,
    tie: Tie | None = None,
    order: Order | None = None,
    start: Mapping[str, Any] | None = None,
    seed: int = 0,
    restarts: int = 4,
    jitter: float | Mapping[str, float] = 1.0,
    screen: int = 10,
    memory: int = 8,
    tolerance: float = 1e-5,
    max_iterations: int = 2000,
    progress: bool | Listener | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """Maximise the log-likelihood (with priors, the posterior density) by EM (Dempster, Laird and Rubin 1977).

    The E-step is one backward pass. The M-step is in closed form for the coordinates whose curvature shows an exponential
    family (`symhmm.infer.closed_forms`), and one safeguarded Newton step for the others; where that does not raise the
    log-density, a few steps of L-BFGS on the expected one. Past steps are extrapolated (Anderson 1965; for EM, Henderson and
    Varadhan 2019), and the extrapolation is dropped where it does not pay, so that no iteration lowers the log-density.

    Args:
        fix: constrained values to hold, by name.
        tie, order: values that are equal, or increasing, as in `symhmm.infer.mle.run`.
        start: constrained values to start from, by name, instead of the program's own; they are used even where poor.
        seed, restarts, jitter, screen: of the starts, as in `symhmm.infer.mle.run`.
        memory: number of past steps to extrapolate from; 0 is plain EM.
        tolerance: nats that a further step, extrapolated or not, may still promise at convergence.
        max_iterations: of each start.
        progress: a function of `Progress`, True for a bar, None for a bar on a terminal.
        checkpoint: file to write to and to continue from; the result is the same as without interruption.

    Returns:
        The best optimum. Ctrl-C returns the best point so far, and says so in its status.

    Raises:
        FitError: nothing to fit, or the program has random effects.
    """
    began = time.perf_counter()
    options = Options(seed, restarts, jitter, screen, start is not None, memory, tolerance, max_iterations)
    goal = target(density, fix or {}, "em", start, tie=tie, order=order)
    check(goal, "em", restarts)
    options = replace(options, precision=float(torch.finfo(goal.start.dtype).eps))
    file = Checkpoint(checkpoint, fingerprint(goal, "em", vars(options)) if checkpoint else "")
    state: State | None = None
    stopped, report = False, None
    try:
        state = init(goal, options)
        state = _restored(state, file.read()) or state
        while len(state.ascents) < len(state.starts):
            number = len(state.ascents)
            report = report or Reporter(progress, f"em, start {number + 1} of {len(state.starts)}", max_iterations)
            state = step(state, options)
            if len(state.ascents) > number:
                report.close()
                report = None
                file.write(_saved(state))
                continue
            report(len(state.climb.trace), state.climb.trace[-1])
            if file.due:
                file.write(_saved(state))
    except KeyboardInterrupt:
        stopped = True
        if state is not None:
            file.write(_saved(state))
    finally:
        if report is not None:
            report.close()
    ascents = () if state is None else state.ascents
    if stopped and state is not None and state.climb.trace:
        ascents = (*ascents, _ascent(state.climb))
    spent = 0 if state is None else state.evaluations
    return assemble(goal, "em", ascents, spent, max_iterations, stopped, time.perf_counter() - began)


def init(goal: Target, options: Options) -> State:
    """Look for closed forms, and draw the starts."""
    found = starts(goal, options)
    return State(goal, found.forms, found.points, _fresh(found.points[0]), evaluations=found.evaluations)


def step(state: State, options: Options) -> State:
    """One iteration of the start under way; a start that ends here is put away and the next one begins."""
    climb, used = _iterate(state.goal, state.forms, state.climb, options)
    state = replace(state, climb=climb, evaluations=state.evaluations + used)
    if not climb.done:
        return state
    ascents = (*state.ascents, _ascent(climb))
    following = _fresh(state.starts[len(ascents)]) if len(ascents) < len(state.starts) else climb
    return replace(state, ascents=ascents, climb=following)


def _iterate(goal: Target, forms: Forms, climb: Climb, options: Options) -> tuple[Climb, int]:
    """E-step, M-step, extrapolation; returns the number of E-steps as well."""
    used, directions = 0, forms.directions()

    def at(u: Array) -> Measured:
        nonlocal used
        used += 1
        return measured(goal, u, directions)

    here = climb.at or at(climb.u)
    trace = climb.trace or (here.value,)
    if not (np.isfinite(here.value) and np.isfinite(here.gradient).all()):
        return replace(climb, at=here, trace=trace, done=True), used
    u, slope = climb.u, here.gradient
    if endless(goal, u, slope, NOTHING):
        return replace(climb, at=here, trace=trace, done=True), used
    aim, size = forms.update(u, slope, here.curvature)
    if len(forms.rest):
        aim[forms.rest] = _climbed(here.expectation, forms.rest, aim)
    move = aim - u
    points = np.concatenate([climb.points, u[None]])[-options.memory - 1 :]
    moves = np.concatenate([climb.moves, move[None]])[-options.memory - 1 :]
    leap = _extrapolated(points, moves, np.sqrt(np.abs(size)))
    gain = 0.5 * max(float(slope @ move), 0.0 if leap is None else float(slope @ leap), 0.0)
    known = leap is not None or not options.memory or not move.any()
    # Rounding of the log-density bounds what any criterion can see.
    rounding = 64 * options.precision * max(abs(here.value), 1.0)
    kept = replace(climb, at=here, points=points, moves=moves, trace=trace, gain=gain)
    if (known and gain <= max(options.tolerance, rounding)) or len(trace) > options.max_iterations:
        return replace(kept, done=True, converged=gain <= max(options.tolerance, rounding)), used
    # Where the log-density curves upwards, extrapolation leads back to where it is flat; longer steps lead on.
    uphill = leap is not None and float(slope @ leap) > 0
    longer = options.memory > 0 and leap is not None and not uphill
    jump = [u + leap] if leap is not None and uphill else [u + STRETCH * climb.stretch * move] if longer else []
    for tried in [*jump, aim]:
        there = at(tried)
        if there.value >= here.value - rounding and np.isfinite(there.gradient).all():
            stretch = min(STRETCH * climb.stretch, FARTHEST) if longer and tried is not aim else 1.0
            return replace(kept, at=there, u=tried, trace=(*trace, there.value), stretch=stretch), used
        # What is not true of the last steps is forgotten.
        kept = replace(kept, points=points[-1:], moves=moves[-1:])
    tried = _climbed(here.expectation, np.arange(u.size), u)
    there = at(tried)
    if there.value > here.value + rounding:
        return replace(kept, at=there, u=tried, points=points[:0], moves=moves[:0], trace=(*trace, there.value)), used
    return replace(kept, done=True, converged=gain <= max(options.tolerance, rounding)), used


def _climbed(at: Expectation, free: Index, held: Array) -> Array:
    """A few steps of L-BFGS on the expected log-density over the coordinates ``free``, the others at those of ``held``."""
    found = ascend(at.evaluate(free, held), at.u[free], max_evaluations=STEPS)
    if found.interrupted:
        raise KeyboardInterrupt
    return found.x


def _extrapolated(points: Array, moves: Array, weight: Array) -> Array | None:
    """Step to where the M-steps would end if they shrank as the last ones did (Anderson 1965, type II)."""
    if len(points) < 2:
        return None
    between, shrunk = np.diff(points, axis=0).T, np.diff(moves, axis=0).T
    last = moves[-1]
    rows, wanted = shrunk * weight[:, None], last * weight
    if not (np.isfinite(rows).all() and np.isfinite(wanted).all()):
        return None
    leap: Array = last - (between + shrunk) @ np.linalg.lstsq(rows, wanted, rcond=1e-7)[0]
    return leap


def _fresh(u: Array) -> Climb:
    nothing = np.zeros((0, u.size))
    return Climb(u, nothing, nothing)


def _ascent(climb: Climb) -> Ascent:
    gradient = np.zeros_like(climb.u) if climb.at is None else climb.at.gradient
    value = climb.trace[-1] if np.isfinite(climb.trace[-1]) else -np.inf
    return Ascent(climb.u, value, gradient, climb.gain, climb.converged, list(climb.trace))


def _saved(state: State) -> dict[str, Any]:
    c = state.climb
    now = {"u": c.u, "points": c.points, "moves": c.moves, "climbed": np.array(c.trace), "stretch": np.array(c.stretch)}
    out = saved_ascents(state.starts, state.ascents, state.evaluations)
    return out | ({} if len(state.ascents) == len(state.starts) else now)


def _restored(state: State, arrays: dict[str, Any] | None) -> State | None:
    if arrays is None:
        return None
    ascents = restored_ascents(arrays)
    climb = state.climb
    if "u" in arrays:
        climb = Climb(
            arrays["u"], arrays["points"], arrays["moves"], tuple(arrays["climbed"].tolist()), float(arrays["stretch"])
        )
    evaluations = int(arrays["evaluations"])
    # The E-step at the point is made again.
    evaluations -= int(len(climb.trace) > 0 and "u" in arrays)
    return replace(state, starts=tuple(arrays["starts"]), climb=climb, ascents=ascents, evaluations=evaluations)
