"""The incomplete beta function, which torch lacks: distribution functions of the beta, binomial and Student families."""

import torch
from torch import Tensor

_TERMS = 256  # pairs of terms, a power of two; enough for parameters up to 10 000


def betainc(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Regularised incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22).

    Differentiable in all arguments and free of branches, so that it can be traced. Good to 1e-11 for parameters up to
    10 000. Its 512 terms are multiplied as matrices of 2 x 2 by a balanced tree, which is nine operations for a tracer.

    Args:
        a, b: positive.
        x: in [0, 1].

    Returns:
        the broadcast shape of the arguments, probabilities.

    >>> betainc(torch.tensor(1.0), torch.tensor(2.0), torch.tensor([0.0, 0.5, 1.0]))    # 1 - (1 - x)^2
    tensor([0.0000, 0.7500, 1.0000])
    """
    a, b, x = torch.broadcast_tensors(a, b, x)
    # The fraction converges fast below the mean; above it, I_x(a, b) = 1 - I_{1-x}(b, a).
    above = x > (a + 1) / (a + b + 2)
    p, q, y = torch.where(above, b, a), torch.where(above, a, b), torch.where(above, 1 - x, x)
    edge = y <= 0
    inside = torch.where(edge, 0.5 * torch.ones_like(y), y)
    m = torch.arange(1, _TERMS + 1, dtype=inside.dtype, device=inside.device)
    even, odd = _coefficients(p.unsqueeze(-1), q.unsqueeze(-1), m, inside.unsqueeze(-1))
    fraction = _continued(torch.stack([even, odd], -1).flatten(-2))
    first = -(p + q) * inside / (p + 1)
    log_beta = torch.lgamma(p) + torch.lgamma(q) - torch.lgamma(p + q)
    front = torch.exp(p * inside.log() + q * torch.log1p(-inside) - log_beta - p.log())
    tail = front / (1 + first / (1 + fraction))
    tail = torch.where(edge, torch.zeros_like(tail), tail)
    return torch.where(above, 1 - tail, tail)


def _coefficients(p: Tensor, q: Tensor, m: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients 2 m and 2 m + 1 of the continued fraction."""
    even = m * (q - m) * x / ((p + 2 * m - 1) * (p + 2 * m))
    odd = -(p + m) * (p + q + m) * x / ((p + 2 * m) * (p + 2 * m + 1))
    return even, odd


def _continued(d: Tensor) -> Tensor:
    """d_1 / (1 + d_2 / (1 + ...)) along the last dimension, whose size is a power of two.

    Each level is the map f -> d / (1 + f), a matrix [[0, d], [1, 1]] up to a factor, and levels compose as matrices.
    """
    one = torch.ones_like(d)
    product = torch.stack([torch.stack([torch.zeros_like(d), d], -1), torch.stack([one, one], -1)], -2)
    while product.shape[-3] > 1:
        product = product[..., 0::2, :, :] @ product[..., 1::2, :, :]
        product = product / product.detach().abs().amax((-2, -1), keepdim=True)
    return product[..., 0, 0, 1] / product[..., 0, 1, 1]
