"""Guide: the variational family, chosen by role: parameters are points, latents get normals where they are free."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log, pi, prod, sqrt

import torch
from torch import Tensor

from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.graph import FactorGraph
from symhmm.infer.points import Points
from symhmm.tables.arrow import Given, Law, arrow
from symhmm.tables.bent import Bends, Bent
from symhmm.tables.results import Normal, Posterior

LARGEST_FULL = 200  # latents per member beyond which a full covariance costs more than it is worth
LOADING = 0.1  # first size of the loadings of a low-rank covariance, in units; at zero their gradient is zero
SLOWER = (
    0.1  # share of the rate at which slopes in the population's values move: they are many, and their noise adds up
)
STEADY = 0.3  # the same for likelihoods that are known from the curvature, since noise carries away what matters little
BENT = (2.0, 1.5)  # largest skew, and logarithm of the lightest and heaviest tail
FAMILIES = ("full", "meanfield", "low_rank")


@dataclass(frozen=True, eq=False)
class Prior:
    """How the normal prior of a block's effects follows the population's values t, near the start: see `Law`.

    Args:
        loc: at the start, shape (M, D); ``loc_slope`` of shape (M, D, K) its derivative by t.
        log_scale: half the logarithm of the precisions there, shape (M, D), with ``log_scale_slope``.
        correlation: shape (M, D, D), the precision in these units, zero where the prior is not normal.
        own: shape (M, D), where the likelihood lies; ``root`` of shape (M, D, D) is the root of its precision.
        known: whether these come from the density, and are but corrected.
    """

    loc: Tensor
    loc_slope: Tensor
    log_scale: Tensor
    log_scale_slope: Tensor
    correlation: Tensor
    own: Tensor
    root: Tensor
    known: bool = False


@dataclass(frozen=True, eq=False)
class Block:
    """The latents of one plate: a normal distribution for each member, independent between members.

    Args:
        plates: whose members they are; empty for fixed effects with a prior, which form one member.
        members: of each plate; M is their product.
        names: the sites.
        index: shape (M, D), positions in the density's vector, one row per member.
        family: ``full`` covariance of the D latents of a member, their variances only (``meanfield``), variances and
            ``rank`` common factors (``low_rank``), or variances that a ``network`` predicts.
        unit: shape (M, D), the scale on which they are moved (about one posterior standard deviation).
        prior: by which a ``full`` block depends on the population's values; None if it is independent of them.
        bent: whether each latent has a skew and tails of its own.
    """

    plates: tuple[str, ...]
    members: tuple[int, ...]
    names: tuple[str, ...]
    index: Tensor
    family: str
    rank: int
    unit: Tensor
    prior: Prior | None = None
    bent: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Free numbers of the block: means, log standard deviations, correlations or loadings, slopes in the population,
        skews, tails."""
        m, d = self.index.shape
        if self.family == "network":
            return 0, 0, 0, 0, 0, 0
        more = {"full": m * d * (d - 1) // 2, "meanfield": 0, "low_rank": m * d * self.rank}
        slopes = 0 if self.prior is None else self.prior.loc_slope.numel()
        bends = m * d * (self.bent or self.prior is not None)
        return m * d, m * d, more[self.family], slopes, bends, bends

    @property
    def noise_size(self) -> int:
        """Standard normal numbers from which one draw is made."""
        m, d = self.index.shape
        return m * (d + self.rank)

    @property
    def owners(self) -> Tensor:
        """The member to which each free number belongs, shape (sum(sizes),)."""
        m = self.index.shape[0]
        return torch.cat([torch.arange(m).repeat_interleave(size // m) for size in self.sizes])

    def scaled(self, unit: Tensor, family: str) -> "Block":
        """The same block with the scale of each position, shape (size,), and another family."""
        return replace(self, unit=unit[self.index], family=family)


@dataclass(frozen=True, eq=False)
class Moments:
    """A block's normal distributions: mean and root (M, D, D), lower triangular, or for ``low_rank`` deviations and loadings.

    Args:
        loc: shape (M, D).
        scale: shape (M, D), diagonal of the root, or the members' own deviations in a low-rank covariance.
        root: shape (M, D, D) or None.
        loadings: shape (M, D, R) or None.
        bends: of shape (M, D), or None; then ``loc`` are medians.
    """

    loc: Tensor
    scale: Tensor
    root: Tensor | None = None
    loadings: Tensor | None = None
    bends: Bends | None = None

    def draw(self, noise: Tensor) -> Tensor:
        """Latents from a block's share of the noise, shape (M, D)."""
        m, d = self.loc.shape
        e = noise[: m * d].reshape(m, d)
        if self.root is not None:
            e = (self.root @ e[..., None])[..., 0] / self.scale
        if self.bends is not None:
            e = self.bends(e)
        out = self.loc + self.scale * e
        if self.loadings is not None:
            out = out + (self.loadings @ noise[m * d :].reshape(m, -1, 1))[..., 0]
        return out

    def log_density(self, u: Tensor) -> Tensor:
        """Of each member at latents ``u`` of shape (M, D), shape (M,), nats."""
        d = self.loc.shape[1]
        if self.loadings is not None:
            return torch.distributions.LowRankMultivariateNormal(
                self.loc, self.loadings, self.scale.square(), validate_args=False
            ).log_prob(u)
        away, change = (u - self.loc) / self.scale, torch.zeros_like(u)
        if self.bends is not None:
            away, change = self.bends.inverse(away)
        if self.root is not None:
            away = torch.linalg.solve_triangular(self.root, (self.scale * away)[..., None], upper=False)[..., 0]
        return (change - 0.5 * away.square() - self.scale.log()).sum(-1) - 0.5 * d * log(2 * pi)

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor of each member's covariance, shape (M, D, D)."""
        if self.root is not None:
            return self.root
        if self.loadings is None:
            return torch.diag_embed(self.scale)
        return torch.linalg.cholesky(torch.diag_embed(self.scale.square()) + self.loadings @ self.loadings.mT)


@dataclass(frozen=True, eq=False)
class Guide:
    """A distribution over whole vectors: ``point`` positions are moved as they are, ``blocks`` are drawn.

    Its own free numbers are one vector ``phi`` = steps of the points, then for each block steps of the means, changes
    of the log standard deviations s, and rows of the strictly lower triangle W of ``scale_tril = diag(s) (I + W)``, or
    changes of the loadings. All of them are zero at the start: mean ``origin`` and standard deviation ``unit``.

    Args:
        origin: shape (size,), the start.
        points: the parameters.
        blocks: of the latents.
        rest: positions that do not move.
        order: shape (size,), where each position is found in (points, blocks, rest).
    """

    origin: Tensor
    points: Points
    blocks: tuple[Block, ...]
    rest: Tensor
    order: Tensor

    @property
    def size(self) -> int:
        """Length of ``phi``."""
        return self.points.size + sum(sum(b.sizes) for b in self.blocks)

    @property
    def noise_size(self) -> int:
        """Length of the standard normal vector from which one draw is made."""
        return sum(b.noise_size for b in self.blocks)

    def initial(self) -> Tensor:
        """The start, shape (size,)."""
        return self.origin.new_zeros(self.size)

    def draw(self, phi: Tensor, noise: Tensor) -> Tensor:
        """A vector, shape (density size,), from standard normal ``noise``."""
        return self.filled(phi, lambda own, used, size: own.draw(noise[used : used + size]))

    def log_densities(self, phi: Tensor, vector: Tensor) -> list[Tensor]:
        """Log-density of each block's members at a vector, shapes (M,), nats."""
        return [
            (m.given(vector[m.parents]) if isinstance(m, Law) else m).log_density(vector[b.index])
            for b, m in zip(self.blocks, self.moments(phi), strict=True)
        ]

    def mean(self, phi: Tensor) -> Tensor:
        """The vector of points and means, shape (density size,); of effects where the population's values are at theirs."""
        return self.filled(phi, lambda own, *_: own.loc)

    def filled(self, phi: Tensor, values: Callable[[Moments | Given, int, int], Tensor]) -> Tensor:
        """A vector of the points and of ``values(moments, noise used so far, noise size)`` of each block in turn."""
        moved, used = [self.points(phi)], 0
        for b, m in zip(self.blocks, self.moments(phi), strict=True):
            own = m.given(moved[1]) if isinstance(m, Law) else m
            moved.append(values(own, used, b.noise_size).reshape(-1))
            used += b.noise_size
        return torch.cat([*moved, self.origin[self.rest]])[self.order]

    def moments(self, phi: Tensor) -> list[Moments | Law]:
        """The normal distributions of each block, or their law given the population's values, which stand first."""
        out, k = list[Moments | Law](), self.points.size
        for b in self.blocks:
            pieces = phi[k : k + sum(b.sizes)].split(list(b.sizes))
            k += sum(b.sizes)
            out.append(self.block_moments(b, pieces, phi) if b.prior is None else self.law(b, b.prior, pieces, out[0]))
        return out

    def law(self, b: Block, prior: Prior, pieces: Sequence[Tensor], population: Moments | Law) -> Law:
        """The law of one block that follows the population's values."""
        assert isinstance(population, Moments)
        centre, first = population.loc[0], self.blocks[0]
        away = centre - self.origin[first.index[0]]
        m, d = b.index.shape
        pace = STEADY if prior.known else 1.0
        return Law(
            parents=first.index[0],
            centre=centre,
            prior=prior.loc + prior.loc_slope @ away,
            prior_slope=prior.loc_slope,
            log_scale=prior.log_scale + prior.log_scale_slope @ away,
            log_scale_slope=prior.log_scale_slope,
            correlation=prior.correlation,
            own=prior.own + pace * b.unit * pieces[0].reshape(m, d),
            own_slope=SLOWER * b.unit[..., None] * pieces[3].reshape(m, d, -1) / first.unit[0],
            likelihood=prior.root @ ((-pace * pieces[1]).exp().reshape(m, d, 1) * _lower(pace * pieces[2], m, d)),
            bends=_bends(pieces, m, d),
        )

    def block_moments(self, b: Block, pieces: Sequence[Tensor], phi: Tensor) -> Moments:
        """Those of one block from its ``pieces`` of ``phi``."""
        m, d = b.index.shape
        loc = self.origin[b.index] + b.unit * pieces[0].reshape(m, d)
        scale = b.unit * pieces[1].reshape(m, d).exp()
        bends = _bends(pieces, m, d) if b.bent else None
        if b.family == "full" and d > 1:
            return Moments(loc, scale, root=scale[..., None] * _lower(pieces[2], m, d), bends=bends)
        if b.family == "low_rank":
            first = LOADING * _pattern(m, d, b.rank).to(phi.dtype)
            return Moments(loc, scale, loadings=b.unit[..., None] * (first + pieces[2].reshape(m, d, -1)))
        return Moments(loc, scale, bends=bends)

    def posterior(self, phi: Tensor) -> Posterior:
        """The guide at ``phi`` as a result."""
        blocks = list[Normal]()
        for b, m in zip(self.blocks, self.moments(phi), strict=True):
            if isinstance(m, Law):
                blocks.append(arrow(b.plates, b.index, m))
            elif m.bends is None:
                blocks.append(Normal(b.plates, b.index, m.loc, m.scale_tril))
            else:
                blocks.append(Bent(b.plates, b.index, m.loc, m.scale_tril, m.bends))
        return Posterior(self.mean(phi), tuple(blocks))


def guide(origin: Tensor, points: Points, blocks: tuple[Block, ...], unit: Tensor) -> Guide:
    """A guide that starts at ``origin``, with first standard deviations ``unit``, both of shape (size,)."""
    rest, order = arrangement(origin, points.index, blocks)
    return Guide(origin, points, tuple(b.scaled(unit, b.family) for b in blocks), rest, order)


def arrangement(origin: Tensor, points: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
    """Positions that do not move, and where each position is found in (points, blocks, rest)."""
    moved = torch.cat([points, *(b.index.reshape(-1) for b in blocks)])
    still = torch.ones(origin.numel(), dtype=torch.bool)
    still[moved] = False
    rest = still.nonzero()[:, 0]
    return rest, torch.argsort(torch.cat([moved, rest]))


def blocks_by_role(
    entries: Iterable[Entry], graph: FactorGraph, family: str | Mapping[str, str] = "full"
) -> tuple[Block, ...]:
    """Group the latents: one block for each set of plates, one for the fixed effects with a prior.

    Args:
        entries: those that are not fixed.
        family: ``full`` (a full covariance per member up to 200 latents, beyond that a low-rank one), ``meanfield`` or
            ``low_rank``; or one for each plate by name, with ``""`` for the fixed effects.

    Raises:
        FitError: there is no such family.
    """
    grouped: dict[tuple[str, ...], list[Entry]] = {}
    for e in entries:
        if not e.is_param:
            grouped.setdefault(tuple(sorted(e.plates)), []).append(e)
    out = []
    for plates, members in sorted(
        grouped.items(), key=lambda g: bool(g[0])
    ):  # others may follow the population's values
        index = torch.cat([_by_member(e, plates, graph.latents[e.name].event_dim) for e in members], dim=1)
        chosen, d = _family(family, plates), index.shape[1]
        if chosen == "full" and d > LARGEST_FULL:
            chosen = "low_rank"
        rank = min(d, ceil(sqrt(d))) if chosen == "low_rank" else 0
        e = members[0]
        sizes = tuple(e.shape[len(e.shape) - graph.latents[e.name].event_dim + e.plates[p]] for p in plates)
        names = tuple(e.name for e in members)
        bent = chosen == "full" and not plates
        out.append(Block(plates, sizes, names, index, chosen, rank, torch.ones(index.shape), bent=bent))
    return tuple(out)


def _family(family: str | Mapping[str, str], plates: tuple[str, ...]) -> str:
    given = [family] if isinstance(family, str) else list(family.values())
    for name in given:
        if name not in FAMILIES:
            raise FitError(
                f"there is no guide {name!r}.",
                details=[f"families: {', '.join(FAMILIES)}; or a network, or a Pyro guide"],
                suggestion="guide='full'",
            )
    if isinstance(family, str):
        return family
    own = [family[p] for p in (plates or ("",)) if p in family]
    return own[0] if own else "full"


def _bends(pieces: Sequence[Tensor], m: int, d: int) -> Bends:
    """Skews and tails within bounds, so that no draw is far out of all proportion."""
    skew, log_tail = (k * torch.tanh(x.reshape(m, d) / k) for x, k in zip(pieces[4:6], BENT, strict=True))
    return Bends(skew, log_tail)


def _pattern(m: int, d: int, rank: int) -> Tensor:
    """Loadings to start from: any that are not zero and differ between factors, shape (M, D, R)."""
    return torch.outer(torch.arange(1.0, d + 1), torch.arange(1.0, rank + 1)).cos().expand(m, d, rank)


def _lower(below: Tensor, m: int, d: int) -> Tensor:
    """Lower triangular matrices with ones on the diagonal, shape (M, D, D), from what is below it."""
    padded = torch.cat([below.new_zeros(m, 1), below.reshape(m, -1)], dim=1)
    return padded[:, _triangle(d)].reshape(m, d, d) + below.new_ones(d).diag()


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
