"""Weighted squares of sums that are linear in data, and their gradients: from torch tensors to the numba kernels and back.

``out[b, k, r] = before[b, k, r] + scale[b, k] (sum_j weights[b, j, k] rows[b, j, r])^2``: what makes the emission terms of
normal observations.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from symhmm.chains.places import LIKE
from symhmm.chains.square_steps import add_squares, sum_gradients
from symhmm.chains.threads import cut, run, thread_count


def forward(before: Tensor, scale: Tensor, weights: Tensor, rows: Tensor) -> Tensor:
    """The result, shape (B, K, R), of ``before`` (B, K, R or 1), ``scale`` (B, K), ``weights`` (B, J, K), ``rows`` (B, J, R)."""
    sizes = groups, _, size, columns = _sizes(weights, rows)
    out = rows.new_empty(groups, size, columns)
    inputs = [x.contiguous() for x in (before, scale, weights, rows)]
    first, *others = [x.data_ptr() for x in (*inputs, out)]
    addresses = first, int(before.shape[2] > 1), *others
    run([partial(add_squares, *part, sizes, LIKE[rows.dtype], *addresses) for part in _parts(sizes)])
    return out


def backward(gradient: Tensor, weights: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradient (B, K, R): its sums (B, K, 1), the gradient of the scale (B, K), and the slopes (B, J, K), which times
    twice the scale are the gradient of the weights."""
    sizes = groups, terms, size, _ = _sizes(weights, rows)
    inputs = [x.contiguous() for x in (gradient, weights, rows)]
    parts = _parts(sizes)
    sums = np.zeros((len(parts), groups, size, terms + 2, 64 // rows.dtype.itemsize))
    addresses = [x.data_ptr() for x in inputs]
    like = LIKE[rows.dtype]
    run(
        [
            partial(sum_gradients, *part, sizes, like, *addresses, s.reshape(-1))
            for part, s in zip(parts, sums, strict=True)
        ]
    )
    total = torch.from_numpy(sums.sum((0, -1))).to(rows.dtype)
    # Without gaps, as the fake twin of the operator has them.
    return total[..., :1].contiguous(), total[..., 1].contiguous(), total[..., 2:].mT.contiguous()


def _sizes(weights: Tensor, rows: Tensor) -> tuple[int, int, int, int]:
    return (*weights.shape, rows.shape[2])


def _parts(sizes: tuple[int, int, int, int]) -> list[tuple[int, int]]:
    """The columns of each thread."""
    groups, terms, size, columns = sizes
    return cut(columns, thread_count(groups * size * columns * (terms + 2) * 1e-10, columns))
