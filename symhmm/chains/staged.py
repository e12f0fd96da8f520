"""The chain operator for chains whose steps go in stages, on the CPU: from torch tensors to the numba kernels and back."""

from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.chains.layout import Layout, common_batch, layout_of
from symhmm.chains.places import LIKE, Array, Places, memory, places
from symhmm.chains.stage_careful import careful_stages_backward, careful_stages_forward
from symhmm.chains.stage_steps import stages_backward, stages_forward, work_size
from symhmm.chains.stage_tables import Tables, tables
from symhmm.chains.stages import Stages
from symhmm.chains.threads import cut, run, thread_count

Sizes = tuple[torch.Size, ...]
Strides = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A batch of chains whose steps go in stages, without its numbers.

    Args:
        layout: how its lanes lie in memory.
        tables: where the stages find their numbers.
        entry: where the entries of all factors lie in memory, counted from the first of a step.
        transition, emission, terminal: where the terms lie.
    """

    layout: Layout
    tables: Tables
    entry: Array
    transition: Places
    emission: Places
    terminal: Places

    @cached_property
    def weights(self) -> int:
        """Weights of all stages of a step."""
        return int(self.entry.size)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """Groups of lanes that go through the recursion as one task."""
        groups = self.layout.padded // self.layout.width
        seconds = groups * self.layout.steps * (20 * self.layout.states + self.tables.products) * 0.5e-9
        return cut(groups, thread_count(seconds, groups))

    @cached_property
    def ends(self) -> Array:
        """Places of the terminal terms [S, lanes]."""
        chains, layout = self.terminal.chains, self.layout
        starts = np.pad(chains, (0, layout.padded - layout.chains), "edge")
        found: Array = starts[None, :] + self.terminal.inner[0] * np.arange(layout.states)[:, None]
        return found

    @cached_property
    def stage_arguments(self) -> tuple[Any, ...]:
        """The stages, as the lane kernels are given them."""
        found = self.tables
        return found.stages, found.address, self.entry, found.largest

    def terms(self, transition: Tensor, emission: Tensor) -> tuple[Any, ...]:
        """Transition and emission terms, as the lane kernels are given them."""
        f, e = self.transition, self.emission
        return (
            LIKE[transition.dtype], transition.data_ptr(), f.lanes, f.time, f.one_for_all,
            emission.data_ptr(), e.lanes, e.time, e.inner[0],
        )  # fmt: skip

    def chain_terms(self, transition: Tensor, emission: Tensor) -> tuple[Any, ...]:
        """The same by chain."""
        f, e = self.transition, self.emission
        return (
            memory(transition, f.extent), f.chains, f.time, memory(emission, e.extent), e.chains, e.time, e.inner[0],
        )  # fmt: skip

    def work(self, like: Tensor, backward: bool) -> list[Tensor]:
        """Memory for each part."""
        found = self.tables
        size = work_size(self.layout.states, self.weights, found.largest, found.stages, self.layout.width)
        return [like.new_empty(size[backward]) for _ in self.parts]


@lru_cache(maxsize=256)
def call_of(
    sizes: Sizes, strides: Strides, dtype: torch.dtype, length: int, stages: Stages, possible: bytes | None = None
) -> Call:
    """The chains of some sizes and strides of transition, emission and terminal terms.

    The entries of the factors are the last dimension of the transition, or its last two.
    """
    lead = len(sizes[1]) - 1
    batch = common_batch(sizes[0][: lead - 1], sizes[1][:-2], sizes[2][:-1])
    layout = layout_of(batch, length, stages.states, dtype, blocks=1)
    f, e, z = (places(n, s, k < 2, layout, 1) for k, (n, s) in enumerate(zip(sizes, strides, strict=True)))
    found = tables(stages, possible)
    index = np.unravel_index(found.place, tuple(sizes[0][lead:]))
    entry = sum((i * s for i, s in zip(index, f.inner, strict=True)), np.zeros_like(found.place))
    return Call(layout, found, entry, f, e, z)


def call_for(
    tensors: tuple[Tensor, Tensor, Tensor], length: int, stages: Stages, possible: bytes | None = None
) -> Call:
    """The same of transition, emission and terminal terms."""
    sizes, strides = tuple(x.shape for x in tensors), tuple(x.stride() for x in tensors)
    return call_of(sizes, strides, tensors[0].dtype, length, stages, possible)


def forward(
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    length: int,
    code: list[int],
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: `Layout.messages` and `Layout.scales`.

    Args:
        transition: shape (*batch, n or 1, F), nats, the entries of the factors of all stages.
        emission: shape (*batch, n or 1, S), nats, on the joint states.
        terminal: shape (*batch, S), nats.
        length: n.
        code: of the `Stages`.
        dtype: of the message, if not that of the terms.
    """
    call = call_for((transition, emission, terminal), length, Stages.decoded(code))
    return run_forward(call, transition, emission, terminal, dtype)


