"""Distributions that hidden Markov models need and Pyro lacks or approximates, and the stationary start of a chain."""

import math
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all, lazy_property

from symhmm.errors import ShapeError, ValuesError

# Best and Fisher's rejection sampler divides by the concentration; below this the density is uniform to 1e-8.
_LEAST_SAMPLED_CONCENTRATION = 1e-8


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

    @lazy_property
    def variance(self) -> Tensor:
        """Circular variance, 1 - I1(k) / I0(k), between 0 and 1."""
        return 1 - torch.special.i1e(self.concentration) / torch.special.i0e(self.concentration)

    @lazy_property
    def _concentration(self) -> Tensor:
        return self.concentration.to(torch.double).clamp(min=_LEAST_SAMPLED_CONCENTRATION)


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


def stationary_distribution(transition: Tensor) -> Tensor:
    """Distribution that a Markov chain keeps: the row vector with ``p @ transition == p`` and sum 1.

    Solves ``p (I - transition + U) = 1`` with U a matrix of ones (Zucchini, MacDonald and Langrock 2016, section 1.3.2)
    in O(K^3), batched, and differentiable as often as needed.

    Args:
        transition: shape (*batch, K, K), probabilities; entry [i, j] is p(next = j given now = i); rows sum to 1.

    Returns:
        shape (*batch, K), probabilities.

    Raises:
        ShapeError: the last two sizes differ.
        ValuesError: the chain falls into parts that never meet, so that it has no single stationary distribution.

    >>> stationary_distribution(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    tensor([0.7500, 0.2500])
    """
    if transition.dim() < 2 or transition.shape[-1] != transition.shape[-2]:
        raise ShapeError(
            "the transition matrix of a stationary distribution is not square.",
            details=[f"seen shape {tuple(transition.shape)}, wanted (*batch, K, K)"],
            suggestion="put 'from' in the last dimension but one and 'to' in the last.",
        )
    size = transition.shape[-1]
    eye = torch.eye(size, dtype=transition.dtype, device=transition.device)
    ones = torch.ones(*transition.shape[:-1], dtype=transition.dtype, device=transition.device)
    try:
        solution = torch.linalg.solve((eye - transition + 1).mT, ones)
    except torch.linalg.LinAlgError as error:
        raise ValuesError(
            "a transition matrix has no single stationary distribution: its states fall into parts that never meet.",
            details=[f"transition of shape {tuple(transition.shape)}"],
            suggestion="give the start a parameter of its own, or allow a small probability between the parts.",
        ) from error
    # Rounding can leave -1e-17 at a state that is never visited. Lift the value only: a clamp alone would cut
    # the gradient there.
    return solution + (solution.clamp(min=0) - solution).detach()


def with_zero_diagonal(logits: Tensor) -> Tensor:
    """Square matrices of logits relative to staying, from their off-diagonal entries.

    Args:
        logits: shape (*batch, K, K - 1), row by row without the diagonal; [i, :] are the logits of leaving state i.

    Returns:
        shape (*batch, K, K), zeros on the diagonal.

    >>> with_zero_diagonal(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[0., 1., 2.],
            [3., 0., 4.],
            [5., 6., 0.]])
    """
    k = logits.shape[-2]
    # Read row by row, a square matrix is a diagonal entry, K others, a diagonal entry, K others, ..., a diagonal entry.
    groups = logits.reshape(*logits.shape[:-2], k - 1, k)
    flat = torch.cat([torch.zeros_like(groups[..., :1]), groups], -1).flatten(-2)
    return torch.cat([flat, torch.zeros_like(flat[..., :1])], -1).unflatten(-1, (k, k))
