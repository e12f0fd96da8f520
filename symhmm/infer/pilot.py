"""Pilot: a short chain that finds the posterior, and the coordinates in which the posterior is round."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from symhmm.compiler.layout import Entry
from symhmm.infer.lbfgs import ascend
from symhmm.infer.moving import Moving
from symhmm.infer.noncentred import LEAST, Coordinates, Request, noncentred
from symhmm.infer.sampler import sample
from symhmm.infer.target import Array, Target
from symhmm.infer.warm import hyperparameters, warm_start
from symhmm.infer.whiten import LARGEST, Index, Whitening, curvature, whitening
from symhmm.tables.results import Optima

CLIMBS = "climbs without random effects, from the best of which the pilot chain starts"
WARM_UP = 60  # of the pilot chain
DRAWS = 40  # of the pilot chain
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
    x = goal.coordinates(coordinates.back(goal.start).detach()).numpy()
    held = hyperparameters(goal, {e.name for e in goal.entries if e.plates})
    moved = np.flatnonzero(np.isin(goal.moved.numpy(), goal.holding(held).free.numpy()))
    x = _climb(evaluate, x, moved)
    # Step 2: a pilot chain in the metric of the curvature there.
    blocks, unit = effects(goal), np.full(x.size, 0.1)
    by_data = request == "auto" and bool(coordinates.names)
    if by_data:
        coordinates, x = _informed(coordinates, x[None], unit, blocks)
        evaluate.move(coordinates)
        x = x[0]
    where = _whiten(evaluate, x[None], unit, blocks)
    begin = starting_point(evaluate, where, np.random.default_rng([seed, 0, 1]), 0.1)
    if begin is None:
        return None
    chains, interrupted = sample(
        evaluate, where, [begin], [seed], tune=WARM_UP, draws=DRAWS, target_accept=target_accept, max_depth=max_depth,
        tick=tick,
    )  # fmt: skip
    _pass_on(interrupted)
    # Step 3: what the data say of the effects, in the metric of the mean curvature.
    points = chains[0].points
    if by_data:
        coordinates, points = _informed(coordinates, points, np.clip(points.std(0), 1e-3, 1.0), blocks)
        evaluate.move(coordinates)
    where = _whiten(evaluate, points[_looks(points)], np.clip(points.std(0), 1e-3, 1.0), blocks)
    return Ground(coordinates, where, evaluate, optima)


def _pass_on(interrupted: bool) -> None:
    """Ctrl-C ended a part of the pilot, which is of no use without the rest."""
    if interrupted:
        raise KeyboardInterrupt


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
    """For each set of plates, positions of its members' effects among the moved coordinates, shape (members, effects)."""
    place = np.full(goal.start.numel(), -1)
    place[goal.moved.numpy()] = np.arange(goal.size)
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
    _pass_on(found.interrupted)
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


def _informed(coordinates: Coordinates, points: Array, unit: Array, blocks: list[Index]) -> tuple[Coordinates, Array]:
    """Coordinates that suit the data, from slope and curvature of their log-density in the effects; the points in them."""
    goal = coordinates.goal
    evaluate = Moving(goal, coordinates.plain(), native=False)
    with torch.no_grad():
        vectors = torch.func.vmap(lambda x: coordinates.forward(goal.embed(x))[0])(torch.from_numpy(points))
        locations, spread = torch.func.vmap(coordinates.priors)(vectors)
        precision, pull = torch.zeros(2, goal.start.numel(), dtype=goal.start.dtype).unbind()
        looks = _looks(points)
        for k in looks:
            x = goal.coordinates(vectors[k]).numpy()
            loc, own = locations[k], spread[k]
            here = torch.zeros_like(own)
            here[goal.moved] = torch.from_numpy(_diagonal(evaluate, x, unit, blocks))
            here -= own
            slope = torch.zeros_like(own)
            slope[goal.moved] = torch.from_numpy(evaluate(x)[1])
            precision += here / len(looks)
            pull += (here * vectors[k] + slope - own * (loc - vectors[k])) / len(looks)
        precision = torch.where(precision > LEAST * (precision + spread.median(0).values), precision, 0.0)
        coordinates = coordinates.informed(precision, torch.where(precision > 0, pull / precision, 0.0))
        if len(points) > 1:
            coordinates = coordinates.with_signs(spread)
        moved = torch.func.vmap(coordinates.back)(vectors)
        return coordinates, torch.stack([goal.coordinates(w) for w in moved]).numpy()


def _looks(points: Array) -> Index:
    """Draws at which to look at the curvature."""
    return np.unique(np.linspace(0, len(points) - 1, LOOKS).astype(int))


def _diagonal(evaluate: Moving, x: Array, unit: Array, blocks: list[Index]) -> Array:
    """Curvature in each effect, shape (n,), by moving the members of a plate together; 1 outside of ``blocks``."""
    out = np.ones(x.size)
    for index in blocks:
        for d in range(index.shape[1]):
            h = np.zeros(x.size)
            h[index[:, d]] = 1e-4 * unit[index[:, d]]
            out[index[:, d]] = ((evaluate(x - h)[1] - evaluate(x + h)[1]) / (2 * np.where(h == 0, 1, h)))[index[:, d]]
    return out
