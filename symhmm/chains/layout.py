"""How the CPU kernels lay a batch of chains out in memory: vector lanes side by side, long chains cut into blocks."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil, prod

import torch
from torch import Tensor

from symhmm.memory import empty_strided

VECTOR_BYTES = 64
DEVICE_STATES = (
    256  # that a kernel for a device takes: a program holds all moves of a step, beyond 64 of them partly in memory
)
ALONE = 2**15  # steps in all chains below which one thread does all the work


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

    @cached_property
    def chains(self) -> int:
        """Number of chains in the batch."""
        return prod(self.batch)

    @cached_property
    def lanes(self) -> int:
        """Lanes in use: chain by chain, block by block."""
        return self.chains * self.blocks

    @cached_property
    def padded(self) -> int:
        """Lanes with the last vector filled up."""
        return ceil(self.lanes / self.width) * self.width

    @cached_property
    def steps(self) -> int:
        """Steps of the longest block; the first blocks may have one less."""
        return ceil(self.length / self.blocks)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First step of each block, and the end; where blocks differ, the last ones are longer."""
        short, longer = divmod(self.length, self.blocks)
        return tuple(p * short + max(0, p - (self.blocks - longer)) for p in range(self.blocks + 1))

    @cached_property
    def entries(self) -> tuple[int, int]:
        """Numbers in the memory of the messages and of the scales, padding included."""
        return (self.steps + 1) * self.states * self.padded, self.steps * self.padded

    def messages(self, like: Tensor) -> Tensor:
        """Empty (*batch, blocks, steps + 1, S); in memory the lanes are innermost."""
        return self._empty(0, like)

    def scales(self, like: Tensor) -> Tensor:
        """Empty (*batch, blocks, steps)."""
        return self._empty(1, like)

    def _empty(self, which: int, like: Tensor) -> Tensor:
        entries = (self.entries[which],)
        if type(like) is Tensor and like.device.type == "cpu":
            return empty_strided(entries, (1,), like.dtype).as_strided(*self._strided[which])
        return like.new_empty(entries).as_strided(*self._strided[which])  # a fake twin, or on another device

    def links(self, like: Tensor) -> Tensor:
        """Empty (*batch, blocks - 1, S, S): probability of the state after a block given the state before it."""
        return like.new_empty([*self.batch, self.blocks - 1, self.states, self.states], dtype=torch.float64)

    def fits(self, messages: Tensor, scales: Tensor) -> bool:
        """Whether saved tensors still lie in memory as they were made, padding included."""
        # Written out: it is asked at every gradient, and a generator takes as long as a short chain.
        (size, stride), (other_size, other_stride) = self._strided
        return (
            messages.shape == size
            and messages.stride() == stride
            and scales.shape == other_size
            and scales.stride() == other_stride
            and _holds(messages, self.entries[0])
            and _holds(scales, self.entries[1])
        )

    @cached_property
    def _strided(self) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        """Shape and strides of the messages and of the scales."""
        lanes = (*self.batch, self.blocks)
        inner = tuple(prod(lanes[d + 1 :]) for d in range(len(lanes)))
        states, padded = self.states, self.padded
        return (
            ((*lanes, self.steps + 1, states), (*inner, states * padded, padded)),
            ((*lanes, self.steps), (*inner, padded)),
        )


def _holds(x: Tensor, entries: int) -> bool:
    return x.untyped_storage().nbytes() >= (x.storage_offset() + entries) * x.itemsize


@lru_cache(maxsize=256)
def layout_of(
    batch: tuple[int, ...], length: int, states: int, dtype: torch.dtype, blocks: int | None = None
) -> Layout:
    """Cut long chains into so many blocks that the lanes are full, where that is cheaper than leaving lanes empty.

    A block costs S more lanes in the forward pass, which carry the product of its matrices. ``blocks`` overrules.

    >>> layout_of((1,), 200_000, 4, torch.float32).blocks, layout_of((40,), 1800, 3, torch.float32).blocks
    (32, 1)
    """
    width = VECTOR_BYTES // dtype.itemsize
    chains = prod(batch)
    cores = 1 if chains * length < ALONE else 2

    def cost(blocks: int) -> float:
        # Two recursions over the blocks and one over the columns of their products.
        lanes = [chains * blocks] * 2 + ([chains * blocks * states] if blocks > 1 else [])
        return ceil(length / blocks) * sum(ceil(n / (cores * width)) for n in lanes) + 0.2 * chains * blocks * states**2

    choices = [1] if chains == 0 else [p for p in (1, 2, 4, 8, 16, 32) if p == 1 or length >= 8 * p]
    return Layout(batch, length, states, width, blocks or min(choices, key=cost))


AT_ONCE = 2**17  # numbers [chains, from, to] of one step that take a device no longer than a single one
SHORTEST = 4  # steps of a block
CUT = 100  # steps in the time of what is done once more because there are blocks


def device_layout_of(batch: tuple[int, ...], length: int, states: int) -> Layout:
    """The same on a device, where a step takes as long for one chain as for thousands: few long chains are cut.

    >>> device_layout_of((1,), 100_000, 4).blocks, device_layout_of((5000,), 1000, 4).blocks
    (2048, 1)
    """
    return Layout(tuple(batch), length, states, width=1, blocks=_cut(prod(batch), length, states, 2)[1])


def device_layout_between(layout: Layout) -> Layout:
    """The chain of blocks of a chain in blocks, which may be cut as well: as many divide its blocks evenly."""
    blocks = _cut(layout.chains, layout.blocks, layout.states, 1)[1]
    return Layout(layout.batch, layout.blocks, layout.states, 1, blocks if layout.blocks % blocks == 0 else 1)


@lru_cache(maxsize=256)
def _cut(chains: int, length: int, states: int, levels: int) -> tuple[float, int]:
    """Value and gradient in units of one step of few chains, and the number of blocks, by count."""
    numbers = (1 << (states - 1).bit_length()) ** 2

    def step(lanes: int) -> float:
        return max(1.0, lanes * numbers / AT_ONCE)

    found, blocks = (2 * length * step(chains), 1), 2
    while levels and length >= SHORTEST * blocks:
        lanes = chains * blocks
        passes = step(lanes * states) + 2 * step(lanes)  # products of blocks, messages, occupancies
        cost = ceil(length / blocks) * passes + CUT + _cut(chains, blocks, states, levels - 1)[0]
        found, blocks = min(found, (cost, blocks)), 2 * blocks
    return found


def device_sizes(batch: tuple[int, ...], length: int, states: int) -> tuple[tuple[int, ...], ...]:
    """Sizes of the message and of what the kernels for a device keep: messages, those between blocks, products of blocks."""
    layout = device_layout_of(batch, length, states)
    blocks, between = layout.blocks, 0
    if blocks > 1:
        coarse = device_layout_between(layout)
        between = coarse.blocks * (coarse.steps + 1)
        if coarse.blocks > 1:
            between += coarse.blocks + 1
            blocks += coarse.blocks
    return (
        (*batch, states),
        (*batch, layout.blocks, layout.steps + 1, states),
        (*batch, 1, between, states),
        (*batch, blocks * (between > 0), states, states),
    )


def common_batch(*batches: torch.Size) -> tuple[int, ...]:
    """Broadcast shape of batches that fit each other and have the same number of dimensions."""
    return tuple(next((n for n in sizes if n != 1), 1) for sizes in zip(*batches, strict=True))
