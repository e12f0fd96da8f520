"""Hidden paths of chains whose initial states are known: exact posterior draws and best paths."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains import best_lanes, cpu, path_steps
from symhmm.chains.layout import Layout, common_batch, layout_of
from symhmm.chains.places import LIKE, memory, places, terms
from symhmm.chains.sizes import lane_kernel
from symhmm.chains.sparse import listed
from symhmm.chains.staged_paths import StagedChoices, run_choices, staged_follow
from symhmm.chains.threads import cut, run, thread_count

BLOCK = 256  # steps whose tables of choices are held at once


@dataclass(frozen=True)
class Messages:
    """The terms of a batch of chains, and the weight of all that follows each state of each step.

    Args:
        message: shape (*batch, S), nats, float64; the log-weight of all paths from each initial state.
        transition, emission: the terms, nats, as given to `messages`.
        layout: how the chains lie in memory.
        messages: one message per step, as `Layout.messages` has them.
        careful: shape (R,), chains whose messages are logarithms.
    """

    message: Tensor
    transition: Tensor
    emission: Tensor
    layout: Layout
    messages: Tensor
    careful: Tensor


@dataclass(frozen=True)
class Choices:
    """The best next state of every step and state of a batch of chains.

    Args:
        message: shape (*batch, S), nats, float64; the log-weight of the best path from each initial state.
        size: K.
        layout: how the chains lie in memory.
        choices: shape (T, S, R), the smallest signed integers that hold them.
        stops: shape (R,) or more, steps of each chain that count.
    """

    message: Tensor
    size: int
    layout: Layout
    choices: Tensor
    stops: Tensor


def messages(transition: Tensor, emission: Tensor | None, length: int) -> Messages:
    """The backward recursion of a batch of chains, keeping the message of every step.

    It is the value of `symhmm.chains.operator.chain_message`, which costs T S K per chain and leaves T S numbers.

    Args:
        transition: shape (*batch, T or 1, S, K), nats; entry [t, s, j] goes from the joint state s of the steps before,
            oldest first, to state j.
        emission: shape (*batch, T or 1, K), nats; sizes of 1 in either batch are shared.
        length: T.

    >>> stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64).log()[None]
    >>> messages(stay, None, 5).message.exp().round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """
    transition, emission = _aligned(transition, emission)
    states = transition.shape[-2]
    end = transition.new_zeros([*(1 for _ in transition.shape[:-3]), states])
    coarse, stored, scales, _ = cpu.forward(transition, emission, end, length)
    layout = layout_of(tuple(coarse.shape[:-1]), length, states, transition.dtype, blocks=stored.shape[-3])
    careful = ~(scales[..., 0, 0] > 0) if length else torch.zeros(layout.batch, dtype=torch.bool)
    message = coarse.to(torch.float64)
    if layout.chains and length:
        # In single precision a total of thousands of nats hides what differs between its states; the stored message,
        # which is relative to its largest entry, does not.
        first = stored[..., 0, 0, :].to(torch.float64)
        first = torch.where(careful.unsqueeze(-1), first, first.log())
        top = message.amax(-1, keepdim=True)
        fine = top + first - first.amax(-1, keepdim=True)
        message = torch.where(top > -torch.inf, fine, message)
    return Messages(message, transition, emission, layout, stored, careful.reshape(-1).contiguous())


def choices(
    transition: Tensor, emission: Tensor | None, length: int, stops: Tensor | None = None
) -> Choices | StagedChoices:
    """The max-plus recursion of a batch of chains, keeping the best next state of every step and state.

    Cost T S K per chain, memory T S bytes. Of equally good states the first is taken.

    Args:
        transition, emission, length: as in `messages`.
        stops: shape (*batch,) or broadcasting to it, steps that count; all of them if None.

    >>> stay = torch.tensor([[0.5, 0.5], [0.25, 0.75]], dtype=torch.float64).log()[None]
    >>> choices(stay, None, 2).message.exp()
    tensor([0.3750, 0.5625], dtype=torch.float64)
    """
    transition, emission = _aligned(transition, emission)
    states, size = transition.shape[-2:]
    batch = common_batch(transition.shape[:-3], emission.shape[:-2])
    if stops is not None:
        batch = tuple(torch.broadcast_shapes(batch, stops.shape))
    layout = layout_of(batch, length, states, transition.dtype, blocks=1)
    end = transition.new_zeros([*(1 for _ in batch), states])
    few = listed(transition, emission, end.expand(*batch, -1), layout) if length else None
    if few:
        return run_choices(few, transition, emission, end.expand(*batch, -1), stops)
    lanes = layout.padded
    last = torch.full((lanes,), length) if stops is None else _filled(stops.expand(batch).reshape(-1), lanes)
    made = torch.empty(length, states, layout.chains, dtype=_smallest(size))
    result = np.empty(states * lanes)
    f = places(transition.shape, transition.stride(), True, layout, 1)
    e = places(emission.shape, emission.stride(), True, layout, 1)
    groups = lanes // layout.width
    kernel = lane_kernel("best_lanes", size, states // size, lanes * length)
    seconds = groups * length * (20 * size + 1.5 * states * size + 60) * 1e-9
    run([
        partial(
            kernel, first, end, size, states // size, length, lanes, layout.chains,
            LIKE[transition.dtype], transition.data_ptr(), f.lanes, f.time, *f.inner, f.one_for_all,
            emission.data_ptr(), e.lanes, e.time, *e.inner, last.numpy(), result, made.view(-1).numpy(),
        )
        for first, end in cut(groups, thread_count(seconds, groups))
    ])  # fmt: skip
    message = torch.from_numpy(result).view(states, lanes)[:, : layout.chains].T.reshape(*batch, states)
    # Comparisons pass a NaN over; it must not be taken for a state that loses.
    broken = bool(emission.sum().isnan()) or bool(transition.sum().isnan())
    return Choices(message * torch.nan if broken else message, size, layout, made, last)


def draw(found: Messages, rows: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Exact draws from the posterior of the states of P paths, each given its chain and its initial state.

    Forward sampling with backward messages. Each path has a stream of random numbers of its own, so that the result does
    not depend on the number of threads.

    Args:
        rows: shape (P,), chain of each path.
        start: shape (P,), joint state before the first step.

    Returns:
        shape (P, T), the state of each step, in the smallest signed integer type that holds it.
    """
    layout, (states, size) = found.layout, found.transition.shape[-2:]
    order = torch.argsort(rows, stable=True)
    chains, counts = torch.unique_consecutive(rows[order], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).numpy()
    paths = torch.empty(rows.numel(), layout.length, dtype=_smallest(size))
    keys = torch.randint(2**63 - 1, rows.shape, generator=generator).numpy().view(np.uint64)
    (transitions, f), (emissions, e) = terms(found.transition, 3, layout), terms(found.emission, 2, layout)
    threads = thread_count(rows.numel() * layout.length * 5e-9, max(len(chains), 1))
    run([
        partial(
            path_steps.draw, *part, chains.numpy(), starts, order.numpy(), _states(start), keys,
            size, states // size, layout.length, BLOCK,
            transitions, f.chains, f.time, *f.inner, emissions, e.chains, e.time, *e.inner,
            memory(found.messages, (layout.steps + 1) * states * layout.padded), np.array(layout.starts), layout.padded,
            found.careful.numpy(), paths.numpy(),
        )
        for part in cut(len(chains), threads)
    ])  # fmt: skip
    return paths


