"""The chain operator for several chains whose transitions are factors of their own, on the CPU."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from symhmm.chains import cpu
from symhmm.chains.layout import Layout, common_batch, layout_of
from symhmm.chains.places import LIKE, memory, places
from symhmm.chains.stage_steps import stages_backward, stages_forward
from symhmm.chains.stages import Stages, dense, tables
from symhmm.chains.threads import cut, part_count, run


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, code: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: `Layout.messages` and `Layout.scales`.

    Args:
        transition: shape (*batch, n or 1, F), nats, the entries of the factors of all stages.
        emission: shape (*batch, n or 1, S), nats, on the joint states.
        terminal: shape (*batch, S), nats.
        length: n.
        code: of the `Stages`.
    """
    stages = Stages.decoded(code)
    layout = _layout(transition, emission, terminal, length, stages)
    messages, scales = layout.messages(transition), layout.scales(transition)
    message = transition.new_empty([*layout.batch, layout.states])
    if layout.chains == 0:
        return message, messages, scales
    z = places(terminal.shape, terminal.stride(), False, layout, 1)
    numbers = memory(terminal, z.extent)
    starts = np.pad(z.chains, (0, layout.padded - layout.chains), "edge")
    ending = numbers[starts[None, :] + z.inner[0] * np.arange(layout.states)[:, None]].astype(np.float64).reshape(-1)
    result, flags = np.empty(layout.states * layout.padded), np.zeros(layout.padded, np.uint8)
    index = tables(stages)
    run([
        partial(
            stages_forward, *part, layout.states, transition.shape[-1], length, layout.padded,
            *_terms(transition, emission, layout), index.shape, index.read, index.factor, index.largest,
            ending, messages.data_ptr(), scales.data_ptr(), result, flags,
        )
        for part in _parts(layout, stages)
    ])  # fmt: skip
    if flags[: layout.lanes].any():
        scales.fill_(-1.0)  # says so to the gradient
        return cpu.forward(dense(transition, stages), emission, terminal, length)[0], messages, scales
    found = torch.from_numpy(result.reshape(layout.states, -1)[:, : layout.lanes].T)
    message.copy_(found.reshape(message.shape))
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
    stages = Stages.decoded(code)
    layout = _layout(transition, emission, terminal, length, stages)
    if layout.chains == 0:
        return torch.zeros_like(transition), torch.zeros_like(emission), torch.zeros_like(terminal)
    if bool((scales < 0).any()):
        matrix = dense(transition, stages)
        _, *saved = cpu.forward(matrix, emission, terminal, length)
        messages, scales, links = saved
        g_matrix, g_emission, g_terminal = cpu.backward(
            weight, matrix, emission, terminal, messages, scales, links, length
        )
        return _apart(g_matrix, stages, transition), g_emission, g_terminal
    if not layout.fits(messages, scales):
        messages, scales = layout.messages(transition).copy_(messages), layout.scales(transition).copy_(scales)
    states, lanes = layout.states, layout.padded
    kept = memory(messages, layout.entries[0])
    first = kept[: states * lanes].reshape(states, lanes)
    weights = np.zeros((states, lanes), kept.dtype)
    weights[:, : layout.lanes] = weight.expand(*layout.batch, states).reshape(-1, states).numpy().T
    starting = np.divide(weights, first, out=np.zeros_like(weights), where=first > 0).reshape(-1)
    finishing = np.empty(states * lanes, kept.dtype)
    steps = length if transition.shape[-2] > 1 else 1
    g_transition = transition.new_empty(*layout.batch, steps, transition.shape[-1])
    g_emission = emission.new_empty(*layout.batch, length, states)
    index = tables(stages)
    run([
        partial(
            stages_backward, *part, states, transition.shape[-1], length, lanes, layout.lanes,
            *_terms(transition, emission, layout), index.shape, index.read, index.factor, index.largest,
            starting, messages.data_ptr(), scales.data_ptr(), g_transition.data_ptr(), g_emission.data_ptr(), finishing,
        )
        for part in _parts(layout, stages)
    ])  # fmt: skip
    ends = torch.from_numpy(finishing.reshape(states, lanes)[:, : layout.lanes].T).reshape(*layout.batch, states)
    return (
        g_transition.sum_to_size(transition.shape).contiguous(),
        g_emission.sum_to_size(emission.shape).contiguous(),
        ends.sum_to_size(terminal.shape).contiguous(),
    )


def _apart(gradient: Tensor, stages: Stages, transition: Tensor) -> Tensor:
    """The gradient of the factors from that of their matrix."""
    lead, count = transition.shape[:-1], len(stages.sizes)
    full, parts = gradient.reshape(*lead, *stages.sizes, *stages.sizes), []
    for stage in stages.stages:
        other = [v - 2 * count for v in range(2 * count) if v not in stage.factor]
        parts.append((full.sum(other) if other else full).reshape(*lead, -1))
    return torch.cat(parts, -1)


def _layout(transition: Tensor, emission: Tensor, terminal: Tensor, length: int, stages: Stages) -> Layout:
    batch = common_batch(transition.shape[:-2], emission.shape[:-2], terminal.shape[:-1])
    return layout_of(batch, length, stages.states, transition.dtype, blocks=1)


def _parts(layout: Layout, stages: Stages) -> list[tuple[int, int]]:
    groups = layout.padded // layout.width
    seconds = groups * layout.steps * (25 * layout.states + stages.cost) * 1e-9
    return cut(groups, part_count(seconds, groups))


def _terms(transition: Tensor, emission: Tensor, layout: Layout) -> tuple[object, ...]:
    f = places(transition.shape, transition.stride(), True, layout, 1)
    e = places(emission.shape, emission.stride(), True, layout, 1)
    return (
        LIKE[transition.dtype], transition.data_ptr(), f.lanes, f.time, f.inner[0], f.one_for_all,
        emission.data_ptr(), e.lanes, e.time, e.inner[0],
    )  # fmt: skip
