"""Bent: normal numbers with a skew and tails of their own, as a container of plain numbers."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from symhmm.tables.results import Normal

NODES = 40  # of the quadrature of moments


@dataclass(frozen=True)
class Bends:
    """The sinh-arcsinh transformation of Jones and Pewsey (2009), elementwise, with median zero and slope one there.

    ``f(x) = (sinh((asinh(x) + skew) / tail) - sinh(skew / tail)) tail / cosh(skew / tail)``: the identity for skew 0 and
    tail 1; a negative skew makes the lower tail the longer one, a tail below 1 makes both heavier than a normal one's.

    Args:
        skew: any shape.
        log_tail: of the same shape.

    >>> Bends(torch.zeros(2), torch.zeros(2))(torch.tensor([0.0, 3.0])).round()
    tensor([0., 3.])
    """

    skew: Tensor
    log_tail: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Bent numbers from straight ones."""
        tail = self.log_tail.exp()
        at = self.skew / tail
        return (torch.sinh((torch.asinh(x) + self.skew) / tail) - torch.sinh(at)) * tail / torch.cosh(at)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Straight numbers from bent ones, and the logarithm of the derivative of this map."""
        tail = self.log_tail.exp()
        at = self.skew / tail
        slope = torch.cosh(at) / tail
        w = y * slope + torch.sinh(at)
        straight = tail * torch.asinh(w) - self.skew
        change = torch.cosh(straight).log() + self.log_tail - 0.5 * (1 + w.square()).log() + slope.log()
        return torch.sinh(straight), change

    def moments(self, sd: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of bent normal numbers of mean zero and standard deviation ``sd``, by quadrature."""
        nodes, weights = (torch.from_numpy(x).to(sd) for x in np.polynomial.hermite_e.hermegauss(NODES))
        weights = weights / weights.sum()
        values = self(nodes.reshape(-1, *[1] * sd.dim()) * sd)
        mean = torch.tensordot(weights, values, 1)
        return mean, torch.tensordot(weights, values.square(), 1) - mean.square()


@dataclass(frozen=True)
class Bent(Normal):
    """Normal numbers, of which each is bent around its median: ``loc + scale bends((scale_tril e) / scale)``.

    ``scale`` is the diagonal of ``scale_tril``, which describes the middle of the distribution, not its tails.

    Args:
        bends: of shape (M, D).
    """

    bends: Bends

    def draw(self, vectors: Tensor, noise: Tensor) -> Tensor:
        """Values from standard normal ``noise`` of shape (draws, M, D); they depend on nothing in ``vectors``."""
        scale = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return self.loc + scale * self.bends((self.scale_tril @ noise[..., None])[..., 0] / scale)

    def variance(self, vectors: Tensor) -> Tensor:
        """Of each value, shape (M, D), by quadrature."""
        scale = self.scale_tril.diagonal(dim1=-2, dim2=-1)
        return scale.square() * self.bends.moments(self.scale_tril.square().sum(-1).sqrt() / scale)[1]
