"""Stochastic variational inference: a guide chosen by role, the whole step captured once, Adam on its free numbers."""

import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import FitError
from symhmm.infer.arrows import can_follow, spreads
from symhmm.infer.bound import corrected, evaluate_bound
from symhmm.infer.checkpoint import Checkpoint, fingerprint
from symhmm.infer.guide import blocks_by_role
from symhmm.infer.lbfgs import Ascent
from symhmm.infer.minibatch import minibatches
from symhmm.infer.modes import settled
from symhmm.infer.objective import Gradient
from symhmm.infer.objective import objective as captured_objective
from symhmm.infer.progress import Listener, Reporter
from symhmm.infer.restrict import Order, Tie
from symhmm.infer.svi_state import WARM, Options, Schedule, State, assemble, parameters, restored, saved
from symhmm.infer.target import Target, target
from symhmm.infer.verdict import STOPPED_WARM, of_guide, without_start
from symhmm.infer.warm import Interrupted, curvature_units, warm_start
from symhmm.tables.results import ELBO, ELBO_EVIDENCE, Estimate, Optima

WINDOW = 100  # steps whose mean is the smoothed objective
LOWEST = 0.5  # of the rate, at the end
DECAY = (0.9, 0.95)  # Adam's memory of the gradient and of its square
SCHEDULES = ("plateau", "cosine", "constant")
OBJECTIVES = ("elbo", "iwelbo")


