"""Modes: where a guide begins that follows the population's values, and what the data say of each effect there.

The numbers of a guide's likelihoods are hard to learn from draws: where a spread is small they hardly matter, so that noise
carries them away, and where the draws make it large they matter much. Curvature at the mode, with the spreads held at
their start, gives them without noise.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from symhmm.infer.guide import Block, Prior
from symhmm.infer.lbfgs import ascend
from symhmm.infer.target import Array, Target

ENOUGH = 150  # gradients for the mode: the neighbourhood is wanted
LEAST = 0.05  # of an effect's precision that is taken as the data's
STEP = 1e-4  # of differences of the gradient


def settled(goal: Target, held: set[str]) -> tuple[Target, int]:
    """The target started from the joint mode of the unconstrained values, those of ``held`` excepted; gradients used."""
    moving = goal.holding(held)

    def evaluate(x: Array) -> tuple[float, Array]:
        u = torch.from_numpy(x).to(goal.start.dtype)
        value, gradient = _with_volume(moving, moving.embed(u))
        return value, moving.pulled_back(u, gradient).double().numpy()

    found = ascend(evaluate, moving.x, tolerance=1e-2, max_evaluations=ENOUGH)
    if found.interrupted:
        raise KeyboardInterrupt
    return goal.at(moving.embed(torch.from_numpy(found.x).to(goal.start.dtype))), len(found.trace)


def likelihood(goal: Target, block: Block, prior: Prior) -> tuple[Tensor, Tensor]:
    """Normal likelihood of each member's effects at the start: locations (M, D), roots of the precisions (M, D, D).

    The precision is that of the whole density, by differences of its gradient with all members moved together, less that
    of the prior, and at least a small share of the whole.
    """
    vector, index = goal.start, block.index
    whole = replace(goal, free=torch.arange(vector.numel()), restriction=None)
    here, columns = _with_volume(whole, vector)[1][index], []
    for d in range(index.shape[1]):
        moved = vector.clone()
        moved[index[:, d]] += STEP
        columns.append((here - _with_volume(whole, moved)[1][index]) / STEP)
    curvature, unit = torch.stack(columns, -1), block.unit
    scaled = _positive(unit[:, :, None] * (curvature + curvature.mT) / 2 * unit[:, None, :])
    root = torch.linalg.cholesky(scaled) / unit[:, :, None]
    s = prior.log_scale.exp()
    precision = s[..., None] * prior.correlation * s[..., None, :]
    left = torch.linalg.solve_triangular(root, precision, upper=False)
    share = torch.linalg.solve_triangular(root, left.mT, upper=False)
    data = root @ _positive(torch.eye(index.shape[1]).to(share) - (share + share.mT) / 2) @ root.mT
    pull = here + (precision @ (vector[index] - prior.loc)[..., None])[..., 0]
    return vector[index] + torch.linalg.solve(data, pull[..., None])[..., 0], torch.linalg.cholesky(data)


def _positive(matrices: Tensor) -> Tensor:
    """Symmetric matrices with eigenvalues of at least `LEAST`; the identity where they are not finite."""
    bad = ~matrices.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(bad, torch.eye(matrices.shape[-1]).to(matrices), matrices))
    return vectors @ torch.diag_embed(values.clamp(min=LEAST)) @ vectors.mT


def _with_volume(goal: Target, vector: Tensor) -> tuple[float, Tensor]:
    """Log-density of the unconstrained values, nats, and its gradient by the whole vector, shape (size,)."""
    whole = replace(goal, free=torch.arange(vector.numel()), restriction=None)
    value, gradient = whole.evaluate(vector.double().numpy())
    with torch.enable_grad():
        leaf = vector.detach().clone().requires_grad_()
        volume = goal.log_abs_det_jacobian(leaf)
        slope = torch.autograd.grad(volume, leaf)[0] if volume.requires_grad else torch.zeros_like(leaf)
    return value + float(volume.detach()), torch.from_numpy(np.asarray(gradient)).to(vector.dtype) + slope
