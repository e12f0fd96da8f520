"""The chain operator on the CPU: from torch tensors to the numba kernels and back."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains.careful import careful_backward, careful_forward


@dataclass(frozen=True)
class Strided:
    """A tensor as the kernels read it: its memory as one flat array, where each chain starts in it, and strides."""

    flat: NDArray[np.floating]
    rows: NDArray[np.int64]
    strides: tuple[int, ...]


def _strided(x: Tensor, batch: tuple[int, ...], event: int, timed: bool) -> Strided:
    """Chains of the broadcast ``batch`` in row-major order; a size of 1 along time gets stride 0."""
    lead = x.dim() - event
    size, stride = x.shape, x.stride()
    rows = np.zeros((), dtype=np.int64)
    for d, n in enumerate(batch):
        rows = rows[..., None] + np.arange(n) * (stride[d] if size[d] > 1 else 0)
    tail = list(stride[lead:])
    if timed and size[lead] == 1:
        tail[0] = 0
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if x.numel() else 0
    flat = x.as_strided((extent,), (1,), x.storage_offset()).numpy()
    return Strided(flat, rows.reshape(-1), tuple(tail))


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, history: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Message (*batch, S), normalised messages (*batch, n + 1, S) and their scales (*batch, n)."""
    batch = tuple(torch.broadcast_shapes(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1]))
    states, size = transition.shape[-2:]
    lanes = int(np.prod(batch))
    f, e, z = (
        _strided(transition, batch, 3, True),
        _strided(emission, batch, 2, True),
        _strided(terminal, batch, 1, False),
    )
    message = transition.new_empty(*batch, states)
    messages, scales = transition.new_empty(length + 1, states, lanes), transition.new_empty(length, lanes)
    careful_forward(
        np.arange(lanes), size, states // size, length, f.flat, f.rows, *f.strides, e.flat, e.rows, *e.strides,
        z.flat, z.rows, *z.strides, messages.view(-1).numpy(), lanes, scales.view(-1).numpy(), message.view(-1).numpy(),
    )  # fmt: skip
    n = len(batch)
    return (
        message,
        messages.view(length + 1, states, *batch).permute(*range(2, n + 2), 0, 1),
        scales.view(length, *batch).permute(*range(1, n + 1), 0),
    )


def backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    messages: Tensor,
    scales: Tensor,
    length: int,
    history: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    batch = tuple(torch.broadcast_shapes(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1]))
    states, size = transition.shape[-2:]
    lanes = int(np.prod(batch))
    n = len(batch)
    f, e = _strided(transition, batch, 3, True), _strided(emission, batch, 2, True)
    gradients = tuple(torch.zeros(x.shape, dtype=x.dtype) for x in (transition, emission, terminal))
    gf, ge, gz = (_strided(g, batch, k, k > 1) for g, k in zip(gradients, (3, 2, 1), strict=True))
    stored = messages.permute(n, n + 1, *range(n)).contiguous().view(-1).numpy()
    careful_backward(
        np.arange(lanes), size, states // size, length, weight.expand(*batch, states).reshape(-1).numpy(),
        f.flat, f.rows, *f.strides, e.flat, e.rows, *e.strides, stored, lanes,
        gf.flat, gf.rows, gf.strides[0], ge.flat, ge.rows, ge.strides[0], gz.flat, gz.rows,
    )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]
