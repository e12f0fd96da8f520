"""Vectors of which a part may be missing."""

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints


class PartlyObservedNormal(TorchDistribution):
    """Multivariate normal distribution of a vector, of which the density counts the observed coordinates alone.

    Where coordinates are missing the density is the marginal one of the others; where all are, the log-density is 0. The
    cost is a Cholesky factor of D^3 / 3 flops for each value and state.

    Args:
        loc: shape (..., D), in the units of the data.
        scale_tril: shape (..., D, D), lower triangular with a positive diagonal; the covariance is its square.
        seen: shape (..., D), bool; True where a coordinate is observed.

    >>> tril = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> d = PartlyObservedNormal(torch.zeros(2), tril, torch.tensor([False, True]))      # y[1] ~ Normal(0, sqrt(2))
    >>> d.log_prob(torch.tensor([9.0, 0.0])).exp()
    tensor(0.2821)
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}
    support = constraints.real_vector

    def __init__(self, loc: Tensor, scale_tril: Tensor, seen: Tensor, validate_args: bool | None = None) -> None:
        batch = torch.broadcast_shapes(loc.shape[:-1], scale_tril.shape[:-2], seen.shape[:-1])
        self.loc, self.scale_tril, self.seen = loc, scale_tril, seen
        super().__init__(batch, loc.shape[-1:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "PartlyObservedNormal":
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(PartlyObservedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc = self.loc.expand(batch_shape + self.loc.shape[-1:])
        new.scale_tril, new.seen = self.scale_tril, self.seen
        super(PartlyObservedNormal, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of the observed coordinates, nats; what stands in the others has no effect."""
        both = self.seen.unsqueeze(-1) & self.seen.unsqueeze(-2)
        eye = torch.eye(self.loc.shape[-1], dtype=self.loc.dtype, device=self.loc.device)
        # A missing coordinate becomes a standard normal one, independent of the others, with a residual of 0.
        factor = torch.linalg.cholesky(torch.where(both, self.covariance_matrix, eye))
        residual = torch.where(self.seen, value - self.loc, 0.0)
        shape = torch.broadcast_shapes(factor.shape[:-1], residual.shape)
        whole = factor.expand(shape[:-1] + factor.shape[-2:])
        white = torch.linalg.solve_triangular(whole, residual.expand(shape).unsqueeze(-1), upper=False).squeeze(-1)
        size = -0.5 * (white * white).sum(-1) - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return size - 0.5 * math.log(2 * math.pi) * self.seen.sum(-1)

    @property
    def covariance_matrix(self) -> Tensor:
        """Shape (..., D, D), of all coordinates."""
        return self.scale_tril @ self.scale_tril.mT

    @property
    def mean(self) -> Tensor:
        """Of all coordinates, observed or not."""
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        """Of all coordinates, observed or not."""
        return self.scale_tril.square().sum(-1).expand(self.batch_shape + self.event_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws of all coordinates, without gradient."""
        with torch.no_grad():
            noise = torch.randn(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype)
            return self.loc + (self.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
