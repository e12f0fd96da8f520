"""Positive and truncated quantities: gamma by its mean and standard deviation, and a normal distribution cut to an interval."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from symhmm.errors import ValuesError

_FAR = 40.0  # standard deviations beyond which a normal distribution has no mass in double precision


class GammaMeanSd(dist.Gamma):
    """Gamma distribution by its mean and standard deviation, as step lengths and dive depths are reported.

    Shape is ``(mean / sd)^2`` and rate ``mean / sd^2``.

    Args:
        mean: expected value, positive, in the units of the data.
        sd: standard deviation, positive, in the same units.

    >>> d = GammaMeanSd(4.0, torch.tensor([2.0, 8.0]))
    >>> d.concentration, d.stddev
    (tensor([4.0000, 0.2500]), tensor([2., 8.]))
    """

    arg_constraints = {
        "mean": constraints.positive,
        "sd": constraints.positive,
    }

    def __init__(self, mean: Tensor | float, sd: Tensor | float, validate_args: bool | None = None) -> None:
        mean, self.sd = broadcast_all(mean, sd)
        ratio = mean / self.sd
        super().__init__(ratio * ratio, ratio / self.sd, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "GammaMeanSd":
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(GammaMeanSd, _instance)
        new.sd = self.sd.expand(batch_shape)
        return super().expand(batch_shape, _instance=new)


class TruncatedNormal(TorchDistribution):
    """Normal distribution cut to an interval and normalised there, in either tail to rounding.

    Args:
        loc: mean before cutting, in the units of the data.
        scale: standard deviation before cutting, positive.
        low: smallest value, a number; may be -inf.
        high: largest value, a number above ``low``; may be inf.

    Raises:
        ValuesError: ``low`` is not below ``high``.

    >>> d = TruncatedNormal(0.0, torch.tensor(1.0), low=0.0)          # half-normal
    >>> d.log_prob(torch.tensor(0.0)).exp(), d.mean
    (tensor(0.7979), tensor(0.7979))
    """

    arg_constraints = {
        "loc": constraints.real,
        "scale": constraints.positive,
    }

    def __init__(
        self,
        loc: Tensor | float,
        scale: Tensor | float,
        low: float = -math.inf,
        high: float = math.inf,
        validate_args: bool | None = None,
    ) -> None:
        if not low < high:
            raise ValuesError(
                f"a normal distribution cannot be cut to the interval from {low} to {high}.",
                suggestion="two numbers, the smaller one first",
            )
        self.loc, self.scale = broadcast_all(loc, scale)
        self.low, self.high = low, high
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TruncatedNormal":
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(TruncatedNormal, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.scale, new.low, new.high = (
            self.loc.expand(batch_shape),
            self.scale.expand(batch_shape),
            self.low,
            self.high,
        )
        super(TruncatedNormal, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """The interval."""
        if math.isinf(self.low) and math.isinf(self.high):
            return constraints.real
        if math.isinf(self.high):
            return constraints.greater_than_eq(self.low)
        return constraints.less_than(self.high) if math.isinf(self.low) else constraints.interval(self.low, self.high)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats; -inf outside the interval."""
        if self._validate_args:
            self._validate_sample(value)
        z = (value - self.loc) / self.scale
        inside = -0.5 * z * z - 0.5 * math.log(2 * math.pi) - self.scale.log() - self._log_mass(self.high)
        return torch.where((value < self.low) | (value > self.high), -math.inf, inside)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``."""
        # Below the interval there is no mass, and a logarithm of none would have no gradient.
        above = value > self.low
        inside = torch.where(above, value, self.loc if math.isinf(self.low) else self.low + self.scale)
        return torch.where(above, torch.exp(self._log_mass(inside) - self._log_mass(self.high)), 0.0).clamp(max=1.0)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws by the inverse distribution function, from the nearer tail; without gradient."""
        from scipy.special import ndtri_exp

        with torch.no_grad():
            u = torch.rand(self._extended_shape(torch.Size(sample_shape)), dtype=self.loc.dtype)
            a, b, turned = self._tail(self.high)
            share = torch.where(turned, 1 - u, u)
            log_p = torch.logaddexp(torch.log1p(-share) + _log_ndtr(a), share.log() + _log_ndtr(b))
            z = torch.as_tensor(ndtri_exp(log_p.cpu().numpy())).to(self.loc)
            return (self.loc + self.scale * torch.where(turned, -z, z)).clamp(self.low, self.high)

    @property
    def mean(self) -> Tensor:
        """Expected value after cutting."""
        return self.loc + self.scale * self._moments()[0]

    @property
    def variance(self) -> Tensor:
        """Variance after cutting."""
        first, second = self._moments()
        return self.scale * self.scale * (1 + second - first * first)

    def _moments(self) -> tuple[Tensor, Tensor]:
        """(f(a) - f(b)) / mass and (a f(a) - b f(b)) / mass, with a and b the ends in standard deviations."""
        a, b = self._standard(self.high)
        log_mass = self._log_mass(self.high)
        f, g = (torch.exp(-0.5 * x * x - 0.5 * math.log(2 * math.pi) - log_mass) for x in (a, b))
        return f - g, a * f - b * g

    def _standard(self, high: Tensor | float) -> tuple[Tensor, Tensor]:
        """The lower end and ``high`` in standard deviations; an infinite one is 40 of them away from the other."""
        a, b = (self.low - self.loc) / self.scale, (high - self.loc) / self.scale
        if math.isinf(self.low):
            a = (b if isinstance(high, Tensor) or math.isfinite(high) else torch.zeros_like(self.loc)) - _FAR
        if not isinstance(high, Tensor) and math.isinf(high):
            b = a + (2 * _FAR if math.isinf(self.low) else _FAR)
        return a, b

    def _tail(self, high: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Both ends turned over to the left tail where both are to the right of the mean, and where that is."""
        a, b = self._standard(high)
        turned = a > 0
        return torch.where(turned, -b, a), torch.where(turned, -a, b), turned

    def _log_mass(self, high: Tensor | float) -> Tensor:
        """Logarithm of the normal probability from the lower end to ``high``, nats."""
        a, b, _ = self._tail(high)
        upper = _log_ndtr(b)
        return upper + torch.log1p(-torch.exp(_log_ndtr(a) - upper))


def _log_ndtr(z: Tensor) -> Tensor:
    """Logarithm of the normal distribution function, nats; of functions that torch can also batch."""
    left = z < 0
    t = torch.where(left, -z, 0.0) / math.sqrt(2)
    right = torch.log1p(-0.5 * torch.erfc(torch.where(left, 0.0, z) / math.sqrt(2)))
    return torch.where(left, torch.log(0.5 * torch.special.erfcx(t)) - t * t, right)
