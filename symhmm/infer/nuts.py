"""NUTS: draws from the posterior of all continuous values, discrete latents summed out.

The chains move in coordinates that make the posterior about round: random effects in units of what prior and data leave open
of them (`symhmm.infer.noncentred`), then whitened by the curvature of the log-density, averaged over a short pilot chain
(`symhmm.infer.whiten`). That leaves trajectories of a few gradients per draw.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import FitError
from symhmm.infer.checkpoint import Checkpoint, fingerprint
from symhmm.infer.draws import agreement, draws, relabelled, verdict
from symhmm.infer.moving import Moving, natural, require_volumes
from symhmm.infer.noncentred import Request, noncentred
from symhmm.infer.pilot import CLIMBS, DRAWS, WARM_UP, Ground, pilot, starting_point
from symhmm.infer.progress import Listener, Reporter
from symhmm.infer.restrict import Order, Tie
from symhmm.infer.sampler import Chain, chain_from, require_nutpie, sample
from symhmm.infer.target import Array, Target, target
from symhmm.infer.verdict import CONTINUE, STOPPED, without_start
from symhmm.infer.whiten import Whitening
from symhmm.tables.results import MEAN_LOG_POSTERIOR, Estimate, Optima, Status

WIDE = 1.5  # spread of the starts of chains, in posterior standard deviations


@dataclass(frozen=True)
class Options:
    """What `run` was asked for; see there."""

    chains: int = 4
    draws: int = 1000
    tune: int = 100
    noncentred: str = "'auto'"
    seed: int = 0
    restarts: int = 4
    target_accept: float = 0.7
    max_depth: int = 10


@dataclass(frozen=True, eq=False)
class State:
    """A run: where chains move, and the chains that are done by their place."""

    ground: Ground
    chains: Mapping[int, Chain]


def run(
    density: Density,
    *,
    chains: int = 4,
    draws: int = 1000,
    tune: int = 100,
    noncentred: Request = "auto",
    fix: Mapping[str, Any] | None = None,
    tie: Tie | None = None,
    order: Order | None = None,
    start: Mapping[str, Any] | None = None,
    seed: int = 0,
    restarts: int = 4,
    target_accept: float = 0.7,
    max_depth: int = 10,
    cores: int = 1,
    native: bool = False,
    progress: bool | Listener | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Estimate:
    """Draw from the posterior of parameters and continuous latents by the no-U-turn sampler.

    A ``pyro.param`` has no prior: it gets a flat one on its natural scale (as in Stan), which need not be proper; the
    status names it.

    Args:
        chains, draws, tune: number of chains, draws of each that are kept, and of its warm-up.
        noncentred: random effects in units of their spread: ``auto`` as far as their data are few, True for all and
            whatever the data say, False for none, or names of sites.
        fix: constrained values to hold, by name.
        tie: groups of parameters that are equal, as in `symhmm.infer.mle.run`; they have one flat prior together. Not latents,
            whose priors this would multiply.
        order: parameters and latents outside of plates that increase along their last axis, or a mapping from names to axes.
            Their prior is the program's own where they are in order, and nothing elsewhere.
        start: constrained values to start from, by name, instead of the program's own.
        seed: of everything random; a chain's numbers depend on it and the chain's place alone.
        restarts: climbs without random effects, from the best of which the pilot chain starts.
        target_accept: mean acceptance that the step size aims at; more is slower and safer.
        max_depth: doublings of a trajectory at most.
        cores: chains that run at the same time.
        native: whether the step is compiled to machine code first (`torch.compile`, which needs a C++ compiler and ten
            seconds or more). Small operations are played from tapes otherwise, which was as fast or faster where both were
            timed (up to 200 individuals of 500 steps); machine code may help where many operations are large.
        progress: as in `symhmm.infer.mle.run`.
        checkpoint: file that keeps the chains that are done; the same call continues, with the same numbers.

    Returns:
        medians as ``values``, the draws as ``posterior`` with a table of R-hat and effective sizes. Ctrl-C returns the draws
        so far.

    Raises:
        FitError: nothing to sample, an option out of range, nutpie is missing, a parameter whose support has no volume
            element, or latents that are tied or ordered within a plate.
    """
    began = time.perf_counter()
    options = Options(chains, draws, tune, repr(noncentred), seed, restarts, target_accept, max_depth)
    goal = target(density, fix or {}, "nuts", start, tie=tie, order=order)
    _check(goal, options)
    require_nutpie()
    file = Checkpoint(checkpoint, fingerprint(goal, "nuts", vars(options)) if checkpoint else "")
    saved = file.read()
    report = Reporter(progress, "nuts", chains * (tune + draws) + WARM_UP + DRAWS)
    state, stopped = None, False
    try:
        state = _restored(goal, noncentred, native, saved) if saved else init(goal, noncentred, options, native, report)
        if state is None:
            return without_start(goal, "nuts", MEAN_LOG_POSTERIOR, time.perf_counter() - began)
        file.write(_saved(state))
        state, stopped = step(state, options, cores, report, lambda s: file.write(_saved(s)))
    except KeyboardInterrupt:
        stopped = True
    finally:
        report.close()
    return _estimate(goal, state, options, stopped, began)


def init(goal: Target, request: Request, options: Options, native: bool, report: Reporter) -> State | None:
    """Find the posterior and the coordinates in which it is round; None if the density is finite nowhere."""
    found = pilot(
        goal,
        request,
        seed=_seed(options.seed, options.chains),
        restarts=options.restarts,
        target_accept=options.target_accept,
        max_depth=options.max_depth,
        native=native,
        tick=_ticks(report, 0),
    )
    return None if found is None else State(found, {})


def step(
    state: State, options: Options, cores: int, report: Reporter, keep: Callable[[State], None]
) -> tuple[State, bool]:
    """Run the chains that are missing; ``keep`` is called with the state after each. Says whether Ctrl-C ended it."""
    ground, missing = state.ground, [i for i in range(options.chains) if i not in state.chains]
    starts = []
    for i in missing:
        begin = starting_point(ground.evaluate, ground.where, np.random.default_rng([options.seed, i]), WIDE)
        if begin is None:
            raise FitError(
                "the density is not finite near the draws of the pilot chain.", suggestion="another seed, or start="
            )
        starts.append(begin)
    done = dict(state.chains)

    def finished(i: int, chain: Chain) -> None:
        done[missing[i]] = chain
        keep(State(ground, dict(done)))

    found, stopped = sample(
        ground.evaluate,
        ground.where,
        starts,
        [_seed(options.seed, i) for i in missing],
        tune=options.tune,
        draws=options.draws,
        target_accept=options.target_accept,
        max_depth=options.max_depth,
        cores=cores,
        tick=_ticks(report, WARM_UP + DRAWS + len(done) * (options.tune + options.draws)),
        done=finished,
    )
    return State(ground, done | {missing[i]: chain for i, chain in found.items()}), stopped


def _check(goal: Target, options: Options) -> None:
    for name, least in (("chains", 1), ("draws", 1), ("tune", 20), ("restarts", 1), ("max_depth", 1)):
        if getattr(options, name) < least:
            raise FitError(f"{name}={getattr(options, name)} must be at least {least}.", suggestion=f"leave {name} out")
    if not 0 < options.target_accept < 1:
        raise FitError(
            f"target_accept={options.target_accept} must lie between 0 and 1.", suggestion="target_accept=0.8"
        )
    if goal.start.dtype != torch.float64:
        raise FitError(
            "method='nuts' needs float64.",
            details=[f"the program's values are {goal.start.dtype}"],
            suggestion="torch.set_default_dtype(torch.float64) before the program and its data are made",
        )
    require_volumes(goal)
    _check_restriction(goal)


def _check_restriction(goal: Target) -> None:
    if goal.restriction is None:
        return
    ordered = dict(goal.restriction.order)
    limited = goal.free[goal.restriction.limited]
    for e in goal.entries:
        if not bool(((limited >= e.start) & (limited < e.stop)).any()):
            continue
        if not e.is_param and e.name not in ordered:
            raise FitError(
                f"tie= is for parameters, and {e.name!r} is a latent, whose priors this would multiply.",
                suggestion="one site in the program where there are two",
            )
        if e.plates:
            raise FitError(
                f"order= is for values of the states, and {e.name!r} is in the plate {', '.join(e.plates)!r}.",
                suggestion="the order of a value outside of plates",
            )


def _seed(seed: int, place: int) -> int:
    return int(np.random.SeedSequence([seed, place]).generate_state(1)[0])


def _ticks(report: Reporter, done: int) -> Callable[[], None]:
    def tick() -> None:
        nonlocal done
        done += 1
        report(done, float("nan"))

    return tick


def _estimate(goal: Target, state: State | None, options: Options, stopped: bool, began: float) -> Estimate:
    posterior, vector, optima, calls = None, goal.start, Optima(), 0
    log, error = torch.zeros(0, dtype=torch.float64), 0.0
    status = Status(False, STOPPED, ("before there were any draws: values are those of the start",), CONTINUE)
    if state is not None:
        optima, calls = state.ground.optima, state.ground.evaluate.calls
        with torch.no_grad():
            vector, _ = natural(state.ground.coordinates, torch.from_numpy(state.ground.where.centre))
        status = replace(status, causes=("before there were any draws: values are the middle of the pilot chain",))
    if state is not None and state.chains:
        every = [state.chains[i] for i in sorted(state.chains)]
        # After Ctrl-C: the whole chains; if there are none, what the first ones have in common.
        found = [c for c in every if len(c.points) == options.draws] or every
        kept = min(len(c.points) for c in found)
        pairs = [_draws(goal, state.ground, c.points[:kept], c.value[:kept]) for c in found]
        vectors, heights = (torch.stack(x) for x in zip(*pairs, strict=True))
        moved, switched = relabelled(goal.density, vectors, goal.entries)
        # States that are in an order already, or not alike because of what is tied, stay as they are.
        if goal.restriction is not None and not goal.restriction.holds(moved[..., goal.free]):
            moved, switched = vectors, 0
        posterior = draws(moved, found, goal.entries)
        vector, log = posterior.vector, heights.reshape(-1)
        error = float(log.std() / np.sqrt(agreement(heights[..., None].numpy())[1][0]))
        flat = [e.name for e in goal.entries if e.is_param]
        remarks = (f"no prior, so flat on the natural scale: {', '.join(flat)}",) if flat else ()
        if switched:
            remarks = (*remarks, f"the states of {switched} draws were put into the order of the others")
        status = verdict(posterior, found, remarks, options.max_depth)
        if stopped:
            so_far = f"{len(found)} of {options.chains} chains, {kept} draws each"
            status = Status(False, STOPPED, (so_far, status.reason, *status.causes), CONTINUE)
    with torch.no_grad():
        values = {n: v.detach() for n, v in goal.values(vector).items()}
    return Estimate(
        method="nuts",
        values=values,
        vector=vector,
        objective=float(log.mean()),
        objective_name=MEAN_LOG_POSTERIOR,
        error=error,
        trace=log,
        status=status,
        n_evaluations=calls,
        seconds=time.perf_counter() - began,
        counts={e.name: goal.counts[e.name] for e in goal.entries if not e.plates},
        optima=optima,
        posterior=posterior,
        fixed=tuple(goal.fixed),
        tie=() if goal.restriction is None else goal.restriction.tie,
        order=() if goal.restriction is None else goal.restriction.order,
    )


def _draws(goal: Target, ground: Ground, points: Array, value: Array) -> tuple[Tensor, Tensor]:
    """Unconstrained vectors of a chain's points, shape (draws, size), and their log-density on the natural scale, nats."""

    with torch.no_grad():
        vectors, volume = torch.func.vmap(lambda x: natural(ground.coordinates, x))(torch.from_numpy(points))
    return vectors, torch.from_numpy(value) - volume


