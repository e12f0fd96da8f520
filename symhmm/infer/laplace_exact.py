"""Beyond Laplace: quadrature or importance sampling around the modes, with the error that is left."""

from dataclasses import dataclass
from math import lgamma, log, pi

import numpy as np
import torch
from torch import Tensor

from symhmm.infer.laplace_members import Members
from symhmm.infer.laplace_modes import Modes

FREEDOM = 8.0  # degrees of freedom of the proposal: tails heavier than those of the effects
AT_ONCE = 64  # points in one batch


@dataclass(frozen=True, eq=False)
class Nodes:
    """Points around the modes and the log-weights with which they integrate a member's density.

    Args:
        points: shape (S, M, D), unconstrained effects.
        log_weight: shape (S, M): log integral of exp f ~ logsumexp(f + log_weight).
        kind: ``adaptive Gauss-Hermite`` or ``importance-weighted``.
        groups: number of independent groups of draws among the points; 1 for quadrature.
    """

    points: Tensor
    log_weight: Tensor
    kind: str
    groups: int


def nodes(modes: Modes, *, draws: int = 2000, grid: int = 15, seed: int = 0, quadrature: int = 2) -> Nodes:
    """Adaptive Gauss-Hermite nodes (Liu and Pierce 1994) for one or two effects, draws from a multivariate t for more.

    Draws come in antithetic pairs, which removes what is odd about the mode. ``quadrature`` is the largest number of
    effects for which a grid is made.
    """
    m, d = modes.u.shape
    volume = torch.linalg.slogdet(modes.root).logabsdet
    if d <= quadrature:
        x, w = (torch.from_numpy(a).to(modes.u.dtype) for a in np.polynomial.hermite_e.hermegauss(grid))
        mesh = torch.cartesian_prod(*[x] * d).reshape(-1, d)
        weight = torch.cartesian_prod(*[w.log()] * d).reshape(-1, d).sum(-1) + 0.5 * mesh.square().sum(-1)
        points = modes.u + torch.einsum("mij,sj->smi", modes.root, mesh)
        return Nodes(points, weight[:, None] + volume, "adaptive Gauss-Hermite", 1)
    generator = torch.Generator().manual_seed(seed)
    half = max(draws // 2, 1)
    normal = torch.randn(half, m, d, generator=generator, dtype=modes.u.dtype)
    # A chi-square of even degrees of freedom is a sum of exponentials.
    uniform = torch.rand(half, m, int(FREEDOM) // 2, generator=generator, dtype=modes.u.dtype)
    chi = -2 * uniform.clamp(min=1e-300).log().sum(-1)
    t = normal * (FREEDOM / chi).sqrt()[..., None]
    log_q = (
        lgamma((FREEDOM + d) / 2)
        - lgamma(FREEDOM / 2)
        - 0.5 * d * log(FREEDOM * pi)
        - 0.5 * (FREEDOM + d) * torch.log1p(t.square().sum(-1) / FREEDOM)
    )
    move = torch.einsum("mij,smj->smi", modes.root, t)
    points = torch.stack([modes.u + move, modes.u - move], 1).reshape(2 * half, m, d)
    weight = (volume - log_q - log(2 * half)).repeat_interleave(2, 0)
    return Nodes(points, weight, "importance-weighted", half)


def integral(members: Members, theta: Tensor, at: Nodes) -> tuple[float, float]:
    """Log-density with the effects integrated over ``at`` and its standard error, nats.

    The error of quadrature is the difference from its own middle half of nodes in each direction, which is an upper
    bound in practice; that of draws is the delta method's over antithetic pairs.
    """
    terms = _values(members, theta, at.points) + at.log_weight
    total, rest = terms.logsumexp(0), members.rest_and_gradient(theta, at.points[0])[0]
    value = float(total.sum() + rest)
    if at.groups == 1:
        return value, 0.0
    share = (terms - total).exp().reshape(at.groups, -1, terms.shape[1]).sum(1) * at.groups
    return value, float((share.var(0) / at.groups).sum().sqrt())


def integral_and_gradient(members: Members, theta: Tensor, at: Nodes) -> tuple[Tensor, Tensor]:
    """The same with nodes held still: value, shape (), and its gradient in theta, shape (P,)."""
    terms = _values(members, theta, at.points) + at.log_weight
    total = terms.logsumexp(0)
    share = (terms - total).exp()
    rest, gradient = members.rest_and_gradient(theta, at.points[0])
    for points, weight in _batches(at.points, share):
        gradient = gradient + members.weighted(theta, points, weight)[0]
    return total.sum() + rest, gradient


def _values(members: Members, theta: Tensor, points: Tensor) -> Tensor:
    unused = points.new_zeros(points.shape[:2])
    values = [members.value(theta, batch) for batch, _ in _batches(points, unused)]
    return torch.cat(values)[: points.shape[0]]


def _batches(points: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Batches of one size, so that one captured step serves them all; the last is filled up at weight zero."""
    size = min(AT_ONCE, points.shape[0])
    missing = -points.shape[0] % size
    if missing:
        points = torch.cat([points, points[-1:].expand(missing, -1, -1)])
        weight = torch.cat([weight, weight.new_zeros(missing, weight.shape[1])])
    return list(zip(points.split(size), weight.split(size), strict=True))
