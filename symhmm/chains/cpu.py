"""The chain operator on the CPU: from torch tensors to the numba kernels and back."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from symhmm.chains.careful import careful_backward, careful_forward
from symhmm.chains.evidence import close
from symhmm.chains.passes import END, JOIN, RECURSION, UNITS
from symhmm.chains.places import LIKE, memory
from symhmm.chains.prepared import Prepared, prepared
from symhmm.chains.sparse import listed
from symhmm.chains.staged import run_backward, run_forward
from symhmm.chains.threads import run, thread_count


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: `Layout.messages`, `Layout.scales` and `Layout.links`.

    The message has the dtype of the terms, or another one.
    """
    return _forward(call_of((transition, emission, terminal), length), transition, emission, terminal, dtype)


def evidence(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability (*batch) of all that was seen, that of each initial state given it (*batch, S), and what `forward`
    keeps for the gradient."""
    call = call_of((transition, emission, terminal), length)
    message, messages, scales, links = _forward(call, transition, emission, terminal, torch.float64)
    return *close(initial, message, call.layout), messages, scales, links


def _forward(
    call: Prepared, transition: Tensor, emission: Tensor, terminal: Tensor, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    layout = call.layout
    few = listed(transition, emission, terminal, layout)
    if few:
        return *run_forward(few, transition, emission, terminal, dtype), layout.links(transition)
    saved = call.kept()
    message = torch.empty(call.message_size, dtype=dtype or transition.dtype)
    if layout.chains == 0:
        return message, *saved
    shape, f, e, z, idles = call.forward_arguments
    lanes, unit_lanes, states = layout.padded, shape[-1], layout.states
    flags = np.zeros(lanes, np.uint8)
    work = (
        np.zeros(states * lanes), call.units, np.empty(states * lanes), np.empty(call.units.size), flags,
        np.zeros(unit_lanes, np.uint8),
    )  # fmt: skip
    _phases(
        call.kernel("forward_pass"), UNITS if layout.blocks > 1 else JOIN, END,
        thread_count(call.seconds, call.groups),
        shape, call.like, transition.data_ptr(), f, emission.data_ptr(), e, terminal.data_ptr(), z, idles, work,
        LIKE[message.dtype], (message.data_ptr(), saved[0].data_ptr(), saved[1].data_ptr(), saved[2].data_ptr()),
    )  # fmt: skip
    if 1 in flags[: layout.lanes].tobytes():
        lost = np.flatnonzero(flags[: layout.lanes].reshape(-1, layout.blocks).any(-1))
        careful_forward(
            lost, shape[0], shape[1], np.array(layout.starts),
            memory(transition, call.transition.extent), call.transition.chains, call.transition.time,
            *call.transition.inner, memory(emission, call.emission.extent), call.emission.chains, call.emission.time,
            *call.emission.inner, memory(terminal, call.terminal.extent), *z,
            memory(saved[0], layout.entries[0]), memory(saved[1], layout.entries[1]), lanes, message.view(-1).numpy(),
        )  # fmt: skip
    return message, *saved


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
    # The chains stay cut as they were: under vmap the batch may be larger here than it was in the forward pass.
    call = call_of((transition, emission, terminal), length, messages.shape[-3])
    layout = call.layout
    if layout.chains == 0:
        return transition.new_zeros(transition.shape), torch.zeros_like(emission), torch.zeros_like(terminal)
    few = listed(transition, emission, terminal, layout)
    if few:
        g_transition, g_emission, g_terminal = run_backward(
            few, weight, transition, emission, terminal, messages, scales
        )
        # In memory as its input is: so the fake twin of the operator has it.
        return g_transition, torch.empty_like(emission).copy_(g_emission), g_terminal
    if not layout.fits(messages, scales):
        messages, scales = layout.messages(transition).copy_(messages), layout.scales(transition).copy_(scales)
    if weight.shape != call.message_size or not weight.is_contiguous():
        weight = weight.expand(call.message_size).contiguous()
    if layout.blocks > 1 and (links.shape[:-3] != layout.batch or not links.is_contiguous()):
        links = links.expand(*layout.batch, *links.shape[-3:]).contiguous()
    shape, f, e, idle, gf, ge, gz = call.backward_arguments
    like, entries = call.like.dtype, layout.states * layout.padded
    fast = np.empty(layout.chains, np.bool_)
    count = thread_count(2 * call.seconds, call.groups)
    to_transition, to_emission = call.gradients
    (g_transition, f_parts, gf_gap), (g_emission, e_parts, ge_gap) = (
        to_transition.parts(count),
        to_emission.parts(count),
    )
    g_terminal = torch.zeros(terminal.shape, dtype=terminal.dtype)
    _phases(
        call.kernel("backward_pass"), JOIN, END + 1, count,
        shape, call.like, transition.data_ptr(), f, emission.data_ptr(), e, idle,
        (np.empty(entries, like), np.empty(entries, like), fast), weight.data_ptr(),
        (messages.data_ptr(), scales.data_ptr(), links.data_ptr()),
        (f_parts.data_ptr(), e_parts.data_ptr(), g_terminal.data_ptr()),
        (*gf, gf_gap), (*ge, ge_gap), gz,
    )  # fmt: skip
    if 0 in fast.tobytes():
        careful_backward(
            np.flatnonzero(~fast), shape[0], shape[1], np.array(layout.starts), weight.reshape(-1).numpy(),
            memory(transition, call.transition.extent), call.transition.chains, call.transition.time,
            *call.transition.inner, memory(emission, call.emission.extent), call.emission.chains, call.emission.time,
            *call.emission.inner, memory(messages, layout.entries[0]), layout.padded,
            memory(f_parts, to_transition.places.extent), to_transition.places.chains, to_transition.places.time,
            memory(e_parts, to_emission.places.extent), to_emission.places.chains, to_emission.places.time,
            *to_emission.places.inner,
            g_terminal.view(-1).numpy(), gz,
        )  # fmt: skip
    return to_transition.total(g_transition, f_parts), to_emission.total(g_emission, e_parts), g_terminal


def call_of(tensors: tuple[Tensor, Tensor, Tensor], length: int, blocks: int | None = None) -> Prepared:
    """What calls with tensors of these sizes and strides share: transition, emission and terminal terms."""
    f, e, z = tensors
    return prepared((f.shape, e.shape, z.shape), (f.stride(), e.stride(), z.stride()), f.dtype, length, blocks)


def _phases(kernel: Callable[..., None], first: int, last: int, parts: int, *arguments: object) -> None:
    """Carry out the phases of a pass: in one call, or one after the other with the recursions in parts."""
    if parts == 1:
        kernel(first, last, 0, 1, *arguments)
        return
    for phase in range(first, last):
        count = parts if phase in (UNITS, RECURSION) else 1
        run([partial(kernel, phase, phase + 1, part, count, *arguments) for part in range(count)])
