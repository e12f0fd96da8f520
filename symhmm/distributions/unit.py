"""Proportions: the beta distribution with its distribution function, and by its mean and precision."""

from typing import Any

import pyro.distributions as dist
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all

from symhmm.distributions.special import betainc


class Beta(dist.Beta):
    """Beta distribution as in torch, with the distribution function that residuals need.

    Args:
        concentration1, concentration0: positive; the mean is their first share.

    >>> import torch
    >>> Beta(1.0, torch.tensor(2.0)).cdf(torch.tensor(0.5))
    tensor(0.7500)
    """

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``."""
        return betainc(self.concentration1, self.concentration0, value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Beta":
        """The same distribution with a larger batch shape, without copying."""
        return super().expand(batch_shape, _instance=self._get_checked_instance(Beta, _instance))


class BetaMeanPrecision(Beta):
    """Beta distribution by its mean and precision, the form in which a mean can depend on covariates.

    The concentrations are ``mean * precision`` and ``(1 - mean) * precision``; the variance is
    ``mean * (1 - mean) / (1 + precision)`` (Ferrari and Cribari-Neto 2004, eq. 4).

    Args:
        mean: expected value, in (0, 1).
        precision: positive, dimensionless; the larger, the smaller the variance.

    >>> import torch
    >>> d = BetaMeanPrecision(0.25, torch.tensor([4.0, 100.0]))
    >>> d.concentration1, d.mean
    (tensor([ 1., 25.]), tensor([0.2500, 0.2500]))
    """

    arg_constraints = {
        "mean": constraints.unit_interval,
        "precision": constraints.positive,
    }

    def __init__(self, mean: Tensor | float, precision: Tensor | float, validate_args: bool | None = None) -> None:
        mean, self.precision = broadcast_all(mean, precision)
        super().__init__(mean * self.precision, (1 - mean) * self.precision, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "BetaMeanPrecision":
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(BetaMeanPrecision, _instance)
        new.precision = self.precision.expand(batch_shape)
        return super().expand(batch_shape, _instance=new)