def run_forward(
    call: Call, transition: Tensor, emission: Tensor, terminal: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of a prepared call."""
    layout = call.layout
    messages, scales = layout.messages(transition), layout.scales(transition)
    message = transition.new_empty([*layout.batch, layout.states], dtype=dtype)
    if layout.chains == 0:
        return message, messages, scales
    numbers = memory(terminal, call.terminal.extent)
    ending = numbers[call.ends].astype(np.float64).reshape(-1)
    result, flags = np.empty(layout.states * layout.padded), np.zeros(layout.padded, np.uint8)
    work = call.work(transition, False)
    run([
        partial(
            stages_forward, *part, layout.states, layout.length, layout.padded, *call.stage_arguments,
            *call.terms(transition, emission), ending, messages.data_ptr(), scales.data_ptr(), result, flags,
            own.data_ptr(),
        )
        for part, own in zip(call.parts, work, strict=True)
    ])  # fmt: skip
    found = torch.from_numpy(result.reshape(layout.states, -1)[:, : layout.lanes].T)
    message.copy_(found.reshape(message.shape))
    lost = np.flatnonzero(flags[: layout.lanes])
    if lost.size:
        careful_stages_forward(
            lost, layout.states, layout.length, call.tables.stages, call.tables.numbers, call.entry, call.tables.largest,
            *call.chain_terms(transition, emission), numbers, call.terminal.chains, call.terminal.inner[0],
            memory(messages, layout.entries[0]), memory(scales, layout.entries[1]), layout.padded,
            message.view(-1).numpy(),
        )  # fmt: skip
    return message, messages, scales


def backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    messages: Tensor,
    scales: Tensor,
    length: int,
    code: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    call = call_for((transition, emission, terminal), length, Stages.decoded(code))
    return run_backward(call, weight, transition, emission, terminal, messages, scales)


def run_backward(
    call: Call, weight: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, messages: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`backward` of a prepared call."""
    layout = call.layout
    if layout.chains == 0:
        return torch.zeros_like(transition), torch.zeros_like(emission), torch.zeros_like(terminal)
    if not layout.fits(messages, scales):
        messages, scales = layout.messages(transition).copy_(messages), layout.scales(transition).copy_(scales)
    states, lanes = layout.states, layout.padded
    kept = memory(messages, layout.entries[0])
    first = kept[: states * lanes].reshape(states, lanes)
    weights = np.zeros((states, lanes), kept.dtype)
    rows = weight.expand(*layout.batch, states).reshape(-1, states).contiguous().numpy()
    weights[:, : layout.lanes] = rows.T
    starting = np.divide(weights, first, out=np.zeros_like(weights), where=first > 0).reshape(-1)
    finishing = np.empty(states * lanes, kept.dtype)
    steps, shared = (layout.length if transition.shape[len(layout.batch)] > 1 else 1), call.transition.one_for_all
    parts, count = len(call.parts) if shared else 1, call.weights
    lead = (1,) * len(layout.batch) if shared else layout.batch
    make = torch.zeros if shared else torch.empty
    g_transition = make(parts, *lead, steps, count, dtype=transition.dtype)
    g_emission = emission.new_empty(*layout.batch, layout.length, states)
    ge_row = np.minimum(np.arange(lanes), layout.lanes - 1) * layout.length * states
    work = call.work(transition, True)
    gap = g_transition.stride(0) * g_transition.itemsize if shared else 0
    run([
        partial(
            stages_backward, *part, states, layout.length, lanes, layout.lanes, *call.stage_arguments,
            *call.terms(transition, emission), starting, messages.data_ptr(), scales.data_ptr(),
            g_transition.data_ptr() + k * gap, g_emission.data_ptr(), ge_row, finishing, own.data_ptr(),
        )
        for k, (part, own) in enumerate(zip(call.parts, work, strict=True))
    ])  # fmt: skip
    careful = np.flatnonzero(scales.reshape(layout.lanes, -1)[:, 0].numpy() < 0)
    if careful.size:
        careful_stages_backward(
            careful, states, layout.length, call.tables.stages, call.tables.numbers, call.entry, call.tables.largest,
            rows.reshape(-1), *call.chain_terms(transition, emission), kept, lanes,
            g_transition.view(-1).numpy(), np.arange(layout.chains) * (0 if shared else steps * count),
            count if steps > 1 else 0, g_emission.view(-1).numpy(), finishing,
        )  # fmt: skip
    ends = torch.from_numpy(finishing.reshape(states, lanes)[:, : layout.lanes].T).reshape(*layout.batch, states)
    return (
        _whole(g_transition, call, transition),
        g_emission.sum_to_size(emission.shape).contiguous(),
        ends.sum_to_size(terminal.shape).contiguous(),
    )


def _whole(gradient: Tensor, call: Call, transition: Tensor) -> Tensor:
    """The gradient of all entries of the factors from those of the parts and of the weights that were used."""
    total = gradient[0] if gradient.shape[0] == 1 else gradient.sum(0)
    lead = transition.shape[: len(call.layout.batch) + 1]
    total = total.sum_to_size(*lead, call.weights)
    entries = transition.shape[len(lead) :].numel()
    if call.weights == entries:
        return total.reshape(transition.shape).contiguous()
    whole = total.new_zeros(*lead, entries)
    whole[..., torch.from_numpy(call.tables.place)] = total
    return whole.reshape(transition.shape)
