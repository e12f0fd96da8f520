"""Counts that vary more than Poisson's: the negative binomial by its mean and dispersion."""

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from symhmm.distributions.special import betainc

_LARGE = 50.0  # sizes from which Stirling's series with five terms is exact in double precision


class NegativeBinomialMean(TorchDistribution):
    """Negative binomial distribution by its mean and dispersion: variance ``mean + dispersion * mean^2``.

    ``1 / dispersion`` is the ``size`` of R's dnbinom. Small dispersions lose no digits, and give Poisson's distribution in
    the limit (Hilbe 2011, *Negative Binomial Regression*, NB2).

    Args:
        mean: expected count, positive.
        dispersion: positive, dimensionless.

    >>> d = NegativeBinomialMean(4.0, torch.tensor([1e-9, 0.5]))
    >>> d.variance
    tensor([ 4., 12.])
    >>> d.log_prob(torch.tensor(0.0)).exp()        # exp(-4), (1 + 2)^-2
    tensor([0.0183, 0.1111])
    """

    arg_constraints = {
        "mean": constraints.positive,
        "dispersion": constraints.positive,
    }
    support = constraints.nonnegative_integer

    def __init__(self, mean: Tensor | float, dispersion: Tensor | float, validate_args: bool | None = None) -> None:
        self._mean, self.dispersion = broadcast_all(mean, dispersion)
        super().__init__(self._mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NegativeBinomialMean":
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(NegativeBinomialMean, _instance)
        batch_shape = torch.Size(batch_shape)
        new._mean, new.dispersion = self._mean.expand(batch_shape), self.dispersion.expand(batch_shape)
        super(NegativeBinomialMean, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of a count, nats."""
        if self._validate_args:
            self._validate_sample(value)
        m, d = self._mean, self.dispersion
        rising = _log_rising(value, d)
        return rising - torch.lgamma(value + 1) + torch.xlogy(value, m) - (value + 1 / d) * torch.log1p(d * m)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``."""
        size = 1 / self.dispersion
        counted = torch.clamp(value, min=0.0).floor()
        p = betainc(size, counted + 1, 1 / (1 + self.dispersion * self._mean))
        return torch.where(value < 0, torch.zeros_like(p), p)

    def cdf_below(self, value: Tensor) -> Tensor:
        """Probability of less than ``value``."""
        return self.cdf(torch.ceil(value) - 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Poisson counts whose rates are drawn from a gamma distribution."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            size = (1 / self.dispersion).expand(shape)
            rate = torch._standard_gamma(size) * (self._mean * self.dispersion).expand(shape)
            return torch.poisson(rate)

    @property
    def mean(self) -> Tensor:
        """Expected count."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """``mean + dispersion * mean^2``."""
        return self._mean + self.dispersion * self._mean * self._mean


def _log_rising(y: Tensor, d: Tensor) -> Tensor:
    """log of (1 + d)(1 + 2 d)...(1 + (y - 1) d), nats: lgamma(y + 1/d) - lgamma(1/d) + y log d without its cancellation."""
    y, d = torch.broadcast_tensors(y, d)
    large = d * _LARGE < 1
    small = torch.where(large, 1.0, d)
    plain = torch.lgamma(y + 1 / small) - torch.lgamma(1 / small) + y * small.log()
    tiny = torch.where(large, d, 1 / (2 * _LARGE))
    one = torch.log1p(tiny * y)
    series = (y - 0.5) * one + (one / tiny - y) + _stirling(y + 1 / tiny) - _stirling(1 / tiny)
    return torch.where(large, series, plain)


def _stirling(x: Tensor) -> Tensor:
    """lgamma(x) minus its leading terms, for x above 50."""
    r = 1 / x
    q = r * r
    return r * (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q * (1 / 1680 - q / 1188))))
