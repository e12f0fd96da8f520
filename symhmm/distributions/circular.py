"""Angles: von Mises with an exact normaliser, and wrapped Cauchy."""

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all, lazy_property

# Best and Fisher's rejection sampler divides by the concentration; below this the density is uniform to 1e-8.
_LEAST_SAMPLED_CONCENTRATION = 1e-8
# Beyond an exponent of -40 there is less than 1e-17 of the mass; up to there 64 Gauss-Legendre nodes are good to rounding.
_LAST_EXPONENT = 40.0
_NODES, _WEIGHTS = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(64))


class VonMises(dist.VonMises):
    """Von Mises distribution of an angle with an exact normaliser; uniform on the circle at concentration zero.

    The log-density is ``-2 k sin((x - loc) / 2)^2 - log(2 pi I0(k) exp(-k))``, with the scaled Bessel function of
    `torch.special.i0e`: good to rounding, in value and gradient, from k = 0 to 1e8 and above, where the polynomial in
    ``pyro.distributions.VonMises`` is good to 1e-7. The mean resultant length ``I1(k) / I0(k)`` is exact too.

    Args:
        loc: mean direction, radians; any real number.
        concentration: k >= 0, dimensionless; 1 / k is close to the variance in radians^2 when k is large.

    Sampling is Pyro's (Best and Fisher 1979), which has no reparametrised gradient.

    >>> flat = VonMises(0.0, torch.zeros(2))
    >>> flat.log_prob(torch.tensor([0.0, 3.0])).exp()      # 1 / (2 pi)
    tensor([0.1592, 0.1592])
    >>> VonMises(0.0, 2.0).variance        # 1 - I1(2) / I0(2)
    tensor(0.3022)
    """

    arg_constraints = {
        "loc": constraints.real,
        "concentration": constraints.nonnegative,
    }

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats per radian; ``value`` is an angle in radians, any real number."""
        if self._validate_args:
            self._validate_sample(value)
        # 1 - cos cancels near the mean, where a concentrated density has its mass; half angles do not.
        half = torch.sin((value - self.loc) / 2)
        k = self.concentration
        # k - |k| is 0 with slope 1 at k = 0: torch gives i0e the slope 0 there, and from the right it is -1.
        return -2 * k * half * half + (k - k.abs()) - torch.special.i0e(k).log() - math.log(2 * math.pi)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of the arc from -pi to ``value``, radians in [-pi, pi]; by Gauss-Legendre quadrature, to rounding."""
        return self._turned(value - self.loc) - self._turned(-math.pi - self.loc)

    def _turned(self, angle: Tensor) -> Tensor:
        """Integral of the density around 0 from minus infinity's whole turns to ``angle``, up to a constant."""
        k, (nodes, weights) = self.concentration, (x.to(angle) for x in (_NODES, _WEIGHTS))
        turns = torch.round(angle.detach() / (2 * math.pi))
        last = 2 * torch.asin((_LAST_EXPONENT / 2 / k.detach()).clamp(max=1.0).sqrt())
        end = torch.maximum(torch.minimum(angle - 2 * math.pi * turns, last), -last)
        sines = torch.sin(end.unsqueeze(-1) * (1 + nodes) / 4)
        integral = end / 2 * (torch.exp(-2 * k.unsqueeze(-1) * sines * sines) * weights).sum(-1)
        return turns + integral / (2 * math.pi * torch.special.i0e(k))

    @lazy_property
    def variance(self) -> Tensor:
        """Circular variance, 1 - I1(k) / I0(k), between 0 and 1."""
        return 1 - torch.special.i1e(self.concentration) / torch.special.i0e(self.concentration)

    @lazy_property
    def _concentration(self) -> Tensor:
        return self.concentration.to(torch.double).clamp(min=_LEAST_SAMPLED_CONCENTRATION)


class WrappedCauchy(TorchDistribution):
    """Wrapped Cauchy distribution of an angle: heavier tails than von Mises, uniform at concentration zero.

    The density is ``(1 - r^2) / (2 pi (1 + r^2 - 2 r cos(x - loc)))`` (Mardia and Jupp 2000, section 3.5.7).

    Args:
        loc: mean direction, radians; any real number.
        concentration: r, mean resultant length, in [0, 1), dimensionless.

    >>> d = WrappedCauchy(0.0, torch.tensor([0.0, 0.5]))
    >>> d.log_prob(torch.tensor(0.0)).exp()          # 1 / (2 pi), and three times that
    tensor([0.1592, 0.4775])
    >>> d.variance
    tensor([1.0000, 0.5000])
    """

    arg_constraints = {
        "loc": constraints.real,
        "concentration": constraints.half_open_interval(0.0, 1.0),
    }
    support = constraints.real
    has_rsample = True

    def __init__(self, loc: Tensor | float, concentration: Tensor | float, validate_args: bool | None = None) -> None:
        self.loc, self.concentration = broadcast_all(loc, concentration)
        super().__init__(self.loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "WrappedCauchy":
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(WrappedCauchy, _instance)
        batch_shape = torch.Size(batch_shape)
        new.loc, new.concentration = self.loc.expand(batch_shape), self.concentration.expand(batch_shape)
        super(WrappedCauchy, new).__init__(batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density in nats per radian; ``value`` is an angle in radians, any real number."""
        if self._validate_args:
            self._validate_sample(value)
        r, half = self.concentration, torch.sin((value - self.loc) / 2)
        # 1 + r^2 - 2 r cos cancels near the mean when r is close to 1; half angles do not.
        spread = (1 - r) * (1 - r) + 4 * r * half * half
        return torch.log1p(-r) + torch.log1p(r) - math.log(2 * math.pi) - spread.log()

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of the arc from -pi to ``value``, radians in [-pi, pi]."""
        return self._turned(value - self.loc) - self._turned(-math.pi - self.loc)

    def _turned(self, angle: Tensor) -> Tensor:
        turns = torch.round(angle.detach() / (2 * math.pi))
        half = (angle - 2 * math.pi * turns) / 2
        r = self.concentration
        return turns + torch.atan2((1 + r) * half.sin(), (1 - r) * half.cos()) / math.pi

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws in [-pi, pi), radians, differentiable in both parameters: the inverse of `cdf` at uniform numbers."""
        shape = self._extended_shape(torch.Size(sample_shape))
        half = math.pi * (torch.rand(shape, dtype=self.loc.dtype, device=self.loc.device) - 0.5)
        r = self.concentration
        angle = self.loc + 2 * torch.atan2((1 - r) * half.sin(), (1 + r) * half.cos())
        return torch.remainder(angle + math.pi, 2 * math.pi) - math.pi

    @property
    def mean(self) -> Tensor:
        """Mean direction, radians."""
        return self.loc

    @property
    def variance(self) -> Tensor:
        """Circular variance, 1 - r, between 0 and 1."""
        return 1 - self.concentration