def follow(found: Choices | StagedChoices, rows: Tensor, start: Tensor) -> Tensor:
    """The best path of each chain in ``rows`` from its initial state; arguments and result as in `draw`, 0 after the stop."""
    if isinstance(found, StagedChoices):
        return staged_follow(found, rows, start)
    layout, length = found.layout, found.layout.length
    paths = torch.empty(rows.numel(), length, dtype=found.choices.dtype)
    state, chains = _states(start), rows.numpy()
    run([
        partial(
            best_lanes.follow_choices, *part, chains, state, found.stops.numpy(), found.size,
            layout.states // found.size, length, layout.chains, found.choices.view(-1).numpy(), paths.numpy(),
        )
        for part in cut(rows.numel(), thread_count(rows.numel() * length * 5e-9, max(rows.numel(), 1)))
    ])  # fmt: skip
    return paths


def _aligned(transition: Tensor, emission: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both terms with one dtype and as many batch dimensions."""
    if emission is None:
        emission = transition.new_zeros(1, transition.shape[-1])
    dtype = torch.promote_types(transition.dtype, emission.dtype)
    rank = max(transition.dim() - 3, emission.dim() - 2)
    transition, emission = (
        x.detach().to(dtype)[(None,) * (rank - x.dim() + event)] for x, event in ((transition, 3), (emission, 2))
    )
    return transition, emission


def _smallest(size: int) -> torch.dtype:
    """The smallest signed integers that hold the states."""
    return torch.int8 if size <= 127 else torch.int16


def _states(start: Tensor) -> NDArray[Any]:
    """A copy that a kernel may change."""
    return start.to(torch.int64).clone().numpy()


def _filled(x: Tensor, lanes: int) -> Tensor:
    """One number per lane, the last one repeated."""
    return torch.cat([x, x[-1:].expand(lanes - x.numel())]).contiguous()
