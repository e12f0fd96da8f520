"""Maximum likelihood and maximum a posteriori: L-BFGS from several starts on the compiled density."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from symhmm.compiler.density import Density
from symhmm.errors import FitError
from symhmm.infer.checkpoint import Checkpoint, fingerprint, restored_ascents, saved_ascents
from symhmm.infer.information import endless
from symhmm.infer.lbfgs import Ascent, ascend
from symhmm.infer.pooled import Search, starts
from symhmm.infer.progress import Listener, Reporter
from symhmm.infer.restrict import Order, Tie
from symhmm.infer.starts import units
from symhmm.infer.target import Array, Target, target
from symhmm.infer.verdict import of_ascent
from symhmm.tables.results import LOG_LIKELIHOOD, LOG_POSTERIOR, Estimate, Optima


@dataclass(frozen=True, eq=False)
class State:
    """A fit between two starts: ``ascents`` are the finished ones; ``log`` holds the evaluations of the one under way.
    ``unit`` is the length of each coordinate in which the first steps are taken.

    An interrupted ascent is continued by repeating it with its logged values and gradients, which costs nothing and
    gives the same numbers as if it had never stopped.
    """

    goal: Target
    method: str
    starts: tuple[Array, ...]
    unit: Array
    ascents: tuple[Ascent, ...] = ()
    log: tuple[tuple[float, Array], ...] = ()
    evaluations: int = 0


@dataclass(frozen=True)
class Options(Search):
    """What `run` was asked for; see there."""

    tolerance: float = 1e-5
    max_evaluations: int = 2000
    precision: float = field(default=float(np.finfo(np.float64).eps), repr=False)


def run(
    density: Density,
    *,
    method: str = "mle",
    fix: Mapping[str, Any] | None = None,
    tie: Tie | None = None,
    order: Order | None = None,
    start: Mapping[str, Any] | None = None,
    seed: int = 0,
    restarts: int = 4,
    jitter: float | Mapping[str, float] = 1.0,
    screen: int = 10,
    tolerance: float = 1e-5,
    max_evaluations: int = 2000,
    progress: bool | Listener | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """Maximise the log-density over the constrained values (no Jacobian).

    Args:
        method: ``mle`` for a program whose free values are all parameters; ``map`` for the joint maximum over
            parameters and continuous latents.
        fix: constrained values to hold, by name.
        tie: groups of values that are equal, by name or element: ``[("loc[0]", "loc[2]"), ("sd", "other sd")]``.
        order: names whose values increase along their last axis (that of the states), or a mapping from names to axes.
        start: constrained values to start from, by name, instead of the program's own; they are used even where poor.
        seed: of the jitter.
        restarts: starts in all. The first is the program's own (moved by a hundredth of the jitter, which breaks the
            symmetry of states that start equal), the others the best of ``screen`` jittered points each. Where the own start
            explains the data worse than states that are all alike would, all are jittered around that fit instead
            (`symhmm.infer.pooled`).
        jitter: size of the jitter in standard errors of one observation; sizes by name jitter these values alone.
        tolerance: nats that a further Newton step may still promise at convergence.
        max_evaluations: gradients per start.
        progress: a function of `Progress`, True for a bar, None for a bar on a terminal.
        checkpoint: file to write to and to continue from; the result is the same as without interruption.

    Returns:
        The best optimum. Ctrl-C returns the best point so far, and says so in its status.

    Raises:
        FitError: nothing to fit, or ``mle`` is asked of a program with continuous latents.
    """
    began = time.perf_counter()
    options = Options(seed, restarts, jitter, screen, start is not None, tolerance, max_evaluations)
    goal = target(density, fix or {}, method, start, tie=tie, order=order)
    check(goal, method, restarts)
    options = replace(options, precision=float(torch.finfo(goal.start.dtype).eps))
    file = Checkpoint(checkpoint, fingerprint(goal, method, vars(options)) if checkpoint else "")
    state, stopped = None, False
    try:
        state = _restored(goal, method, file.read()) or init(goal, method, options)
        while len(state.ascents) < len(state.starts):
            state = step(state, options, progress, file)
            if state.ascents[-1].interrupted:
                stopped = True
                break
            file.write(_saved(state))
    except KeyboardInterrupt:
        state, stopped = state or State(goal, method, (goal.x,), np.ones(goal.size)), True
    seconds = time.perf_counter() - began
    return assemble(goal, method, state.ascents, state.evaluations, max_evaluations, stopped, seconds)


def init(goal: Target, method: str, options: Options) -> State:
    """Draw the starts."""
    found = starts(goal, options)
    return State(goal, method, found.points, units(goal, found.scale), evaluations=found.evaluations)


def step(
    state: State, options: Options, progress: bool | Listener | None = None, file: Checkpoint | None = None
) -> State:
    """Climb from the next start to its optimum."""
    number = len(state.ascents)
    report = Reporter(progress, f"{state.method}, start {number + 1} of {len(state.starts)}", options.max_evaluations)
    log, done = list(state.log), 0
    best = -np.inf

    def evaluate(x: Array) -> tuple[float, Array]:
        nonlocal done, best
        if done == len(log):
            value, gradient = state.goal.evaluate(x)
            log.append((value, gradient.copy()))
            if file is not None and file.due:
                file.write(_saved(replace(state, log=tuple(log))))
        value, gradient = log[done]
        done += 1
        best = max(best, value) if np.isfinite(value) else best
        report(done, best)
        return value, gradient

    try:
        ascent = ascend(
            evaluate,
            state.starts[number],
            tolerance=options.tolerance,
            max_evaluations=options.max_evaluations,
            precision=options.precision,
            unit=state.unit,
        )
    finally:
        report.close()
    if ascent.interrupted and file is not None:
        file.write(_saved(replace(state, log=tuple(log))))
    return replace(state, ascents=(*state.ascents, ascent), log=(), evaluations=state.evaluations + len(ascent.trace))


def check(goal: Target, method: str, restarts: int) -> None:
    """Refuse what maximum likelihood cannot mean.

    Raises:
        FitError: no starts; ``mle`` of a program with latents; ``em`` of one with random effects.
    """
    if restarts < 1:
        raise FitError(f"restarts={restarts} leaves nothing to run.", suggestion="restarts=1")
    latents = [e for e in goal.entries if not e.is_param]
    random = [e for e in latents if e.plates]
    if (method == "mle" and latents) or (method == "em" and random):
        names = ", ".join(f"{e.name!r} ({e.role})" for e in latents[:6])
        what = "random effects" if random else "priors"
        why = (
            "their joint maximum with the parameters is not a maximum likelihood estimate: spreads go to zero"
            if random
            else "with a prior the maximum is that of the posterior density"
        )
        raise FitError(
            f"method={method!r} cannot fit a program with {what}: {names}.",
            details=[why],
            suggestion="method='laplace' or method='svi', which integrate them" if random else "method='map'",
        )


def assemble(
    goal: Target,
    method: str,
    ascents: Sequence[Ascent],
    evaluations: int,
    allowed: int,
    stopped: bool,
    seconds: float,
) -> Estimate:
    """The best of several climbs as an estimate; ``allowed`` is the most that each was allowed to take."""
    ascents = ascents or (Ascent(goal.x, -np.inf, np.zeros(goal.size)),)
    # A likelihood without bound is no optimum, however high: it loses to every start that ended elsewhere.
    best = max(ascents, key=lambda a: (not endless(goal, a.x, a.gradient), a.value))
    vector = goal.embed(torch.from_numpy(best.x).to(goal.start.dtype))
    with torch.no_grad():
        values = {n: v.detach() for n, v in goal.values(vector).items()}
    latents = any(not e.is_param for e in goal.density.layout.entries)
    return Estimate(
        method=method,
        values=values,
        vector=vector,
        objective=best.value,
        objective_name=LOG_POSTERIOR if latents else LOG_LIKELIHOOD,
        trace=torch.tensor(best.trace, dtype=torch.float64),
        status=of_ascent(
            goal, best, vector, values, allowed, stopped, "iterations" if method == "em" else "evaluations"
        ),
        n_evaluations=evaluations,
        seconds=seconds,
        counts=goal.counts,
        optima=Optima(tuple(a.value for a in ascents), tuple(a.converged for a in ascents)),
        fixed=tuple(goal.fixed),
        tie=() if goal.restriction is None else goal.restriction.tie,
        order=() if goal.restriction is None else goal.restriction.order,
    )


def _saved(state: State) -> dict[str, Any]:
    out = saved_ascents(state.starts, state.ascents, state.evaluations) | {"unit": state.unit}
    if state.log:
        out |= {"log.values": np.array([v for v, _ in state.log]), "log.gradients": np.stack([g for _, g in state.log])}
    return out


def _restored(goal: Target, method: str, arrays: dict[str, Any] | None) -> State | None:
    if arrays is None:
        return None
    log = tuple(zip(arrays.get("log.values", np.zeros(0)).tolist(), arrays.get("log.gradients", ()), strict=True))
    return State(
        goal, method, tuple(arrays["starts"]), arrays["unit"], restored_ascents(arrays), log, int(arrays["evaluations"])
    )
