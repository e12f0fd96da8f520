"""Pilot: a short chain that finds the posterior, and the coordinates in which the posterior is round."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from symhmm.compiler.layout import Entry
from symhmm.infer.lbfgs import ascend
from symhmm.infer.moving import Moving
from symhmm.infer.noncentred import Coordinates, Request, noncentred
from symhmm.infer.sampler import sample
from symhmm.infer.target import Array, Target
from symhmm.infer.warm import hyperparameters, warm_start
from symhmm.infer.whiten import LARGEST, Index, Whitening, curvature, whitening
from symhmm.tables.results import Optima

CLIMBS = "climbs without random effects, from the best of which the pilot chain starts"
PILOT = 100  # warm-up of the pilot chain, and its draws
LOOKS = 8  # draws of the pilot at which the curvature is measured
CLIMB = 200  # gradients of the climb to where the pilot begins


@dataclass(frozen=True, eq=False)
class Ground:
    """Where chains move.

    Args:
        coordinates: random effects in their own units.
        where: the free part of these, whitened.
        evaluate: log-density in the free coordinates and its gradient.
        optima: of the climbs without random effects.
    """

    coordinates: Coordinates
    where: Whitening
    evaluate: Moving
    optima: Optima


def pilot(
    goal: Target,
    request: Request,
    *,
    seed: int,
    restarts: int,
    target_accept: float,
    max_depth: int,
    native: bool,
    tick: Callable[[], None],
) -> Ground | None:
    """Find the posterior and the coordinates in which it is round; None if the density is finite nowhere.

    Ctrl-C goes through.
    """
    # Step 1: near the mode, with what the effects' prior depends on held, since a joint mode has spreads of zero.
    goal, ascents, _ = warm_start(goal, seed=seed, restarts=restarts)
    optima = Optima(tuple(a.value for a in ascents), tuple(a.converged for a in ascents), of=CLIMBS)
    if not np.isfinite(max(optima.objectives)):
        return None
    coordinates = noncentred(goal, request)
    evaluate = Moving(goal, coordinates, native)
    x = coordinates.back(goal.start).detach()[goal.free].numpy()
    held = hyperparameters(goal, {e.name for e in goal.entries if e.plates})
    moved = np.flatnonzero(np.isin(goal.free.numpy(), goal.holding(held).free.numpy()))
    x = _climb(evaluate, x, moved)
    # Step 2: a pilot chain in the metric of the curvature there.
    blocks = effects(goal)
    where = _whiten(evaluate, x[None], np.full(x.size, 0.1), blocks)
    begin = starting_point(evaluate, where, np.random.default_rng([seed, 0, 1]), 0.1)
    if begin is None:
        return None
    chains, interrupted = sample(
        evaluate, where, [begin], [seed], tune=PILOT, draws=PILOT, target_accept=target_accept, max_depth=max_depth,
        tick=tick,
    )  # fmt: skip
    if interrupted:
        raise KeyboardInterrupt
    # Step 3: centred as far as the data say, in the metric of the mean curvature.
    points = chains[0].points
    if request == "auto" and coordinates.names:
        coordinates, points = _informed(goal, coordinates, points, blocks)
        evaluate.move(coordinates)
    unit = np.clip(points.std(0), 1e-3, 1.0)
    where = _whiten(evaluate, points[_looks(points)], unit, blocks)
    return Ground(coordinates, where, evaluate, optima)


def starting_point(evaluate: Moving, where: Whitening, generator: np.random.Generator, spread: float) -> Array | None:
    """A point with a finite log-density and slope, drawn in the coordinates of ``where``; None if there is none nearby."""
    z = spread * generator.normal(size=where.centre.size)
    for _ in range(10):
        value, gradient = evaluate(where.point(z))
        if np.isfinite(value) and np.isfinite(gradient).all() and gradient.any():
            return z
        z = z / 2
    return None


def effects(goal: Target) -> list[Index]:
    """For each set of plates, positions of its members' effects among the free coordinates, shape (members, effects)."""
    place = np.full(goal.start.numel(), -1)
    place[goal.free.numpy()] = np.arange(goal.size)
    grouped: dict[tuple[str, ...], list[Index]] = {}
    for e in goal.entries:
        if e.plates:
            grouped.setdefault(tuple(sorted(e.plates)), []).append(place[_by_member(e, goal)])
    return [np.concatenate(found, axis=1) for found in grouped.values()]


def _by_member(e: Entry, goal: Target) -> Index:
    positions = np.arange(e.start, e.stop).reshape(e.free_shape)
    batch = len(e.shape) - goal.density.graph.latents[e.name].event_dim
    front = [batch + e.plates[p] for p in sorted(e.plates)]
    members = int(np.prod([positions.shape[i] for i in front]))
    return np.moveaxis(positions, front, range(len(front))).reshape(members, -1)


def _climb(evaluate: Moving, x: Array, moved: Index) -> Array:
    def part(y: Array) -> tuple[float, Array]:
        whole = x.copy()
        whole[moved] = y
        value, gradient = evaluate(whole)
        return value, gradient[moved]

    found = ascend(part, x[moved], tolerance=0.1, max_evaluations=CLIMB)
    out = x.copy()
    out[moved] = found.x
    return out


def _whiten(evaluate: Moving, points: Array, unit: Array, blocks: list[Index]) -> Whitening:
    """The metric of the mean curvature at ``points``, shape (looks, n)."""
    if points.shape[1] > LARGEST:
        return Whitening(points.mean(0), unit)
    found = [curvature(lambda x: evaluate(x)[1], x, unit, blocks)[0] for x in points]
    finite = [h for h in found if np.isfinite(h).all()]
    if not finite:
        return Whitening(points.mean(0), unit)
    return whitening(points.mean(0), np.mean(finite, axis=0))


def _informed(goal: Target, coordinates: Coordinates, points: Array, blocks: list[Index]) -> tuple[Coordinates, Array]:
    """Coordinates that suit the data, and the points in them."""
    free = goal.free
    with torch.no_grad():
        whole = torch.func.vmap(goal.embed)(torch.from_numpy(points))
        vectors = torch.func.vmap(lambda w: coordinates.forward(w)[0])(whole)
        precision = torch.func.vmap(coordinates.precisions)(vectors)
        evaluate = Moving(goal, coordinates.plain(), native=False)
        unit = np.clip(vectors[:, free].std(0).numpy(), 1e-3, 1.0)
        information = torch.zeros(len(vectors), goal.start.numel(), dtype=goal.start.dtype)
        looks = _looks(points)
        for k in looks:
            bend = torch.from_numpy(_diagonal(evaluate, vectors[k, free].numpy(), unit, blocks))
            information[k, free] = bend - precision[k, free]
        median = information[looks].median(0).values.clamp(min=0.0)
        coordinates = coordinates.informed(median, precision)
        return coordinates, torch.func.vmap(coordinates.back)(vectors)[:, free].numpy()


def _looks(points: Array) -> Index:
    """Draws at which to look at the curvature."""
    return np.linspace(0, len(points) - 1, LOOKS).astype(int)


def _diagonal(evaluate: Moving, x: Array, unit: Array, blocks: list[Index]) -> Array:
    """Curvature in each effect, shape (n,), by moving the members of a plate together; 1 outside of ``blocks``."""
    out = np.ones(x.size)
    for index in blocks:
        for d in range(index.shape[1]):
            h = np.zeros(x.size)
            h[index[:, d]] = 1e-4 * unit[index[:, d]]
            out[index[:, d]] = ((evaluate(x - h)[1] - evaluate(x + h)[1]) / (2 * np.where(h == 0, 1, h)))[index[:, d]]
    return out
