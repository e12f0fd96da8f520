"""Hidden paths of chains whose steps go in stages: exact posterior draws and best paths."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from symhmm.chains.places import memory
from symhmm.chains.stage_paths import best_stages, best_work_size, draw_stages, follow_stages
from symhmm.chains.staged import Call, call_for, run_forward
from symhmm.chains.stages import Stages
from symhmm.chains.threads import cut, run, thread_count


@dataclass(frozen=True)
class StagedMessages:
    """As `symhmm.chains.paths.Messages`, with the scale of each step, which is negative where messages are logarithms."""

    message: Tensor
    transition: Tensor
    emission: Tensor
    call: Call
    messages: Tensor
    scales: Tensor


@dataclass(frozen=True)
class StagedChoices:
    """The best term of every sum of every stage of a batch of chains.

    Args:
        message: shape (*batch, S), nats, float64; the log-weight of the best path from each initial state.
        call: the chains.
        choices: shape (T, sums of all stages, R).
        stops: shape (R,) or more, steps of each chain that count.
    """

    message: Tensor
    call: Call
    choices: Tensor
    stops: Tensor


def staged_messages(transition: Tensor, emission: Tensor, length: int, stages: Stages) -> StagedMessages:
    """The backward recursion of a batch of chains, keeping the message of every step.

    Args:
        transition: shape (*batch, T or 1, F), nats, entries of the factors of all stages.
        emission: shape (*batch, T or 1, S), nats.
        length: T.
        stages: of a step.
    """
    transition, emission = transition.detach(), emission.detach()
    terminal = transition.new_zeros([*(1 for _ in transition.shape[:-2]), stages.states])
    call = call_for((transition, emission, terminal), length, stages)
    message, messages, scales = run_forward(call, transition, emission, terminal, torch.float64)
    return StagedMessages(message, transition, emission, call, messages, scales)


def staged_choices(
    transition: Tensor, emission: Tensor, length: int, stages: Stages, stops: Tensor | None = None
) -> StagedChoices:
    """The max-plus recursion of a batch of chains, keeping the best term of every sum; memory T M S bytes per chain.

    Arguments as in `staged_messages`; ``stops``, of a shape that broadcasts to (*batch,), says how many steps count.
    """
    transition, emission = transition.detach(), emission.detach()
    lead = [1] * (transition.dim() - 2) if stops is None else list(stops.shape)
    terminal = transition.new_zeros([*lead, stages.states])
    call = call_for((transition, emission, terminal), length, stages)
    return run_choices(call, transition, emission, terminal, stops)


def run_choices(
    call: Call, transition: Tensor, emission: Tensor, terminal: Tensor, stops: Tensor | None = None
) -> StagedChoices:
    """`staged_choices` of a prepared call, with a weight at the end."""
    layout, found = call.layout, call.tables
    states, lanes, length = layout.states, layout.padded, layout.length
    last = torch.full((lanes,), length)
    if stops is not None:
        own = stops.expand(layout.batch).reshape(-1)
        last = torch.cat([own, own[-1:].expand(lanes - own.numel())]).contiguous()
    made = torch.empty(length, found.sums, layout.chains, dtype=torch.int8 if found.most <= 127 else torch.int16)
    result = np.empty(states * lanes)
    ending = memory(terminal, call.terminal.extent)[call.ends].reshape(-1)
    work = [
        torch.empty(best_work_size(states, call.weights, found.largest, layout.width), dtype=transition.dtype)
        for _ in call.parts
    ]
    run([
        partial(
            best_stages, *part, states, length, lanes, layout.chains, *call.stage_arguments, found.sums,
            *call.terms(transition, emission), ending, last.numpy(), result, made.view(-1).numpy(), own.data_ptr(),
        )
        for part, own in zip(call.parts, work, strict=True)
    ])  # fmt: skip
    message = torch.from_numpy(result).view(states, lanes)[:, : layout.chains].T.reshape(*layout.batch, states)
    # Comparisons pass a NaN over; it must not be taken for a state that loses.
    broken = bool(emission.sum().isnan()) or bool(transition.sum().isnan())
    return StagedChoices(message * torch.nan if broken else message, call, made, last)


def staged_draw(found: StagedMessages, rows: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Exact draws from the posterior of the states; arguments and result as `symhmm.chains.paths.draw`."""
    call = found.call
    layout, table = call.layout, call.tables
    order = torch.argsort(rows, stable=True)
    chains, counts = torch.unique_consecutive(rows[order], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).numpy()
    paths = torch.empty(rows.numel(), layout.length, dtype=_smallest(layout.states))
    keys = torch.randint(2**63 - 1, rows.shape, generator=generator).numpy().view(np.uint64)
    seconds = len(chains) * layout.length * (table.products + 20 * layout.states) * 1e-9
    state = start.to(torch.int64).clone().numpy()
    run([
        partial(
            draw_stages, *part, chains.numpy(), starts, order.numpy(), state, keys, layout.states, layout.length,
            table.stages, table.numbers, call.entry, table.largest,
            *call.chain_terms(found.transition, found.emission),
            memory(found.messages, layout.entries[0]), memory(found.scales, layout.entries[1]), layout.padded,
            paths.numpy(),
        )
        for part in cut(len(chains), thread_count(seconds, max(len(chains), 1)))
    ])  # fmt: skip
    return paths


def staged_follow(found: StagedChoices, rows: Tensor, start: Tensor) -> Tensor:
    """The best path of each chain in ``rows`` from its initial state; arguments and result as `symhmm.chains.paths.follow`."""
    layout, table = found.call.layout, found.call.tables
    paths = torch.empty(rows.numel(), layout.length, dtype=_smallest(layout.states))
    follow_stages(
        0, rows.numel(), rows.numpy(), start.to(torch.int64).clone().numpy(), found.stops.numpy(), layout.length,
        layout.chains, table.stages, table.numbers, table.sums, found.choices.view(-1).numpy(), paths.numpy(),
    )  # fmt: skip
    return paths


def _smallest(size: int) -> torch.dtype:
    return torch.int8 if size <= 127 else torch.int16