def _saved(state: State) -> dict[str, Any]:
    ground = state.ground
    out: dict[str, Any] = {
        "information": ground.coordinates.information.numpy(),
        "peak": ground.coordinates.peak.numpy(),
        "signed": ground.coordinates.signed.numpy(),
        "centre": ground.where.centre,
        "root": ground.where.root,
        "optima": np.array([ground.optima.objectives, ground.optima.converged], dtype=float),
        "evaluations": np.array(ground.evaluate.calls),
        "chains": np.array(sorted(state.chains), dtype=int),
    }
    for i, chain in state.chains.items():
        out |= chain.arrays(f"chain{i}.")
    return out


def _restored(goal: Target, request: Request, native: bool, arrays: dict[str, Any]) -> State:
    constants = [torch.from_numpy(arrays[n]) for n in ("information", "peak", "signed")]
    coordinates = noncentred(goal, request).given(*constants)
    evaluate = Moving(goal, coordinates, native)
    evaluate.calls = int(arrays["evaluations"])
    objectives, converged = arrays["optima"].tolist()
    optima = Optima(tuple(objectives), tuple(map(bool, converged)), of=CLIMBS)
    ground = Ground(coordinates, Whitening(arrays["centre"], arrays["root"]), evaluate, optima)
    return State(ground, {int(i): chain_from(arrays, f"chain{i}.") for i in arrays["chains"]})
