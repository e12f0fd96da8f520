"""Stochastic variational inference: a guide chosen by role, the whole step captured once, Adam on its free numbers."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import FitError
from symhmm.infer.bound import evaluate_bound
from symhmm.infer.checkpoint import Checkpoint, fingerprint
from symhmm.infer.guide import Guide, blocks_by_role, guide
from symhmm.infer.progress import Listener, Reporter
from symhmm.infer.target import Target, target, value_and_gradient
from symhmm.infer.verdict import not_finite, of_guide
from symhmm.infer.warm import curvature_units, warm_start
from symhmm.tables.results import ELBO, ELBO_EVIDENCE, Estimate, Optima

WINDOW = 100  # steps whose mean is the smoothed objective
CLIP = 10.0  # times the running mean of the gradient norm
WARM = "warm starts: joint density with the random effects held equal"


@dataclass(frozen=True)
class Options:
    """What `run` was asked for; see there."""

    guide: str = "full"
    seed: int = 0
    restarts: int = 4
    steps: int = 3000
    cooldown: int = 1000
    lr: float = 0.05
    particles: int = 1
    evaluate: int = 500


@dataclass
class State:
    """Where a run is. Mutable: `step` moves it in place, which saves three copies of everything at each step.

    Args:
        phi: free numbers of the guide; ``optimizer`` holds Adam's moments of them.
        cooling: the step at which the decay of the rate began, -1 before.
        norm: running mean of the gradient norm, for clipping.
        trace: objective at each step, nats.
    """

    goal: Target
    guide: Guide
    gradient: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    phi: Tensor
    optimizer: torch.optim.Optimizer
    generator: torch.Generator
    optima: Optima
    evaluations: int
    cooling: int = -1
    norm: float = 0.0
    trace: list[float] = field(default_factory=list)

    @property
    def done(self) -> int:
        """Steps taken."""
        return len(self.trace)


def run(
    density: Density,
    *,
    guide: str = "full",
    fix: Mapping[str, Any] | None = None,
    start: Mapping[str, Any] | None = None,
    seed: int = 0,
    restarts: int = 4,
    steps: int = 3000,
    cooldown: int = 1000,
    lr: float = 0.05,
    particles: int = 1,
    evaluate: int = 500,
    progress: bool | Listener | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """Maximise the evidence lower bound over parameters (points) and a normal guide of the continuous latents.

    The run starts from the best of ``restarts`` maxima without random effects (see `symhmm.infer.warm`). The rate stays
    at ``lr`` until the smoothed objective stops rising: the mean over 100 steps exceeds that of the 100 before by less
    than twice its standard error. Then it falls to zero along a cosine during ``cooldown`` steps.

    Args:
        guide: ``full``, a full covariance for the latents of each member of a plate, or ``meanfield``.
        fix: constrained values to hold, by name.
        start: constrained values to start from, by name, instead of the program's own.
        seed: of the starts and of all draws; the same seed gives the same numbers.
        steps: the most steps in all, ``cooldown`` of them with falling rate.
        lr: Adam's rate, in units of about one posterior standard deviation.
        particles: draws per step.
        evaluate: draws for the reported bound and the importance-weighted estimate.
        progress, checkpoint: as in `symhmm.infer.mle.run`.

    Returns:
        The bound with its Monte Carlo error, the posterior of the latents, and the importance-weighted estimate of the
        log-likelihood. Ctrl-C returns the fit so far, and says so in its status.

    Raises:
        FitError: nothing to fit, no latents to integrate, or an unknown guide.
    """
    began = time.perf_counter()
    options = Options(guide, seed, restarts, steps, cooldown, lr, particles, evaluate)
    goal = target(density, fix or {}, "svi", start)
    _check(goal, options)
    file = Checkpoint(checkpoint, fingerprint(goal, "svi", vars(options)) if checkpoint else "")
    saved = file.read()
    stopped = False
    state = _restored(goal, options, saved) if saved is not None else init(goal, options)
    if not state.optima.objectives or not np.isfinite(max(state.optima.objectives)):
        return _not_finite(state, options, time.perf_counter() - began)
    report = Reporter(progress, "svi", options.steps, state.done)
    try:
        while not finished(state, options):
            value = step(state, options)
            report(state.done, value)
            if file.due:
                file.write(_saved(state))
    except KeyboardInterrupt:
        stopped = True
    finally:
        report.close()
    file.write(_saved(state))
    return _estimate(state, options, stopped, time.perf_counter() - began)


def init(goal: Target, options: Options) -> State:
    """Find the start, build the guide there, and capture the step."""
    goal, ascents, evaluations = warm_start(goal, seed=options.seed, restarts=options.restarts)
    optima = Optima(tuple(a.value for a in ascents), tuple(a.converged for a in ascents), of=WARM)
    blocks = blocks_by_role(goal.entries, goal.density.graph, options.guide)
    points = _points(goal)
    if np.isfinite(max(optima.objectives)):
        unit, more = curvature_units(goal, points, blocks)
    else:
        unit, more = torch.ones_like(goal.start), 0
    return _assemble(goal, guide(goal.start, points, blocks, unit), options, optima, evaluations + more)


def step(state: State, options: Options) -> float:
    """One step of Adam; returns the objective before it, nats."""
    shape = (options.particles, state.guide.noise_size)
    noise = torch.randn(shape, generator=state.generator, dtype=state.phi.dtype)
    value, gradient = state.gradient(state.phi, noise)
    objective, norm = value.item(), float(torch.linalg.vector_norm(gradient))
    if np.isfinite(objective) and np.isfinite(norm):
        state.norm = norm if state.norm == 0 else 0.99 * state.norm + 0.01 * min(norm, CLIP * state.norm)
        if norm > CLIP * state.norm:
            gradient = gradient * (CLIP * state.norm / norm)
        progress = 0.0 if state.cooling < 0 else (state.done - state.cooling) / options.cooldown
        state.optimizer.param_groups[0]["lr"] = options.lr * 0.5 * (1 + float(np.cos(np.pi * min(progress, 1.0))))
        state.phi.grad = gradient
        state.optimizer.step()
    # A draw at which the density is not finite moves nothing; it stays in the trace, and the status counts it.
    state.trace.append(objective)
    state.evaluations += options.particles
    if state.cooling < 0 and (state.done >= options.steps - options.cooldown or _level(state.trace)):
        state.cooling = state.done
    return objective


def finished(state: State, options: Options) -> bool:
    """Whether the rate has fallen to zero."""
    hopeless = state.cooling >= 0 and not np.isfinite(state.trace[: state.cooling]).any()
    return hopeless or (state.cooling >= 0 and state.done >= state.cooling + options.cooldown)


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


def _assemble(goal: Target, made: Guide, options: Options, optima: Optima, evaluations: int) -> State:
    phi = made.initial()
    noise = torch.zeros(options.particles, made.noise_size, dtype=phi.dtype)

    def bound(phi: Tensor, noise: Tensor) -> Tensor:
        vector, log_q = made.draw(phi, noise)
        return goal.density.log_prob(goal.values(vector)) + goal.log_abs_det_jacobian(vector) - log_q

    def mean_bound(phi: Tensor, noise: Tensor) -> Tensor:
        if options.particles == 1:
            return bound(phi, noise[0])
        return torch.func.vmap(bound, in_dims=(None, 0))(phi, noise).mean()

    def gradient(phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return value_and_gradient(lambda p: mean_bound(p, noise), phi)

    replay = goal.captured(f"svi {options.guide} {options.particles}", gradient, (phi, noise))

    def evaluate(phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            out: tuple[Tensor, Tensor] = replay(phi.detach(), noise)
        return out

    phi = phi.requires_grad_()
    optimizer = torch.optim.Adam([phi], lr=options.lr, betas=(0.9, 0.99), maximize=True)
    generator = torch.Generator().manual_seed(options.seed)
    return State(goal, made, evaluate, phi, optimizer, generator, optima, evaluations)


def _points(goal: Target) -> Tensor:
    params = [i for e in goal.entries if e.is_param for i in range(e.start, e.stop)]
    return torch.tensor(params, dtype=torch.long)


def _check(goal: Target, options: Options) -> None:
    if all(e.is_param for e in goal.entries):
        raise FitError(
            "method='svi' has no continuous latents to integrate: every free value is a parameter.",
            details=[f"free: {', '.join(e.name for e in goal.entries)}"],
            suggestion="method='mle', which is exact here",
        )
    for name in ("restarts", "steps", "cooldown", "particles", "evaluate"):
        if getattr(options, name) < 1:
            raise FitError(f"{name}={getattr(options, name)} must be at least 1.", suggestion=f"leave {name} out")
    if options.cooldown > options.steps:
        raise FitError(
            f"cooldown={options.cooldown} is longer than steps={options.steps}.",
            suggestion=f"steps={2 * options.cooldown}",
        )


def _estimate(state: State, options: Options, stopped: bool, seconds: float) -> Estimate:
    began = time.perf_counter()
    goal, phi = state.goal, state.phi.detach()
    posterior = state.guide.posterior(phi)
    found = evaluate_bound(goal, state.guide, phi, options.evaluate, options.seed + 1)
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
            posterior,
            trace,
            bound=found.bound,
            cooling=state.cooling,
            plateau=0 <= state.cooling < options.steps - options.cooldown,
            stopped=stopped,
        ),
        n_evaluations=state.evaluations + options.evaluate,
        seconds=seconds + time.perf_counter() - began,
        counts={e.name: e.stop - e.start for e in goal.entries if not e.plates},
        optima=state.optima,
        posterior=posterior,
        marginal=found.marginal,
        fixed=tuple(goal.fixed),
    )


def _not_finite(state: State, options: Options, seconds: float) -> Estimate:
    goal = state.goal
    values = goal.values(goal.start)
    return Estimate(
        method="svi",
        values=values,
        vector=goal.start,
        objective=-np.inf,
        objective_name=ELBO,
        trace=torch.zeros(0),
        status=not_finite(goal, values),
        n_evaluations=state.evaluations,
        seconds=seconds,
        counts={e.name: e.stop - e.start for e in goal.entries if not e.plates},
        optima=state.optima,
        fixed=tuple(goal.fixed),
    )


def _saved(state: State) -> dict[str, Any]:
    moments = state.optimizer.state[state.phi]
    out = {
        "start": state.goal.start.numpy(),
        "unit": _unit(state.guide).numpy(),
        "phi": state.phi.detach().numpy(),
        "generator": state.generator.get_state().numpy(),
        "trace": np.array(state.trace),
        "cooling": np.array(state.cooling),
        "norm": np.array(state.norm),
        "evaluations": np.array(state.evaluations),
        "optima": np.array([state.optima.objectives, state.optima.converged], dtype=float),
    }
    return out | {f"adam.{k}": v.numpy() for k, v in moments.items()}


def _unit(made: Guide) -> Tensor:
    out = torch.ones_like(made.origin)
    out[made.points] = made.unit
    for b in made.blocks:
        out[b.index.reshape(-1)] = b.unit.reshape(-1)
    return out


def _restored(goal: Target, options: Options, arrays: dict[str, Any]) -> State:
    goal = goal.at(torch.from_numpy(arrays["start"]))
    objectives, converged = arrays["optima"].tolist()
    optima = Optima(tuple(objectives), tuple(map(bool, converged)), of=WARM)
    blocks = blocks_by_role(goal.entries, goal.density.graph, options.guide)
    made = guide(goal.start, _points(goal), blocks, torch.from_numpy(arrays["unit"]))
    state = _assemble(goal, made, options, optima, int(arrays["evaluations"]))
    with torch.no_grad():
        state.phi.copy_(torch.from_numpy(arrays["phi"]))
    moments = {k.removeprefix("adam."): torch.from_numpy(v) for k, v in arrays.items() if k.startswith("adam.")}
    state.optimizer.state[state.phi] = moments
    state.generator.set_state(torch.from_numpy(arrays["generator"]))
    state.cooling, state.norm, state.trace = int(arrays["cooling"]), float(arrays["norm"]), arrays["trace"].tolist()
    return state
