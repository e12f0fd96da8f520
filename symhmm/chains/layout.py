"""How the CPU kernels lay a batch of chains out in memory: vector lanes side by side, long chains cut into blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

VECTOR_BYTES = 64


@dataclass(frozen=True)
class Layout:
    """Sizes from which the operator, its fake twin and its kernels derive the same shapes and strides.

    Args:
        batch: broadcast batch of the chains.
        length: number of steps.
        states: joint states S.
        width: vector lanes of the dtype.
        blocks: into how many pieces each chain is cut; each is a lane of its own.
    """

    batch: tuple[int, ...]
    length: int
    states: int
    width: int
    blocks: int

    @property
    def chains(self) -> int:
        """Number of chains in the batch."""
        return prod(self.batch)

    @property
    def lanes(self) -> int:
        """Lanes in use: chain by chain, block by block."""
        return self.chains * self.blocks

    @property
    def padded(self) -> int:
        """Lanes with the last vector filled up."""
        return ceil(self.lanes / self.width) * self.width

    @property
    def steps(self) -> int:
        """Steps of the longest block; the first blocks may have one less."""
        return ceil(self.length / self.blocks)

    def starts(self) -> list[int]:
        """First step of each block, and the end; where blocks differ, the last ones are longer."""
        short, longer = divmod(self.length, self.blocks)
        return [p * short + max(0, p - (self.blocks - longer)) for p in range(self.blocks + 1)]

    def fits(self, messages: Tensor) -> bool:
        """Whether saved messages still lie in memory as `messages` makes them, padding included."""
        like = self.messages(torch.empty(0, dtype=messages.dtype, device="meta"))
        end = messages.storage_offset() + (self.steps + 1) * self.states * self.padded
        return (
            messages.shape == like.shape
            and messages.stride() == like.stride()
            and messages.untyped_storage().nbytes() >= end * messages.itemsize
        )

    def messages(self, like: Tensor) -> Tensor:
        """Empty (*batch, blocks, steps + 1, S); in memory the lanes are innermost."""
        return self._empty(like, self.steps + 1, self.states)

    def scales(self, like: Tensor) -> Tensor:
        """Empty (*batch, blocks, steps)."""
        return self._empty(like, self.steps)

    def links(self, like: Tensor) -> Tensor:
        """Empty (*batch, blocks - 1, S, S): probability of the state after a block given the state before it."""
        return like.new_empty([*self.batch, self.blocks - 1, self.states, self.states], dtype=torch.float64)

    def _empty(self, like: Tensor, *event: int) -> Tensor:
        lead = len(event)
        memory = like.new_empty([*event, self.padded])[..., : self.lanes].unflatten(-1, (*self.batch, self.blocks))
        return memory.permute(*range(lead, memory.dim()), *range(lead))


def layout_of(batch: Sequence[int], length: int, states: int, dtype: torch.dtype) -> Layout:
    """Cut long chains into so many blocks that the lanes are full, where that is cheaper than leaving lanes empty.

    A block costs S more lanes in the forward pass, which carry the product of its matrices.

    >>> layout_of((1,), 200_000, 4, torch.float32).blocks, layout_of((40,), 1800, 3, torch.float32).blocks
    (32, 1)
    """
    width = VECTOR_BYTES // dtype.itemsize
    chains = prod(batch)

    def cost(blocks: int) -> float:
        vectors = 2 * ceil(chains * blocks / width) + (ceil(chains * blocks * states / width) if blocks > 1 else 0)
        return ceil(length / blocks) * vectors + 0.2 * chains * blocks * states**2

    choices = [1] if chains == 0 else [p for p in (1, 2, 4, 8, 16, 32) if p == 1 or length >= 8 * p]
    return Layout(tuple(batch), length, states, width, min(choices, key=cost))
