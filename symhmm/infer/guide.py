"""Guide: the variational family, chosen by role: parameters are points, latents get normals where they are free."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import log, pi, prod

import torch
from torch import Tensor

from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.graph import FactorGraph
from symhmm.tables.results import Normal, Posterior

LARGEST_FULL = 200  # latents per member beyond which a covariance costs more than it is worth


@dataclass(frozen=True, eq=False)
class Block:
    """The latents of one plate: a normal distribution for each member, independent between members.

    Args:
        plates: whose members they are; empty for fixed effects with a prior, which form one member.
        names: the sites.
        index: shape (M, D), positions in the density's vector, one row per member.
        full: full covariance of the D latents of a member, or only their variances.
        unit: shape (M, D), the scale on which they are moved (about one posterior standard deviation).
        triangle: shape (D * D,), for each entry of W its position in (0, rows of the strict lower triangle).
    """

    plates: tuple[str, ...]
    names: tuple[str, ...]
    index: Tensor
    full: bool
    unit: Tensor
    triangle: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Free numbers of the block: means, log standard deviations, correlations."""
        m, d = self.index.shape
        return m * d, m * d, m * d * (d - 1) // 2 if self.full else 0


@dataclass(frozen=True, eq=False)
class Guide:
    """A distribution over whole vectors: ``point`` positions are moved as they are, ``blocks`` are drawn.

    Its own free numbers are one vector ``phi`` = steps of the points, then for each block steps of the means, changes
    of the log standard deviations s, and rows of the strictly lower triangle W of ``scale_tril = diag(s) (I + W)``.
    All of them are zero at the start: mean ``origin`` and standard deviation ``unit``.

    Args:
        origin: shape (size,), the start.
        points: shape (P,), positions of the parameters.
        unit: shape (P,), the scale on which they are moved.
        blocks: of the latents.
        rest: positions that do not move.
        order: shape (size,), where each position is found in (points, blocks, rest).
    """

    origin: Tensor
    points: Tensor
    unit: Tensor
    blocks: tuple[Block, ...]
    rest: Tensor
    order: Tensor

    @property
    def size(self) -> int:
        """Length of ``phi``."""
        return self.points.numel() + sum(sum(b.sizes) for b in self.blocks)

    @property
    def noise_size(self) -> int:
        """Length of the standard normal vector from which one draw is made."""
        return sum(b.index.numel() for b in self.blocks)

    def initial(self) -> Tensor:
        """The start, shape (size,)."""
        return self.origin.new_zeros(self.size)

    def draw(self, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A vector, shape (density size,), and its log-density under the guide, nats.

        The log-density is that of the guide held fixed at ``phi``, so that gradients reach it through the draw alone:
        then they have no noise where the guide is the posterior (Roeder, Wu and Duvenaud 2017).
        """
        moved, used, log_q = [self.origin[self.points] + self.unit * phi[: self.points.numel()]], 0, phi.new_zeros(())
        for b, (loc, scale_tril) in zip(self.blocks, self.moments(phi), strict=True):
            m, d = b.index.shape
            e = noise[used : used + m * d].reshape(m, d, 1)
            used += m * d
            u = loc + (scale_tril @ e)[..., 0]
            held = scale_tril.detach()
            back = torch.linalg.solve_triangular(held, (u - loc.detach())[..., None], upper=False)
            log_q = (
                log_q
                - 0.5 * back.square().sum()
                - held.diagonal(dim1=-2, dim2=-1).log().sum()
                - 0.5 * m * d * log(2 * pi)
            )
            moved.append(u.reshape(-1))
        return self.place(moved), log_q

    def member_log_density(self, phi: Tensor, noise: Tensor) -> list[Tensor]:
        """Log-density of each block's members at the draw made from ``noise``, shapes (M,), nats."""
        out, used = [], 0
        for b, (_, scale_tril) in zip(self.blocks, self.moments(phi), strict=True):
            m, d = b.index.shape
            e = noise[used : used + m * d].reshape(m, d)
            used += m * d
            logs = scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
            out.append(-0.5 * e.square().sum(-1) - logs - 0.5 * d * log(2 * pi))
        return out

    def mean(self, phi: Tensor) -> Tensor:
        """The vector of points and means, shape (density size,)."""
        points = self.origin[self.points] + self.unit * phi[: self.points.numel()]
        return self.place([points, *(loc.reshape(-1) for loc, _ in self.moments(phi))])

    def moments(self, phi: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Mean, shape (M, D), and Cholesky factor of the covariance, shape (M, D, D), of each block."""
        out, k = [], self.points.numel()
        for b in self.blocks:
            m, d = b.index.shape
            pieces = phi[k : k + sum(b.sizes)].split(list(b.sizes))
            k += sum(b.sizes)
            loc = self.origin[b.index] + b.unit * pieces[0].reshape(m, d)
            scale = b.unit * pieces[1].reshape(m, d).exp()
            if b.sizes[2]:
                padded = torch.cat([b.unit.new_zeros(m, 1), pieces[2].reshape(m, -1)], dim=1)
                out.append(
                    (loc, scale[..., None] * (padded[:, b.triangle].reshape(m, d, d) + b.unit.new_ones(d).diag()))
                )
            else:
                out.append((loc, torch.diag_embed(scale)))
        return out

    def posterior(self, phi: Tensor) -> Posterior:
        """The guide at ``phi`` as a result."""
        blocks = zip(self.blocks, self.moments(phi), strict=True)
        return Posterior(self.mean(phi), tuple(Normal(b.plates, b.index, loc, tril) for b, (loc, tril) in blocks))

    def place(self, moved: list[Tensor]) -> Tensor:
        """Put points and latents, in the order of the guide, into their positions in the vector."""
        return torch.cat([*moved, self.origin[self.rest]])[self.order]


def guide(origin: Tensor, points: Tensor, blocks: tuple[Block, ...], unit: Tensor) -> Guide:
    """A guide that starts at ``origin``, with steps and first standard deviations ``unit``, both of shape (size,)."""
    moved = torch.cat([points, *(b.index.reshape(-1) for b in blocks)])
    still = torch.ones(origin.numel(), dtype=torch.bool)
    still[moved] = False
    rest = still.nonzero()[:, 0]
    own = tuple(replace(b, unit=unit[b.index]) for b in blocks)
    return Guide(origin, points, unit[points], own, rest, torch.argsort(torch.cat([moved, rest])))


def blocks_by_role(entries: Iterable[Entry], graph: FactorGraph, family: str) -> tuple[Block, ...]:
    """Group the latents: one block for each set of plates, one for the fixed effects with a prior.

    Args:
        entries: those that are not fixed.
        family: ``full`` (a full covariance per member up to 200 latents) or ``meanfield``.

    Raises:
        FitError: there is no such family.
    """
    if family not in ("full", "meanfield"):
        raise FitError(f"there is no guide {family!r}.", suggestion="guide='full' or guide='meanfield'")
    grouped: dict[tuple[str, ...], list[Entry]] = {}
    for e in entries:
        if not e.is_param:
            grouped.setdefault(tuple(sorted(e.plates)), []).append(e)
    out = []
    for plates, members in grouped.items():
        index = torch.cat([_by_member(e, plates, graph.latents[e.name].event_dim) for e in members], dim=1)
        full = family == "full" and index.shape[1] <= LARGEST_FULL
        names = tuple(e.name for e in members)
        out.append(Block(plates, names, index, full, torch.ones(index.shape), _triangle(index.shape[1])))
    return tuple(out)


def _triangle(d: int) -> Tensor:
    where = torch.zeros(d, d, dtype=torch.long)
    row, column = torch.tril_indices(d, d, -1)
    where[row, column] = torch.arange(1, row.numel() + 1)
    return where.reshape(-1)


def _by_member(e: Entry, plates: tuple[str, ...], event_dim: int) -> Tensor:
    """Positions of an entry's numbers, shape (members, numbers each), members in the order of the sorted plates."""
    positions = torch.arange(e.start, e.stop).reshape(e.free_shape)
    n_batch = len(e.shape) - event_dim
    front = [n_batch + e.plates[p] for p in plates]
    rest = [i for i in range(positions.dim()) if i not in front]
    members = prod(positions.shape[i] for i in front)
    return positions.permute([*front, *rest]).reshape(members, -1)
