"""What all calls of the CPU operator share whose tensors have the same sizes and strides: worked out once."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.chains.layout import Layout, common_batch, layout_of
from symhmm.chains.places import LIKE, Array, Places, idle, places
from symhmm.chains.sizes import lane_kernel
from symhmm.memory import LARGE, empty_strided

Sizes = tuple[torch.Size, ...]
Strides = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch of chains without its numbers.

    Args:
        layout: how its lanes lie in memory.
        sizes: of the transition, emission and terminal terms.
        strides: of the same.
        dtype: of the same.
    """

    layout: Layout
    sizes: Sizes
    strides: Strides
    dtype: torch.dtype

    @cached_property
    def size(self) -> int:
        """K."""
        return self.sizes[0][-1]

    @cached_property
    def message_size(self) -> tuple[int, ...]:
        """(*batch, S)."""
        return (*self.layout.batch, self.layout.states)

    def kept(self) -> tuple[Tensor, Tensor, Tensor]:
        """Memory for what the gradient needs: `Layout.messages`, `Layout.scales` and `Layout.links`."""
        (messages, scales, links), exact = self._kept
        if exact:
            return (
                torch.empty_strided(*messages, dtype=self.dtype),
                torch.empty_strided(*scales, dtype=self.dtype),
                torch.empty_strided(*links, dtype=torch.float64),
            )
        like = torch.empty(0, dtype=self.dtype)
        return self.layout.messages(like), self.layout.scales(like), self.layout.links(like)

    @cached_property
    def _kept(self) -> tuple[list[tuple[Any, Any]], bool]:
        """Sizes and strides of `kept`, and whether torch may make them: no lane is left empty, and they are not large."""
        like = torch.empty(0, dtype=self.dtype)
        made = self.layout.messages(like), self.layout.scales(like), self.layout.links(like)
        small = self.layout.entries[0] * self.dtype.itemsize < LARGE
        return [(x.size(), x.stride()) for x in made], small and self.layout.padded == self.layout.lanes

    @cached_property
    def like(self) -> Any:
        """A number of the dtype."""
        return LIKE[self.dtype]

    @cached_property
    def groups(self) -> int:
        """Groups of lanes that go through the recursion together."""
        return self.layout.padded // self.layout.width

    @cached_property
    def seconds(self) -> float:
        """Rough time of the messages of all lanes; that of the gradients is about twice as long."""
        states, time = self.layout.states, self.transition.time
        return self.groups * self.layout.steps * (5 + 7 * states + (2.4 if time else 0.3) * states * self.size) * 1e-9

    @cached_property
    def transition(self) -> Places:
        """Where the transition terms lie."""
        return self._places(0, 1)

    @cached_property
    def emission(self) -> Places:
        """Where the emission terms lie."""
        return self._places(1, 1)

    @cached_property
    def terminal(self) -> Places:
        """Where the terminal terms lie."""
        return places(self.sizes[2], self.strides[2], False, self.layout, 1)

    @cached_property
    def units(self) -> Array:
        """Unit messages (S, lanes), nats, one for each state at the end of a block: their messages are its product."""
        if self.layout.blocks == 1:
            return np.empty(0)
        states = self.layout.states
        lanes = np.arange(idle(self.layout, states).size)
        return np.where(lanes % states == np.arange(states)[:, None], 0.0, -np.inf).reshape(-1)

    @cached_property
    def forward_arguments(self) -> tuple[Any, ...]:
        """Arguments of `symhmm.chains.passes.forward_pass` that do not hang on the numbers."""
        layout, copies = self.layout, self.layout.states if self.layout.blocks > 1 else 1
        f, e, z = self.transition, self.emission, self.terminal
        units = (self._places(0, copies), self._places(1, copies))
        shape = (
            self.size, layout.states // self.size, layout.steps, layout.chains, layout.blocks,
            layout.padded, units[0].lanes.size,
        )  # fmt: skip
        return (
            shape,
            (f.lanes, units[0].lanes, f.time, *f.inner, f.one_for_all),
            (e.lanes, units[1].lanes, e.time, *e.inner),
            (z.chains, *z.inner),
            (idle(layout, 1), idle(layout, copies)),
        )

    @cached_property
    def gradients(self) -> tuple["Gradient", "Gradient"]:
        """How the gradients of the transition and of the emission terms are written."""
        return (
            self._gradient(0, 3, _contiguous(self.sizes[0]), written=False),
            self._gradient(1, 2, _alike(self.sizes[1], self.strides[1]), written=True),
        )

    @cached_property
    def backward_arguments(self) -> tuple[Any, ...]:
        """Arguments of `symhmm.chains.passes.backward_pass` that do not hang on the numbers."""
        layout, (f, e, *_) = self.layout, self.forward_arguments[1:]
        (gf, ge), size = self.gradients, self.sizes[2]
        gz = places(size, _contiguous(size), False, layout, 1)
        shape = (*self.forward_arguments[0][:6], layout.lanes)
        return (
            shape, f, e, idle(layout, 1),
            (gf.places.lanes, gf.places.time), (ge.places.lanes, ge.places.time, *ge.places.inner, ge.shared), gz.chains,
        )  # fmt: skip

    def kernel(self, name: str) -> Any:
        """A pass compiled for this number of states."""
        layout = self.layout
        return lane_kernel(name, self.size, layout.states // self.size, layout.chains * layout.length)

    def _places(self, term: int, copies: int) -> Places:
        return places(self.sizes[term], self.strides[term], True, self.layout, copies)

    def _gradient(self, term: int, event: int, stride: tuple[int, ...], *, written: bool) -> "Gradient":
        size, layout = self.sizes[term], self.layout
        chains = size[: len(size) - event].numel()
        constant = size[-event] == 1 and layout.length > 1
        shared = chains < layout.chains or constant
        crossed = chains < layout.chains or (constant and layout.blocks > 1)
        found = places(size, stride, True, layout, 1)
        return Gradient(size, stride, self.dtype, found, shared, crossed, zeroed=shared or not written)


@dataclass(frozen=True)
class Gradient:
    """Where and how the gradient of one input is written.

    Args:
        size: of the input.
        stride: of the gradient, which has no gaps.
        dtype: of the input.
        places: where its numbers lie.
        shared: whether several lanes or steps add to the same numbers.
        crossed: whether two parts of the lanes may.
        zeroed: whether it starts at zero.
    """

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    places: Places
    shared: bool
    crossed: bool
    zeroed: bool

    def parts(self, count: int) -> tuple[Tensor, Tensor, int]:
        """The gradient, and memory in which it is written: its own, or (parts, numbers) one for each of ``count`` parts of
        the work that would add to the same numbers; and the bytes from each to the next."""
        gradient = self._empty(self.size, self.stride, dtype=self.dtype)
        if count == 1 or not self.crossed:
            return gradient, gradient.zero_() if self.zeroed else gradient, 0
        entries = self.size.numel()
        return gradient, torch.zeros((count, entries), dtype=self.dtype), entries * self.dtype.itemsize

    @cached_property
    def _empty(self) -> Callable[..., Tensor]:
        # Torch's own is faster by the time of a pass over fifty steps.
        return empty_strided if self.size.numel() * self.dtype.itemsize >= LARGE else torch.empty_strided

    def total(self, gradient: Tensor, written: Tensor) -> Tensor:
        """The gradient with what the parts of the work have added up."""
        if written is not gradient:
            torch.sum(written, 0, out=gradient.as_strided((written.shape[1],), (1,)))
        return gradient


@lru_cache(maxsize=256)
def prepared(sizes: Sizes, strides: Strides, dtype: torch.dtype, length: int, blocks: int | None = None) -> Prepared:
    """The chains of some sizes and strides; ``blocks`` overrules into how many pieces they are cut."""
    batch = common_batch(sizes[0][:-3], sizes[1][:-2], sizes[2][:-1])
    layout = layout_of(batch, length, sizes[0][-2], dtype, blocks)
    return Prepared(layout, sizes, strides, dtype)


def _contiguous(size: torch.Size) -> tuple[int, ...]:
    return torch.empty(size, device="meta").stride()


def _alike(size: torch.Size, stride: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a tensor without gaps whose dimensions have the same order in memory."""
    # Memory that nobody touches costs nothing; on the meta device torch asks sympy, which takes a third of a second to import.
    return torch.empty_like(torch.empty_strided(size, stride)).stride()