def run(
    density: Density,
    *,
    guide: Any = "full",
    objective: str = "elbo",
    fix: Mapping[str, Any] | None = None,
    tie: Tie | None = None,
    order: Order | None = None,
    start: Mapping[str, Any] | None = None,
    seed: int = 0,
    restarts: int = 4,
    steps: int = 3000,
    cooldown: int = 300,
    lr: float = 0.05,
    schedule: Schedule = "plateau",
    clip: float = 10.0,
    particles: int | None = None,
    evaluate: int = 500,
    progress: bool | Listener | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """Maximise the evidence lower bound over parameters (points) and a guide of the continuous latents.

    The run starts from the best of ``restarts`` maxima without random effects (see `symhmm.infer.warm`). The rate stays
    at ``lr`` until the smoothed objective stops rising: the mean over 100 steps exceeds that of the 100 before by less
    than twice its standard error. Then it falls to half along a cosine during ``cooldown`` steps, with more draws a step,
    and the mean of the guide's numbers over the last two thirds of these is the result (Polyak and Juditsky 1992).

    A program whose plate takes a subsample (``pyro.plate("i", N, subsample_size=B)``) is fitted by minibatches: each step
    draws B other members, and moves their own latents only; see `symhmm.infer.minibatch`.

    Args:
        guide: ``full``, a full covariance for the latents of each member of a plate, which follow the population's values
            where these have priors (see `symhmm.infer.arrows`), ``meanfield``, ``low_rank``, or one
            of these for each plate by name; a network (`symhmm.infer.amortised.Amortised`); or a Pyro guide, written by
            hand or an autoguide (`symhmm.infer.pyro_guide`).
        objective: ``elbo``, or ``iwelbo`` for the importance-weighted bound of ``particles`` draws (8 by default).
        fix: constrained values to hold, by name.
        tie, order: parameters that are equal or increasing, as in `symhmm.infer.mle.run`; not latents, whose prior this
            would change.
        start: constrained values to start from, by name, instead of the program's own.
        seed: of the starts and of all draws; the same seed gives the same numbers.
        steps: the most steps in all, ``cooldown`` of them with falling rate.
        lr: Adam's rate, in units of about one posterior standard deviation.
        schedule: ``plateau`` as above, ``cosine`` over all ``steps``, ``constant``, or a function from the step to the
            factor of ``lr``; all but the first take exactly ``steps`` steps.
        clip: largest norm of a gradient, times the running mean of norms.
        particles: draws per step; by default 1, and 4 in mirrored pairs while the rate falls.
        evaluate: draws for the reported bound and the importance-weighted estimate.
        progress, checkpoint: as in `symhmm.infer.mle.run`.

    Returns:
        The bound with its Monte Carlo error, the posterior of the latents, and the importance-weighted estimate of the
        log-likelihood. Ctrl-C returns the fit so far, and says so in its status.

    Raises:
        FitError: nothing to fit, no latents to integrate, latents that are tied or ordered, or an option that does not exist.
    """
    began = time.perf_counter()
    options = Options(guide, objective, seed, restarts, steps, cooldown, lr, schedule, clip, particles, evaluate)
    goal = target(density, fix or {}, "svi", start, tie=tie, order=order)
    _check(goal, options)
    file = Checkpoint(checkpoint, fingerprint(goal, "svi", options.described) if checkpoint else "")
    before = file.read()
    stopped = False
    try:
        state = init(goal, options) if before is None else restored(goal, options, before)
    except Interrupted as cut:
        optima, status = _warm(cut.ascents), STOPPED_WARM
        seconds = time.perf_counter() - began
        return without_start(cut.goal, "svi", ELBO, seconds, evaluations=cut.evaluations, optima=optima, status=status)
    if not state.optima.objectives or not np.isfinite(max(state.optima.objectives)):
        seconds = time.perf_counter() - began
        return without_start(goal, "svi", ELBO, seconds, evaluations=state.evaluations, optima=state.optima)
    report = Reporter(progress, "svi", options.steps, state.done)
    try:
        while not finished(state, options):
            value = step(state, options)
            report(state.done, value)
            if file.due:
                file.write(saved(state))
    except KeyboardInterrupt:
        stopped = True
    finally:
        report.close()
    # Half a step is no place to continue from: the file keeps an earlier one.
    if not state.moving:
        file.write(saved(state))
    return _estimate(state, options, stopped, time.perf_counter() - began)


def init(goal: Target, options: Options) -> State:
    """Find the start and build the guide there. Raises `Interrupted` on Ctrl-C."""
    warm, ascents, evaluations = warm_start(goal, seed=options.seed, restarts=options.restarts)
    goal, optima = warm, _warm(ascents)
    try:
        blocks = blocks_by_role(goal.entries, goal.density.graph)
        if np.isfinite(max(optima.objectives)):
            if not callable(options.guide) and can_follow(blocks) and minibatches(goal.density) is None:
                goal, more = settled(goal, spreads(goal, blocks))
                evaluations += more
            unit, more = curvature_units(goal, parameters(goal), blocks)
        else:
            unit, more = torch.ones_like(goal.start), 0
        return assemble(goal, options, unit, optima, evaluations + more)
    except KeyboardInterrupt as error:
        raise Interrupted(warm, ascents, evaluations) from error


def _warm(ascents: list[Ascent]) -> Optima:
    return Optima(tuple(a.value for a in ascents), tuple(a.converged for a in ascents), of=WARM)


def step(state: State, options: Options) -> float:
    """One step of Adam (Kingma and Ba 2015); returns the objective before it, nats."""
    draws, before = options.draws[state.cooling >= 0], state.generator.get_state()
    try:
        noise = _noise(draws, state.guide.noise_size, state.generator, state.phi.dtype)
        chosen = () if state.batches is None else (state.batches.draw(state.generator),)
        value, gradient = _gradient(state, options, draws)(state.phi, noise, *chosen)
        objective, norm = value.item(), float(torch.linalg.vector_norm(gradient))
    except KeyboardInterrupt:
        state.generator.set_state(before)  # as if the step had not begun
        raise
    state.moving = True
    if np.isfinite(objective) and np.isfinite(norm):
        state.norm = norm if state.norm == 0 else 0.99 * state.norm + 0.01 * min(norm, options.clip * state.norm)
        if norm > options.clip * state.norm:
            gradient = gradient * (options.clip * state.norm / norm)
        _move(state, gradient, options.lr * _factor(state, options), *chosen)
        if _end(state, options) - state.done <= 2 * options.cooldown // 3:
            state.averaged += 1
            state.mean += (state.phi - state.mean) / state.averaged
    # A draw at which the density is not finite moves nothing; it stays in the trace, and the status counts it.
    state.trace.append(objective)
    state.evaluations += draws
    hot = options.schedule == "plateau" and state.cooling < 0
    if hot and (state.done >= options.steps - options.cooldown or _level(state.trace)):
        state.cooling = state.done
    state.moving = False
    return objective


def finished(state: State, options: Options) -> bool:
    """Whether the rate has fallen to zero, or all steps are taken."""
    hopeless = state.cooling >= 0 and not np.isfinite(state.trace[: state.cooling]).any()
    return hopeless or state.done >= _end(state, options)


def _end(state: State, options: Options) -> int:
    """The last step, as far as it is known."""
    if options.schedule != "plateau" or state.cooling < 0:
        return options.steps
    return state.cooling + options.cooldown


def _level(trace: list[float]) -> bool:
    """Whether the last window is no better than the one before beyond noise; also if neither has a finite number."""
    if len(trace) < 2 * WINDOW or len(trace) % (WINDOW // 2):
        return False
    recent = np.array(trace[-2 * WINDOW :])
    if not np.isfinite(recent).all():
        return not np.isfinite(recent).any()
    before, now = recent[:WINDOW], recent[WINDOW:]
    error = np.sqrt((before.var() + now.var()) / WINDOW)
    return bool(now.mean() - before.mean() < 2 * error)


def _factor(state: State, options: Options) -> float:
    """What the rate is multiplied with at this step."""
    if callable(options.schedule):
        return float(options.schedule(state.done))
    if options.schedule == "constant" or (options.schedule == "plateau" and state.cooling < 0):
        return 1.0
    first, length = (0, options.steps) if options.schedule == "cosine" else (state.cooling, options.cooldown)
    fall = 0.5 * (1 - float(np.cos(np.pi * min((state.done - first) / length, 1.0))))
    return 1.0 - (1.0 - LOWEST) * fall


def _noise(draws: int, size: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, shape (draws, size), in mirrored pairs, so that what is odd about the mean cancels."""
    half = torch.randn((draws + 1) // 2, size, generator=generator, dtype=dtype)
    return torch.cat([half, -half])[:draws]


def _move(state: State, gradient: Tensor, rate: float, chosen: Tensor | None = None) -> None:
    """Adam's step uphill, of the numbers of members in the batch and of those that belong to no member."""
    active = slice(None) if chosen is None else (state.owners < 0) | torch.isin(state.owners, chosen)
    g = gradient[active]
    first = DECAY[0] * state.first[active] + (1 - DECAY[0]) * g
    second = DECAY[1] * state.second[active] + (1 - DECAY[1]) * g.square()
    count = state.count[active] + 1
    state.first[active], state.second[active], state.count[active] = first, second, count
    size = (second / (1 - DECAY[1] ** count)).sqrt() + 1e-8
    state.phi[active] += rate * first / (1 - DECAY[0] ** count) / size


def _gradient(state: State, options: Options, draws: int) -> Gradient:
    if draws not in state.gradients:
        weighted = options.objective == "iwelbo"
        state.gradients[draws] = captured_objective(
            state.goal, state.guide, draws, weighted=weighted, batches=state.batches
        )
    return state.gradients[draws]


def _check(goal: Target, options: Options) -> None:
    if all(e.is_param for e in goal.entries):
        raise FitError(
            "method='svi' has no continuous latents to integrate: every free value is a parameter.",
            details=[f"free: {', '.join(e.name for e in goal.entries)}"],
            suggestion="method='mle', which is exact here",
        )
    if goal.restriction is not None:
        limited = goal.free[goal.restriction.limited]
        for e in (e for e in goal.entries if not e.is_param):
            if bool(((limited >= e.start) & (limited < e.stop)).any()):
                raise FitError(
                    f"tie= and order= are for parameters, and {e.name!r} is a latent, whose prior they would change.",
                    suggestion=f"a prior in the program that says it, or fit.ordered(by={e.name!r}) for the order of states",
                )
    for name, known in (("objective", OBJECTIVES), ("schedule", SCHEDULES)):
        if isinstance(given := getattr(options, name), str) and given not in known:
            raise FitError(
                f"there is no {name} {given!r}.", suggestion=f"{name}={known[0]!r}, or {' or '.join(known[1:])}"
            )
    for name in ("restarts", "steps", "cooldown", "particles", "evaluate", "clip"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise FitError(f"{name}={given} must be at least 1.", suggestion=f"leave {name} out")
    if options.objective == "iwelbo" and minibatches(goal.density) is not None:
        raise FitError(
            "the importance-weighted bound is no sum over members, so that a batch of them says nothing of it.",
            suggestion="objective='elbo', or the whole plate",
        )
    if options.cooldown > options.steps:
        raise FitError(
            f"cooldown={options.cooldown} is longer than steps={options.steps}.",
            suggestion=f"steps={2 * options.cooldown}",
        )


def _estimate(state: State, options: Options, stopped: bool, seconds: float) -> Estimate:
    began = time.perf_counter()
    goal, phi = state.goal, state.result
    own = state.guide.posterior(phi)
    found = evaluate_bound(goal, state.guide, phi, options.evaluate, options.seed + 1, state.batches)
    posterior = corrected(own, found)
    with torch.no_grad():
        values = {n: v.detach() for n, v in goal.values(posterior.vector).items()}
    prior = any(not e.is_param and not e.plates for e in goal.density.layout.entries)
    trace = torch.tensor(state.trace, dtype=torch.float64)
    return Estimate(
        method="svi",
        values=values,
        vector=posterior.vector,
        objective=found.bound,
        objective_name=ELBO_EVIDENCE if prior else ELBO,
        error=found.error,
        trace=trace,
        status=of_guide(
            goal,
            state.guide,
            own,
            trace,
            found=found,
            cooling=state.cooling,
            plateau=options.schedule != "plateau" or 0 <= state.cooling < options.steps - options.cooldown,
            stopped=stopped,
        ),
        n_evaluations=state.evaluations + options.evaluate,
        seconds=seconds + time.perf_counter() - began,
        counts={e.name: goal.counts[e.name] for e in goal.entries if not e.plates},
        optima=state.optima,
        posterior=posterior,
        marginal=found.marginal,
        fixed=tuple(goal.fixed),
        tie=() if goal.restriction is None else goal.restriction.tie,
        order=() if goal.restriction is None else goal.restriction.order,
    )
