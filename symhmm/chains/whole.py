"""Value and gradient of whole chains at once, on the CPU: from torch tensors to the numba kernel and back."""

from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import repeat
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains import cpu
from symhmm.chains.careful import careful_backward, careful_forward
from symhmm.chains.places import memory, places
from symhmm.chains.prepared import Prepared, prepared
from symhmm.chains.single_pass import single_pass
from symhmm.chains.sparse import listed
from symhmm.chains.threads import Task, cut, run, thread_count
from symhmm.memory import empty_strided

TOGETHER = 2**17  # bytes of messages up to which several groups of lanes are done together
MANY = 16  # states, which fill a vector
BOTH = 2.2  # times the time of its messages that a chain and its gradient take
LISTED = 0.35  # times the time of a group of lanes that a list of few moves takes
SLAB = 2**26  # bytes of messages up to which several chains are repeated in log space together


def evidence_and_gradient(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, weight: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability (*batch) of all that was seen, and the gradients of the sum of these with weights (*batch), 1 if None.

    They have the shapes of the terms, but for the initial ones: that one is (*batch, S), not yet summed over what shares them.
    """
    call = cpu.call_of((transition, emission, terminal), length)
    order, terms = _ordered(call), (transition, emission, terminal)
    if order is None or (not order.quick and listed(*terms, call.layout)):
        return _one_after_the_other(initial, *terms, weight, length)
    call, layout, dtype = order.call, order.call.layout, call.dtype
    weight = _ones(dtype, len(layout.batch)) if weight is None else weight
    w = places(weight.shape, weight.stride(), False, layout, 1)
    i = places(initial.shape, initial.stride(), False, layout, 1)
    count = thread_count(order.seconds, max(order.groups, order.singles))
    beside = layout.chains - order.singles
    work: list[tuple[Any, int, int]] = []
    if order.groups:
        work += [(call.kernel("whole_pass"), *x) for x in cut(order.groups, min(count, order.groups))]
    if order.singles:
        work += [(single_pass, beside + x, beside + y) for x, y in cut(order.singles, min(count, order.singles))]
    own = 1 if count == 1 else len(work)  # what threads write at the same time is apart
    scratch = empty_strided((own, order.entries), (order.entries, 1), dtype)
    evidence, first, last = (torch.empty(size, dtype=dtype) for size in (layout.batch, *2 * [call.message_size]))
    (g_transition, f_parts, f_gap), (g_emission, e_parts, e_gap) = (x.parts(own) for x in call.gradients)
    (size, rest, *_), f, e, _, gf, ge, _ = call.backward_arguments
    lost = np.zeros(layout.padded, np.uint8)
    arguments = (
        (size, rest, layout.steps, beside, order.together), call.like,
        transition.data_ptr(), (f[0], *f[2:]), emission.data_ptr(), (e[0], *e[2:]),
        terminal.data_ptr(), (call.terminal.chains, *call.terminal.inner), initial.data_ptr(), (i.chains, *i.inner),
        weight.data_ptr(), w.chains, lost,
    )  # fmt: skip
    results = evidence.data_ptr(), first.data_ptr(), last.data_ptr()
    at, f_at, e_at, gap = scratch.data_ptr(), f_parts.data_ptr(), e_parts.data_ptr(), order.entries * dtype.itemsize
    tasks: list[Task] = [
        partial(kernel, low, top, *arguments, at + k * gap, results, (f_at + k * f_gap, e_at + k * e_gap), gf, ge)
        for k, (kernel, low, top) in zip(range(own) if own > 1 else repeat(0), work, strict=False)
    ]
    if own == 1:
        for task in tasks:
            task()
    else:
        run(tasks)
    if 1 in lost[: layout.chains].tobytes():
        if order.quick and listed(*terms, layout):  # in log space a list of the possible moves is many times as fast
            return _one_after_the_other(initial, *terms, weight, length)
        chains = np.flatnonzero(lost[: layout.chains])
        states = np.arange(layout.states) * i.inner[0]
        slabs = ceil(len(chains) * layout.states * layout.steps * dtype.itemsize / SLAB)
        for some in np.array_split(chains, min(len(chains), slabs)):
            weights, beginning = (
                memory(weight, w.extent)[w.chains[some]],
                memory(initial, i.extent)[i.chains[some, None] + states],
            )
            _repeat(some, call, weights, beginning, terms, (f_parts, e_parts), (evidence, first, last))
    to_transition, to_emission = call.gradients
    return (
        evidence, first, to_transition.total(g_transition, f_parts), to_emission.total(g_emission, e_parts),
        last.sum_to_size(terminal.shape),
    )  # fmt: skip


def _one_after_the_other(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, weight: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All values, and then all gradients."""
    evidence, first, messages, scales, links = cpu.evidence(initial, transition, emission, terminal, length)
    first = first if weight is None else weight[..., None] * first
    return evidence, first, *cpu.backward(first, transition, emission, terminal, messages, scales, links, length)


@dataclass(frozen=True)
class _Order:
    """How the chains of a batch are worked off.

    Args:
        call: of chains that are not cut.
        groups: of lanes, side by side.
        together: groups that are done at a time.
        singles: the last chains that are done one by one, their states side by side.
        entries: numbers of the memory that this takes.
        seconds: about how long it takes.
        quick: whether a list of the possible moves, if they are few, takes longer (`symhmm.chains.sparse`).
    """

    call: Prepared
    groups: int
    together: int
    singles: int
    entries: int
    seconds: float
    quick: bool


@lru_cache(maxsize=256)
def _ordered(call: Prepared) -> _Order | None:
    """The order that takes least; None where chains are cut into blocks, for which there is none.

    Chains are done one by one if they would leave most lanes of their group empty, as measured (`benchmarks.chains`).
    """
    length, width, states = call.layout.length, call.layout.width, call.layout.states
    if call.layout.chains == 0:
        return None
    whole = call if call.layout.blocks == 1 else prepared(call.sizes, call.strides, call.dtype, length, 1)
    left, row = call.layout.chains % width, ceil(call.size / width) * width
    plain = states == call.size >= MANY and call.transition.time == 0 and call.gradients[0].places.time == 0
    each = length * (65 + 1.2 * row * row / width) * 1e-9
    group = BOTH * whole.seconds / whole.groups
    singles = left if plain and left * each < group else 0
    if call.layout.blocks > 1 and not singles:
        return None
    groups = ceil((call.layout.chains - singles) / width)
    side_by_side = width * ((length + 1) * states + length)  # messages and scales
    together = max(1, min(groups, TOGETHER // (side_by_side * call.dtype.itemsize)))
    alone = 2 * row * (length + 1) + ceil(length / width) * width if singles else 0
    entries = max(together * side_by_side if groups else 0, alone)
    quick = groups == 0 and singles * each < LISTED * group
    return _Order(whole, groups, together, singles, entries, groups * group + singles * each, quick)


@cache
def _ones(dtype: torch.dtype, batch: int) -> Tensor:
    return torch.ones([1] * batch, dtype=dtype)


def _repeat(
    chains: NDArray[np.int64],
    call: Prepared,
    weights: NDArray[Any],
    initial: NDArray[Any],
    terms: tuple[Tensor, Tensor, Tensor],
    gradients: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Some chains in log space: their results are written, and their gradients are added.

    Args:
        weights: shape (chains,).
        initial: shape (chains, S), nats.
        results: log-probabilities, and probabilities of the first and the last states.
    """
    count, states, dtype = len(chains), call.layout.states, initial.dtype
    rows = np.arange(count)
    transition, emission, terminal = (
        (memory(x, at.extent), at.chains[chains], at.time, *at.inner)
        for x, at in zip(terms, (call.transition, call.emission, call.terminal), strict=True)
    )
    shape = (rows, call.size, states // call.size, np.array(call.layout.starts))
    messages = np.empty((call.layout.steps + 1) * states * count, dtype)
    message, last = np.empty(count * states), np.zeros(count * states, dtype)
    scales = np.empty(call.layout.steps * count, dtype)
    careful_forward(*shape, *transition, *emission, *terminal[:2], terminal[3], messages, scales, count, message)
    joint = torch.from_numpy(initial + message.reshape(count, states))
    evidence = joint.logsumexp(-1)
    first = (joint - evidence[:, None]).exp().masked_fill_(evidence[:, None] == -torch.inf, 0)
    first = (first * torch.from_numpy(weights)[:, None]).to(results[1].dtype)
    to = [
        (memory(x, g.places.extent), g.places.chains[chains], g.places.time, *g.places.inner)
        for x, g in zip(gradients, call.gradients, strict=True)
    ]
    careful_backward(
        *shape, first.view(-1).numpy(), *transition, *emission, messages, count, *to[0][:3], *to[1], last, rows * states
    )
    for result, found in zip(results, (evidence, first, torch.from_numpy(last)), strict=True):
        result.view(call.layout.chains, -1)[chains] = found.view(count, -1).to(result.dtype)
