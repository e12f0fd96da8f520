"""The chain operator on the CPU within a memory budget: messages are kept where segments meet, and made again inside."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from symhmm.chains import cpu, staged
from symhmm.chains.layout import common_batch
from symhmm.chains.threads import cut


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, segments: int, code: Sequence[int] = ()
) -> tuple[Tensor, Tensor]:
    """Message (*batch, S), and the message at the end of each segment (*batch, segments, S), largest 0.

    One level of the checkpoints of Griewank and Walther (2000), "Algorithm 799: revolve". ``code`` is that of the stages of a
    step, if it goes in stages; the transition is then (*batch, n or 1, entries).
    """
    run, _, time = _passes(code)
    batch = common_batch(transition.shape[:time], emission.shape[:-2], terminal.shape[:-1])
    message = terminal.expand(*batch, terminal.shape[-1]).double()
    offset = message.new_zeros(*batch, 1)
    ends = transition.new_empty(*batch, segments, terminal.shape[-1])
    for k, (first, last) in reversed(list(enumerate(cut(length, segments)))):
        # What is added to all states is kept apart: a sum over a million steps would drown the differences between them.
        peak = message.amax(-1, keepdim=True)
        peak = torch.where(peak > -torch.inf, peak, 0)
        offset += peak
        ends[..., k, :] = message - peak
        message = run(*_between(transition, emission, first, last, time), ends[..., k, :], last - first, torch.float64)[
            0
        ]
    return (message + offset).to(ends.dtype), ends


def backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    ends: Tensor,
    length: int,
    segments: int,
    code: Sequence[int] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    run, back, time = _passes(code)
    to_transition, to_emission = transition.new_zeros(transition.shape), torch.zeros_like(emission)
    batch = common_batch(transition.shape[:time], emission.shape[:-2], terminal.shape[:-1])
    ends = ends.expand(*batch, *ends.shape[-2:])
    for k, (first, last) in enumerate(cut(length, segments)):
        inputs = (*_between(transition, emission, first, last, time), ends[..., k, :])
        _, *saved = run(*inputs, last - first)
        g_transition, g_emission, weight = back(weight, *inputs, *saved, last - first)
        for total, part in zip(
            _between(to_transition, to_emission, first, last, time), (g_transition, g_emission), strict=True
        ):
            total += part
    return to_transition, to_emission, weight.sum_to_size(terminal.shape).contiguous()


def _passes(code: Sequence[int]) -> tuple[Callable[..., Any], Callable[..., Any], int]:
    """The passes over a segment, and the dimension of time of the transition."""
    if not code:
        return cpu.forward, cpu.backward, -3

    def run(f: Tensor, e: Tensor, z: Tensor, length: int, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        return staged.forward(f, e, z, length, list(code), dtype)

    def back(weight: Tensor, f: Tensor, e: Tensor, z: Tensor, messages: Tensor, scales: Tensor, length: int) -> Any:
        return staged.backward(weight, f, e, z, messages, scales, length, list(code))

    return run, back, -2


def _between(transition: Tensor, emission: Tensor, first: int, last: int, time: int) -> tuple[Tensor, Tensor]:
    """The terms of some steps, or the whole of what is constant over time."""
    count = last - first
    return (
        transition.narrow(time, first, count) if transition.shape[time] > 1 else transition,
        emission.narrow(-2, first, count) if emission.shape[-2] > 1 else emission,
    )
