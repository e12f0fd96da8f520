"""Arrow: effects of a plate's members given the population's values, as a container of plain numbers."""

from dataclasses import dataclass, replace
from math import log, pi

import torch
from torch import Tensor

from symhmm.tables.bent import Bends
from symhmm.tables.results import Normal


@dataclass(frozen=True)
class Given:
    """Normal distributions of the members at one value of the population.

    Args:
        loc: shape (M, D).
        root: shape (M, D, D), lower triangular; its square is the precision.
        bends: of shape (M, D), in units of the diagonal of the root.
    """

    loc: Tensor
    root: Tensor
    bends: Bends

    def draw(self, noise: Tensor) -> Tensor:
        """Effects from standard normal ``noise`` of M * D numbers, shape (M, D)."""
        e = noise.reshape(*self.loc.shape, 1)
        straight = torch.linalg.solve_triangular(self.root.mT, e, upper=True)[..., 0]
        return self.loc + self.bends(straight * self.unit) / self.unit

    def log_density(self, u: Tensor) -> Tensor:
        """Of each member at effects ``u`` of shape (M, D), shape (M,), nats."""
        straight, change = self.bends.inverse((u - self.loc) * self.unit)
        away = (self.root.mT @ (straight / self.unit)[..., None])[..., 0]
        return (self.unit.log() + change - 0.5 * away.square()).sum(-1) - 0.5 * u.shape[1] * log(2 * pi)

    @property
    def unit(self) -> Tensor:
        """Diagonal of the root, shape (M, D)."""
        return torch.diagonal(self.root, dim1=-2, dim2=-1)

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and variance of each effect, shape (M, D)."""
        sd = torch.cholesky_inverse(self.root).diagonal(dim1=-2, dim2=-1).sqrt()
        mean, variance = self.bends.moments(sd * self.unit)
        return self.loc + mean / self.unit, variance / self.unit.square()


@dataclass(frozen=True)
class Law:
    """How normal effects follow the population's values t: a normal prior that follows t, times a normal likelihood.

    The prior has location ``prior + prior_slope (t - centre)`` and precision ``S R S``, where log S is linear in t as well; the
    likelihood has location ``own + own_slope (t - centre)`` and precision ``T T'``. Where the program's prior is normal and
    the data speak of the effects like normal observations, this is their posterior given t, funnel and all. Of
    effects without a normal prior the prior's precision is zero, and what remains is a normal distribution linear in t.

    Args:
        parents: shape (K,), positions of t in the density's vector.
        centre: shape (K,), the mean of t.
        prior: shape (M, D), with ``prior_slope`` of shape (M, D, K).
        log_scale: log S at the centre, shape (M, D), with ``log_scale_slope``.
        correlation: R, shape (M, D, D), zero where there is no normal prior.
        own: shape (M, D), with ``own_slope``.
        likelihood: T, shape (M, D, D), lower triangular.
        bends: skew and tails of what results, of shape (M, D), since a likelihood is not quite normal.
    """

    parents: Tensor
    centre: Tensor
    prior: Tensor
    prior_slope: Tensor
    log_scale: Tensor
    log_scale_slope: Tensor
    correlation: Tensor
    own: Tensor
    own_slope: Tensor
    likelihood: Tensor
    bends: Bends

    def given(self, t: Tensor) -> Given:
        """The members at population values ``t`` of shape (K,)."""
        away = t - self.centre
        s = (self.log_scale + self.log_scale_slope @ away).exp()
        precision = s[..., None] * self.correlation * s[..., None, :]
        data = self.likelihood @ self.likelihood.mT
        prior, own = self.prior + self.prior_slope @ away, self.own + self.own_slope @ away
        root = torch.linalg.cholesky(precision + data)
        pull = torch.linalg.solve_triangular(root, precision @ prior[..., None] + data @ own[..., None], upper=False)
        return Given(torch.linalg.solve_triangular(root.mT, pull, upper=True)[..., 0], root, self.bends)


@dataclass(frozen=True)
class Arrow(Normal):
    """Normal effects that follow the population's values; ``loc`` and ``scale_tril`` are those at their centre, unbent.

    Args:
        law: how they do.
    """

    law: Law

    def draw(self, vectors: Tensor, noise: Tensor) -> Tensor:
        """Effects for the population's values in ``vectors``, from ``noise`` of shape (draws, members, D)."""
        return torch.stack([self.law.given(v[self.law.parents]).draw(e) for v, e in zip(vectors, noise, strict=True)])

    def variance(self, vectors: Tensor) -> Tensor:
        """Of each effect over the population's values in ``vectors``, shape (members, D): within them and between them."""
        given = [self.law.given(v[self.law.parents]) for v in vectors]
        means, variances = zip(*(g.moments for g in given), strict=True)
        return torch.stack(variances).mean(0) + torch.stack(means).var(0)

    def moved(self, target: Tensor) -> "Arrow":
        """The same at other positions: what was at i is at ``target[i]``."""
        law = replace(self.law, parents=target[self.law.parents])
        return replace(self, index=target[self.index], law=law)


def arrow(plates: tuple[str, ...], index: Tensor, law: Law) -> Arrow:
    """Effects at ``index`` of shape (M, D) by their law."""
    at = law.given(law.centre)
    return Arrow(plates, index, at.loc, torch.linalg.cholesky(torch.cholesky_inverse(at.root)), law)
