"""Arrows: which random effects follow the population's values, and how their prior does, read off the density."""

from dataclasses import replace

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry
from symhmm.infer.guide import LARGEST_FULL, Block, Prior
from symhmm.infer.minibatch import Minibatches, with_members
from symhmm.infer.modes import LEAST, likelihood
from symhmm.infer.target import Target
from symhmm.infer.warm import hyperparameters

STEP = 1e-4  # of the differences by which the prior's slopes are found
FURTHER = 0.1  # of a value, to see what depends on it


def following(
    goal: Target, blocks: tuple[Block, ...], unit: Tensor, batches: Minibatches | None
) -> tuple[tuple[Block, ...], Tensor]:
    """Let ``full`` blocks of effects follow the population's values, where the program has any with a prior.

    Returns:
        the blocks, and the units of shape (size,), those of effects now of their likelihood alone.
    """
    if not can_follow(blocks):
        return blocks, unit
    out, unit = [blocks[0]], unit.clone()
    moving = _moving(goal)
    for b in blocks[1:]:
        if b.family == "full":
            prior = _prior(goal, b, blocks[0], moving, batches)
            if batches is None:
                own, root = likelihood(goal, b.scaled(unit, b.family), prior)
            else:  # all members at once would be a pass over all data for each gradient
                whole = unit[b.index].square().reciprocal()
                precision = (2 * prior.log_scale).exp() * prior.correlation.diagonal(dim1=-2, dim2=-1)
                own, root = goal.start[b.index], torch.maximum(whole - precision, LEAST * whole).sqrt().diag_embed()
            unit[b.index] = torch.cholesky_inverse(root).diagonal(dim1=-2, dim2=-1).sqrt()
            b = replace(b, prior=replace(prior, own=own, root=root, known=batches is None))
        out.append(b)
    return tuple(out), unit


def can_follow(blocks: tuple[Block, ...]) -> bool:
    """Whether there are effects, and values of the population that are few enough to be followed."""
    return len(blocks) > 1 and not blocks[0].plates and blocks[0].index.numel() <= LARGEST_FULL


def spreads(goal: Target, blocks: tuple[Block, ...]) -> set[str]:
    """Names of values that change how far the effects of ``full`` blocks lie apart.

    Held at these the density has a mode. Where effects have another prior than a normal one, all values that it depends on.
    """
    names = {n for b in blocks for n in b.names if b.family == "full"}
    moving, found = _moving(goal), set[str]()
    for e in (e for e in goal.entries if e.plates and e.name in names and moving):
        (block,) = (b for b in blocks if e.name in b.names)
        columns = ((block.index[0] >= e.start) & (block.index[0] < e.stop)).nonzero()[:, 0]
        index = block.index[:, columns]
        if not _is_normal(goal, [goal.density], goal.start, e, index):
            return moving
        here = _moments(goal, [goal.density], goal.start, e, index)[1]
        for x in (x for x in goal.entries if x.name in moving):
            moved = goal.start.clone()
            moved[x.start : x.stop] += FURTHER
            if not torch.allclose(_moments(goal, [goal.density], moved, e, index)[1], here, rtol=1e-6):
                found.add(x.name)
    return found


def _moving(goal: Target) -> set[str]:
    """Values on which the effects' priors depend."""
    random = {e.name for e in goal.entries if e.plates}
    return hyperparameters(goal, random) if goal.density.compiled.mode != "eager" else set()


