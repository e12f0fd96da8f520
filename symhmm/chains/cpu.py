"""The chain operator on the CPU: from torch tensors to the numba kernels and back."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains.careful import careful_backward, careful_forward
from symhmm.chains.joins import identity, join_backward, join_forward, read_terminal
from symhmm.chains.lanes_backward import lanes_backward
from symhmm.chains.lanes_forward import lanes_forward
from symhmm.chains.layout import Layout, layout_of
from symhmm.chains.threads import cut, run, thread_count

Array = NDArray[np.generic]


@dataclass(frozen=True)
class Terms:
    """A tensor as the kernels read it.

    Args:
        flat: its memory.
        rows: where each chain starts in it.
        time: distance from one step to the next, 0 if it is constant over time.
        inner: the other strides.
    """

    flat: Array
    rows: NDArray[np.int64]
    time: int
    inner: tuple[int, ...]

    def lanes(self, layout: Layout, copies: int = 1) -> NDArray[np.int64]:
        """Where each lane starts: block by block, ``copies`` times each; the last vector is filled up by repetition."""
        if layout.blocks == 1 and layout.padded == layout.lanes and copies == 1:
            return self.rows
        starts = self.rows[:, None] + np.array(layout.starts()[:-1]) * self.time
        rows = np.repeat(starts.reshape(-1), copies)
        return np.pad(rows, (0, -len(rows) % layout.width), "edge")

    def one_for_all(self, layout: Layout) -> bool:
        """Whether all lanes read the same numbers at the same time."""
        return bool((self.rows == self.rows[0]).all()) and (layout.blocks == 1 or self.time == 0)


def _terms(x: Tensor, batch: tuple[int, ...], event: int) -> Terms:
    """The memory of ``x`` (*batch, [time,] ..) with the chains of the broadcast ``batch`` in row-major order."""
    lead = x.dim() - event
    size, stride = x.shape, x.stride()
    rows = np.zeros((), dtype=np.int64)
    for d, n in enumerate(batch):
        rows = rows[..., None] + np.arange(n, dtype=np.int64) * (stride[d] if size[d] > 1 else 0)
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if x.numel() else 0
    flat = x.detach().as_strided((extent,), (1,), x.storage_offset()).numpy()
    if event == 1:
        return Terms(flat, rows.reshape(-1), 0, stride[lead:])
    return Terms(flat, rows.reshape(-1), stride[lead] if size[lead] > 1 else 0, stride[lead + 1 :])


def _memory(x: Tensor, count: int) -> Array:
    """The first ``count`` numbers from where ``x`` starts."""
    return x.as_strided((count,), (1,), x.storage_offset()).numpy()


def _shape(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int
) -> tuple[tuple[int, ...], int, int, Layout]:
    batch = tuple(torch.broadcast_shapes(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1]))
    states, size = transition.shape[-2:]
    return batch, size, states // size, layout_of(batch, length, states, transition.dtype)


def _seconds(layout: Layout, groups: int, size: int, time_varying: bool) -> float:
    """Rough time of one recursion over some groups of lanes."""
    moves = layout.states * size
    return groups * layout.steps * (10 * size + (30 if time_varying else 1) * moves + 40) * 0.4e-9


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, history: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: messages (*batch, blocks, steps + 1, S), scales and links."""
    batch, size, rest, layout = _shape(transition, emission, terminal, length)
    states, padded = layout.states, layout.padded
    messages, scales, links = layout.messages(transition), layout.scales(transition), layout.links(transition)
    message = transition.new_empty([*batch, states])
    if layout.chains == 0:
        return message, messages, scales, links
    f, e, z = _terms(transition, batch, 3), _terms(emission, batch, 2), _terms(terminal, batch, 1)
    starts = np.array(layout.starts())
    short = np.diff(starts) < layout.steps
    stored = _memory(messages, (layout.steps + 1) * states * padded)
    scale = _memory(scales, layout.steps * padded)

    def recursion(ending: Array, copies: int, keep: bool) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
        lanes = ending.size // states
        groups = lanes // layout.width
        idle = np.resize(np.repeat(np.tile(short, layout.chains), copies), lanes)
        result, flags = np.empty(states * lanes), np.zeros(lanes, np.uint8)
        threads = thread_count(_seconds(layout, groups, size, f.time > 0), groups)
        run([
            partial(
                lanes_forward, first, last, size, rest, layout.steps, lanes, idle,
                f.flat, f.lanes(layout, copies), f.time, *f.inner, f.one_for_all(layout),
                e.flat, e.lanes(layout, copies), e.time, *e.inner,
                ending, keep, stored, scale, result, flags,
            )
            for first, last in cut(groups, threads)
        ])  # fmt: skip
        return result.reshape(states, lanes), flags

    ending = np.zeros(states * padded)
    read_terminal(ending, padded, layout.blocks, states, z.flat, z.rows, *z.inner)
    joined = np.zeros(padded, np.uint8)
    if layout.blocks > 1:
        lanes = -(-layout.lanes * states // layout.width) * layout.width
        units = np.empty(states * lanes)
        identity(units, lanes, states)
        products, flags = recursion(units, states, keep=False)
        join_forward(
            layout.chains, layout.blocks, states, products.reshape(-1), lanes, flags,
            ending, padded, links.view(-1).numpy(), joined,
        )  # fmt: skip
    result, flags = recursion(ending, 1, keep=True)
    message.copy_(torch.from_numpy(result[:, : layout.lanes : layout.blocks].T.reshape(*batch, states)))
    lost = (flags | joined)[: layout.lanes].reshape(-1, layout.blocks).any(-1)
    if lost.any():
        careful_forward(
            np.flatnonzero(lost), size, rest, starts, f.flat, f.rows, f.time, *f.inner, e.flat, e.rows, e.time, *e.inner,
            z.flat, z.rows, *z.inner, stored, scale, padded, message.view(-1).numpy(),
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
    history: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    batch, size, rest, layout = _shape(transition, emission, terminal, length)
    # Under vmap the batch may be larger here than when the chains were cut.
    layout = replace(layout, blocks=messages.shape[-3])
    states, padded = layout.states, layout.padded
    if layout.chains == 0:
        return torch.zeros_like(transition), torch.zeros_like(emission), torch.zeros_like(terminal)
    if not layout.fits(messages):
        messages = layout.messages(transition).copy_(messages)
        scales = layout.scales(transition).copy_(scales)
    f, e = _terms(transition, batch, 3), _terms(emission, batch, 2)
    stored = _memory(messages, (layout.steps + 1) * states * padded)
    scale = _memory(scales, layout.steps * padded)
    weights = weight.expand(*batch, states).reshape(-1).numpy()
    starts = np.array(layout.starts())
    idle = np.resize(np.tile(np.diff(starts) < layout.steps, layout.chains), padded)
    fast = scale[: layout.lanes : layout.blocks] > 0
    starting, finishing = np.empty(states * padded, stored.dtype), np.empty(states * padded, stored.dtype)
    join_backward(
        layout.chains, layout.blocks, states, weights, fast,
        links.expand(*batch, *links.shape[-3:]).reshape(-1).numpy(), stored, padded, starting,
    )  # fmt: skip
    groups = padded // layout.width
    parts = cut(groups, thread_count(2 * _seconds(layout, groups, size, f.time > 0), groups))
    g_transition = _Accumulator(transition, batch, 3, layout, len(parts), written=False)
    g_emission = _Accumulator(emission, batch, 2, layout, len(parts), written=True)
    gf, ge = g_transition.terms, g_emission.terms
    gf_rows, ge_rows = gf[0].lanes(layout), ge[0].lanes(layout)
    run([
        partial(
            lanes_backward, first, last, size, rest, layout.steps, padded, layout.lanes, idle,
            f.flat, f.lanes(layout), f.time, *f.inner, f.one_for_all(layout),
            e.flat, e.lanes(layout), e.time, *e.inner,
            starting, stored, scale,
            gf[k % len(gf)].flat, gf_rows, gf[0].time,
            ge[k % len(ge)].flat, ge_rows, ge[0].time, g_emission.shared,
            finishing,
        )
        for k, (first, last) in enumerate(parts)
    ])  # fmt: skip
    occupancy = finishing.reshape(states, padded)[:, layout.blocks - 1 : layout.lanes : layout.blocks].T
    g_terminal = torch.from_numpy(occupancy.reshape(*batch, states)).sum_to_size(terminal.shape).contiguous()
    if not fast.all():
        gz = _terms(g_terminal, batch, 1)
        careful_backward(
            np.flatnonzero(~fast), size, rest, starts, weights,
            f.flat, f.rows, f.time, *f.inner, e.flat, e.rows, e.time, *e.inner, stored, padded,
            gf[0].flat, gf[0].rows, gf[0].time, ge[0].flat, ge[0].rows, ge[0].time, gz.flat, gz.rows,
        )  # fmt: skip
    return g_transition.total(), g_emission.total(), g_terminal


class _Accumulator:
    """The gradient of one input: one tensor, or one per thread where threads would add to the same numbers."""

    def __init__(
        self, x: Tensor, batch: tuple[int, ...], event: int, layout: Layout, threads: int, *, written: bool
    ) -> None:
        chains = x.shape[: x.dim() - event].numel()
        constant = x.shape[-event] == 1 and layout.length > 1
        self.shared = chains < layout.chains or constant
        crossed = chains < layout.chains or (constant and layout.blocks > 1)
        make = torch.zeros if self.shared or not written else torch.empty
        self.parts = [make(x.shape, dtype=x.dtype) for _ in range(threads if crossed else 1)]
        self.terms = [_terms(part, batch, event) for part in self.parts]

    def total(self) -> Tensor:
        """Sum over the threads."""
        for part in self.parts[1:]:
            self.parts[0] += part
        return self.parts[0]
