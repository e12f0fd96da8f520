"""Warm start of a variational fit: the maximum without random effects, and the curvature there."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from symhmm.infer.guide import Block
from symhmm.infer.information import count_observations
from symhmm.infer.lbfgs import Ascent, ascend
from symhmm.infer.starts import draw_starts, scales, unrestricted
from symhmm.infer.target import Array, Target

ENOUGH = 200  # gradients per start: the neighbourhood is wanted, not the optimum
NARROWEST, WIDEST = 0.02, 1.0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a warm start: ``goal`` starts from the best point before it, ``ascents`` and ``evaluations`` as `warm_start`."""

    def __init__(self, goal: Target, ascents: list[Ascent], evaluations: int) -> None:
        super().__init__()
        self.goal, self.ascents, self.evaluations = goal, ascents, evaluations


def warm_start(goal: Target, *, seed: int, restarts: int) -> tuple[Target, list[Ascent], int]:
    """The target started from the best maximum over fixed effects with the random effects held at their start.

    Hyperparameters, on which the random effects' own prior depends, are held too: with the effects all equal, the
    density would rise without end as their spread goes to zero. States that start equal are told apart here, cheaply,
    by several jittered starts.

    Returns:
        the target, the ascents, the number of gradients used.

    Raises:
        Interrupted: on Ctrl-C; passes as the `KeyboardInterrupt` that it is, where nobody asks what there was before it.
    """
    random = {e.name for e in goal.entries if e.plates}
    held = goal.holding(random | hyperparameters(goal, random))
    free, kept = unrestricted(held)
    count = 0

    def evaluate(x: Array, at: Target = held) -> tuple[float, Array]:
        nonlocal count
        count += 1
        return at.evaluate(x)

    if held.size == 0:
        value, gradient = goal.evaluate(goal.x)
        return goal, [Ascent(goal.x, value, gradient, converged=True)], 1
    ascents: list[Ascent] = []

    def best() -> Target:
        found = max(ascents, key=lambda a: a.value, default=Ascent(held.x, -np.inf, np.zeros(held.size)))
        return goal.at(held.embed(torch.from_numpy(found.x).to(goal.start.dtype)))

    try:
        scale = scales(lambda x: evaluate(x, free), free.x, max(count_observations(goal.density), 1))
        for s in draw_starts(lambda x: evaluate(kept(x))[0], free.x, scale, restarts, seed=seed):
            ascents.append(ascend(evaluate, kept(s), tolerance=1e-2, max_evaluations=ENOUGH))
            if ascents[-1].interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise Interrupted(best(), ascents, count) from error
    return best(), ascents, count


def hyperparameters(goal: Target, random: set[str]) -> set[str]:
    """Fixed effects on which the prior of a random effect in ``random`` depends, read off the autograd graph."""
    with torch.enable_grad():
        leaves = {n: v.detach().clone().requires_grad_() for n, v in goal.values(goal.start).items()}
        graph = goal.density.graph_at(leaves)
        names = [e.name for e in goal.entries if e.name not in random]
        found = set()
        for f in graph.factors:
            if not names or f.name not in random or not f.term.data.requires_grad:
                continue
            gradients = torch.autograd.grad(
                f.term.data.sum(), [leaves[n] for n in names], allow_unused=True, retain_graph=True
            )
            found |= {n for n, g in zip(names, gradients, strict=True) if g is not None}
    return found


def curvature_units(goal: Target, points: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, int]:
    """Scale of each coordinate, shape (size,): ``1 / sqrt(curvature)`` at the start, from differences of the gradient.

    Members of a plate are moved together, so that a block costs as many gradients as one member has latents; points
    cost one each. Returns the number of gradients used as well.
    """
    unit = torch.ones_like(goal.start)
    whole = replace(goal, free=torch.arange(goal.start.numel()), restriction=None)
    x = whole.x
    here = whole.evaluate(x)[1]
    groups = [*points[:, None], *(b.index[:, d] for b in blocks for d in range(b.index.shape[1]))]
    for where in groups:
        i = where.numpy()
        moved = x.copy()
        moved[i] += 1e-4
        curvature = np.abs(whole.evaluate(moved)[1][i] - here[i]) / 1e-4
        scale = 1 / np.sqrt(np.maximum(curvature, 1e-12))
        unit[where] = torch.from_numpy(np.clip(np.nan_to_num(scale, nan=1.0), NARROWEST, WIDEST)).to(unit.dtype)
    return unit, len(groups) + 1