def _prior(goal: Target, block: Block, population: Block, moving: set[str], batches: Minibatches | None) -> Prior:
    """The prior of a block's effects at the start, with its derivatives by the population's values."""
    (m, d), at = block.index.shape, population.index[0]
    u = goal.start
    loc, log_scale, root = u[block.index].clone(), u.new_zeros(m, d), u.new_zeros(m, d, d)
    loc_slope, log_slope = u.new_zeros(2, m, d, at.numel()).unbind()
    moved = {i for n in moving for i in range(goal.density.layout[n].start, goal.density.layout[n].stop)}
    for e in (e for e in goal.entries if e.name in block.names and moved):
        columns = ((block.index[0] >= e.start) & (block.index[0] < e.stop)).nonzero()[:, 0]
        index, densities = block.index[:, columns], _densities(goal, batches)
        if not _is_normal(goal, densities, u, e, index):
            continue
        here, precision = _moments(goal, densities, u, e, index)
        scale = precision.diagonal(dim1=-2, dim2=-1).sqrt()
        loc[:, columns], log_scale[:, columns] = here, scale.log()
        root[:, columns[:, None], columns] = precision / scale[:, :, None] / scale[:, None, :]
        for k, i in ((k, i) for k, i in enumerate(at.tolist()) if i in moved):
            step = u.new_zeros(u.shape)
            step[i] = STEP
            there, other = _moments(goal, densities, u + step, e, index)
            loc_slope[:, columns, k] = (there - here) / STEP
            log_slope[:, columns, k] = (other.diagonal(dim1=-2, dim2=-1).sqrt().log() - scale.log()) / STEP
    return Prior(loc, loc_slope, log_scale, log_slope, root, u[block.index], root)


def _densities(goal: Target, batches: Minibatches | None) -> list[Density]:
    """The density, or that of each batch of a partition."""
    if batches is None:
        return [goal.density]
    return [with_members(goal.density, batches.plate, chosen) for chosen in batches.partition()]


def _is_normal(goal: Target, densities: list[Density], u: Tensor, e: Entry, index: Tensor) -> bool:
    """Whether the slope of the effect's prior is a straight line, the same wherever other effects are."""
    loc, precision = _moments(goal, densities, u, e, index)
    generator = torch.Generator().manual_seed(0)
    r = torch.randn(index.shape, generator=generator, dtype=u.dtype)
    wanted = (precision @ (loc - r)[..., None])[..., 0]
    other = u.clone()
    for x in (x for x in goal.entries if x.plates and x.name != e.name):
        other[x.start : x.stop] += torch.rand(x.stop - x.start, generator=generator, dtype=u.dtype)
    straight = all(
        torch.allclose(_slope(goal, densities, v, e, index, r), wanted, rtol=1e-6, atol=1e-6) for v in (u, other)
    )
    return straight and bool((torch.linalg.eigvalsh((precision + precision.mT) / 2) > 0).all())


def _moments(goal: Target, densities: list[Density], u: Tensor, e: Entry, index: Tensor) -> tuple[Tensor, Tensor]:
    """Location and precision of an effect's normal prior, shapes (M, d) and (M, d, d)."""
    m, d = index.shape
    zero = u.new_zeros(m, d)
    first = _slope(goal, densities, u, e, index, zero)
    precision = torch.stack([first - _slope(goal, densities, u, e, index, zero + x) for x in torch.eye(d).to(u)], -1)
    # Not every prior is normal, nor every slope finite: `_is_normal` looks at what this gives.
    return torch.linalg.solve_ex(precision, first[..., None])[0][..., 0], precision


def _slope(goal: Target, densities: list[Density], u: Tensor, e: Entry, index: Tensor, x: Tensor) -> Tensor:
    """Gradient of the effect's own prior, volume change included, at unconstrained effects ``x`` of shape (M, d)."""
    total = torch.zeros_like(x)
    for density in densities:
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            vector = u.index_put((index.reshape(-1),), leaf.reshape(-1))
            graph = density.factors_at(goal.values(vector))
            prior = next(f for f in graph.factors if f.name == e.name).term.data.sum()
            (slope,) = torch.autograd.grad(prior, leaf, allow_unused=True, materialize_grads=True)
        # A member that is in two batches says the same in both.
        total = torch.where(slope != 0, slope, total)
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        free = u.index_put((index.reshape(-1),), leaf.reshape(-1))[e.start : e.stop].reshape(e.free_shape)
        change = e.transform.log_abs_det_jacobian(free, e.transform(free)).sum()
        if change.requires_grad:
            (slope,) = torch.autograd.grad(change, leaf, allow_unused=True, materialize_grads=True)
            total = total + slope
    return total
