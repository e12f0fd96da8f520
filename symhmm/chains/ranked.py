"""The k best hidden paths of a batch of chains: from torch tensors to the numba kernels and back."""

import torch
from torch import Tensor

from symhmm.chains import ranked_steps


def ranked_messages(
    transition: Tensor, emission: Tensor, length: int, count: int, batch: list[int], stops: Tensor | None
) -> tuple[Tensor, ...]:
    """Sorted lists of the ``count`` best scores of what follows each state of each step of a batch of chains.

    Args:
        transition: shape (*batch, T or 1, S, K, ranks), nats: sorted scores of each move; sizes of 1 are shared.
        emission: shape (*batch, T or 1, K, ranks), nats.
        stops: shape (*batch,) or broadcasting to it, steps that count.

    Returns:
        what `ranked_follow` wants; the last of them has shape (chains, T + 1, S, count), nats.
    """
    t_batch, e_batch = (
        list(x.shape[:n]) for x, n in ((transition, transition.dim() - 4), (emission, emission.dim() - 3))
    )
    full = torch.Size(batch)
    stop = torch.full((), length) if stops is None else stops
    arrays = (
        transition.reshape(-1, *transition.shape[-4:]).contiguous(), _rows(t_batch, full),
        emission.reshape(-1, *emission.shape[-3:]).contiguous(), _rows(e_batch, full),
        stop.expand(full).reshape(-1).contiguous(),
        torch.empty(full.numel(), length + 1, transition.shape[-3], count, dtype=torch.float64),
    )  # fmt: skip
    ranked_steps.ranked_recursion(0, full.numel(), *(x.numpy() for x in arrays))
    return arrays


def ranked_follow(
    found: tuple[Tensor, ...], rows: Tensor, start: Tensor, rank: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """States of the path of each rank, and the ranks of its moves and emissions; shape (P, T) each.

    Args:
        rows, start, rank: shape (P,): the chain of each path, its initial state, and its place among the best.
    """
    length = found[-1].shape[1] - 1
    out = tuple(torch.zeros(rows.numel(), length, dtype=torch.int64) for _ in range(3))
    places = (x.contiguous().numpy() for x in (rows, start, rank))
    ranked_steps.ranked_follow(0, rows.numel(), *places, *(x.numpy() for x in found), *(x.numpy() for x in out))
    return out[0], out[1], out[2]


def _rows(own: list[int], batch: torch.Size) -> Tensor:
    size = torch.Size(own)
    return torch.arange(size.numel()).reshape(size).expand(batch).reshape(-1).contiguous()
