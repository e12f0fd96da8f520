"""The chain operator on the CPU: from torch tensors to the numba kernels and back."""

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains.careful import careful_backward, careful_forward
from symhmm.chains.joins import identity, join_backward, join_forward, read_terminal
from symhmm.chains.layout import Layout, common_batch, layout_of
from symhmm.chains.places import LIKE, Array, Places, idle, memory, places, terms
from symhmm.chains.sizes import lane_kernel
from symhmm.chains.threads import cut, run, thread_count


def _saved(messages: Tensor, scales: Tensor, layout: Layout) -> tuple[Array, Array]:
    """The memory of messages and scales, padding included."""
    return memory(messages, (layout.steps + 1) * layout.states * layout.padded), memory(
        scales, layout.steps * layout.padded
    )


def _seconds(layout: Layout, groups: int, size: int, transition: Places) -> float:
    """Rough time of one recursion over some groups of lanes."""
    moves = layout.states * size
    return groups * layout.steps * (25 * size + (20 if transition.time else 0.6) * moves + 100) * 0.37e-9


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: `Layout.messages`, `Layout.scales` and `Layout.links`."""
    states, size = transition.shape[-2:]
    rest = states // size
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    layout = layout_of(batch, length, states, transition.dtype)
    padded = layout.padded
    messages, scales, links = layout.messages(transition), layout.scales(transition), layout.links(transition)
    message = transition.new_empty([*batch, states])
    if layout.chains == 0:
        return message, messages, scales, links
    lanes_forward = lane_kernel("lanes_forward", size, rest, layout.chains * length)
    addresses = transition.data_ptr(), emission.data_ptr(), messages.data_ptr(), scales.data_ptr()
    like = LIKE[transition.dtype]

    def recursion(ending: Array, copies: int, keep: bool) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        f = places(transition.shape, transition.stride(), True, layout, copies)
        e = places(emission.shape, emission.stride(), True, layout, copies)
        lanes = f.lanes.size
        result, flags = np.empty(states * lanes), np.zeros(lanes, np.uint8)
        groups = lanes // layout.width
        run([
            partial(
                lanes_forward, first, last, size, rest, layout.steps, lanes, idle(layout, copies),
                like, addresses[0], f.lanes, f.time, *f.inner, f.one_for_all,
                addresses[1], e.lanes, e.time, *e.inner,
                ending, keep, addresses[2], addresses[3], result, flags,
            )
            for first, last in cut(groups, thread_count(_seconds(layout, groups, size, f), groups))
        ])  # fmt: skip
        return result, flags

    terminals, z = terms(terminal, 1, layout)
    ending = np.zeros(states * padded)
    read_terminal(ending, padded, layout.blocks, states, terminals, z.chains, *z.inner)
    joined = np.zeros(padded, np.uint8)
    if layout.blocks > 1:
        lanes = idle(layout, states).size
        units = np.empty(states * lanes)
        identity(units, lanes, states)
        products, flags = recursion(units, states, keep=False)
        join_forward(
            layout.chains, layout.blocks, states, products, lanes, flags,
            ending, padded, links.view(-1).numpy(), joined,
        )  # fmt: skip
    result, flags = recursion(ending, 1, keep=True)
    flags |= joined
    starts = result.reshape(states, padded)[:, : layout.lanes : layout.blocks].T
    message.copy_(torch.from_numpy(starts).view(message.shape))
    if flags[: layout.lanes].any():
        (transitions, f), (emissions, e) = terms(transition, 3, layout), terms(emission, 2, layout)
        lost = np.flatnonzero(flags[: layout.lanes].reshape(-1, layout.blocks).any(-1))
        careful_forward(
            lost, size, rest, np.array(layout.starts),
            transitions, f.chains, f.time, *f.inner, emissions, e.chains, e.time, *e.inner,
            terminals, z.chains, *z.inner, *_saved(messages, scales, layout), padded, message.view(-1).numpy(),
        )  # fmt: skip
    return message, messages, scales, links


def backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    messages: Tensor,
    scales: Tensor,
    links: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    states, size = transition.shape[-2:]
    rest = states // size
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    # The chains stay cut as they were: under vmap the batch may be larger here than it was in the forward pass.
    layout = layout_of(batch, length, states, transition.dtype, blocks=messages.shape[-3])
    padded = layout.padded
    if layout.chains == 0:
        return torch.zeros_like(transition), torch.zeros_like(emission), torch.zeros_like(terminal)
    if not layout.fits(messages, scales):
        messages, scales = layout.messages(transition).copy_(messages), layout.scales(transition).copy_(scales)
    f = places(transition.shape, transition.stride(), True, layout, 1)
    e = places(emission.shape, emission.stride(), True, layout, 1)
    stored, scale = _saved(messages, scales, layout)
    weights = weight.expand(*batch, states).reshape(-1).numpy()
    fast = scale[: layout.lanes : layout.blocks] > 0
    starting, finishing = np.empty(states * padded, stored.dtype), np.empty(states * padded, stored.dtype)
    join_backward(
        layout.chains, layout.blocks, states, weights, fast,
        links.expand(*batch, *links.shape[-3:]).reshape(-1).numpy(), stored, padded, starting,
    )  # fmt: skip
    lanes_backward = lane_kernel("lanes_backward", size, rest, layout.chains * length)
    groups = padded // layout.width
    parts = cut(groups, thread_count(2 * _seconds(layout, groups, size, f), groups))
    g_transition = _Accumulator(transition, 3, layout, len(parts), written=False)
    g_emission = _Accumulator(emission, 2, layout, len(parts), written=True)
    gf, ge = g_transition.places, g_emission.places
    run([
        partial(
            lanes_backward, first, last, size, rest, layout.steps, padded, layout.lanes, idle(layout, 1),
            LIKE[transition.dtype], transition.data_ptr(), f.lanes, f.time, *f.inner, f.one_for_all,
            emission.data_ptr(), e.lanes, e.time, *e.inner, starting, messages.data_ptr(), scales.data_ptr(),
            g_transition.part(k).data_ptr(), gf.lanes, gf.time,
            g_emission.part(k).data_ptr(), ge.lanes, ge.time, g_emission.shared,
            finishing,
        )
        for k, (first, last) in enumerate(parts)
    ])  # fmt: skip
    ends = finishing.reshape(states, padded)[:, layout.blocks - 1 : layout.lanes : layout.blocks].T
    occupancy = torch.from_numpy(ends).reshape(*batch, states)
    g_terminal = (
        occupancy if occupancy.shape == terminal.shape else occupancy.sum_to_size(terminal.shape)
    ).contiguous()
    if not fast.all():
        terminals, gz = terms(g_terminal, 1, layout)
        careful_backward(
            np.flatnonzero(~fast), size, rest, np.array(layout.starts), weights,
            memory(transition, f.extent), f.chains, f.time, *f.inner,
            memory(emission, e.extent), e.chains, e.time, *e.inner, stored, padded,
            memory(g_transition.part(0), gf.extent), gf.chains, gf.time,
            memory(g_emission.part(0), ge.extent), ge.chains, ge.time, terminals, gz.chains,
        )  # fmt: skip
    return g_transition.total(), g_emission.total(), g_terminal


class _Accumulator:
    """The gradient of one input: one tensor, or one per thread where threads would add to the same numbers."""

    def __init__(self, x: Tensor, event: int, layout: Layout, threads: int, *, written: bool) -> None:
        chains = x.shape[: x.dim() - event].numel()
        constant = x.shape[-event] == 1 and layout.length > 1
        self.shared = chains < layout.chains or constant
        crossed = chains < layout.chains or (constant and layout.blocks > 1)
        make = torch.zeros if self.shared or not written else torch.empty
        self.parts = [make(x.shape, dtype=x.dtype) for _ in range(threads if crossed else 1)]
        self.places = places(x.shape, self.parts[0].stride(), True, layout, 1)

    def part(self, thread: int) -> Tensor:
        """What a thread adds to."""
        return self.parts[thread % len(self.parts)]

    def total(self) -> Tensor:
        """Sum over the threads."""
        for part in self.parts[1:]:
            self.parts[0] += part
        return self.parts[0]
