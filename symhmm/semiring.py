"""Semirings: the pair of operations in which a factor graph is contracted. A new semiring is one value."""

from collections.abc import Callable
from dataclasses import dataclass

import funsor.ops as ops
import torch
from torch import Tensor


@dataclass(frozen=True)
class Semiring:
    """A commutative semiring on log-values whose product is ``+``.

    Args:
        name: how plans print it.
        plus: the funsor operation that sums out a variable.
        reduce: ``reduce(x, dim)`` sums a torch tensor over one dimension.
    """

    name: str
    plus: ops.AssociativeOp
    reduce: Callable[[Tensor, int], Tensor]

    def __repr__(self) -> str:
        return self.name


def log_sum_exp(x: Tensor, dim: int) -> Tensor:
    """Log of the sum of exponentials over one dimension; all ``-inf`` gives ``-inf`` with zero gradient, never NaN.

    >>> log_sum_exp(torch.full((2, 2), -torch.inf), -1)
    tensor([-inf, -inf])
    """
    peak, numbers = x.detach().amax(dim, keepdim=True), torch.finfo(x.dtype)
    total = (x - peak.clamp(numbers.min, numbers.max)).exp().sum(dim)
    # At least 1 wherever anything is possible. log(0) has an infinite slope: below, the slope is zero and -inf the peak's.
    return total.clamp(min=0.5).log() + peak.squeeze(dim)


def maximum(x: Tensor, dim: int) -> Tensor:
    """Largest entry over one dimension."""
    return x.amax(dim)


LOG = Semiring("LOG", ops.logaddexp, log_sum_exp)
MAX = Semiring("MAX", ops.max, maximum)
