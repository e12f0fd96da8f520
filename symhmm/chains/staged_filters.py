"""Forward filters of chains whose steps go in stages: the log-weight of the data up to every step."""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.chains.filters import prefix_weights
from symhmm.chains.stage_filters import filter_stages
from symhmm.chains.staged import Call, call_for
from symhmm.chains.stages import Stages, dense
from symhmm.chains.threads import cut, run, thread_count


def staged_prefix_weights(
    start: Tensor,
    transition: Tensor,
    emission: Tensor,
    now_transition: Tensor,
    now_emission: Tensor,
    length: int,
    stages: Stages,
) -> Tensor:
    """Log-weight of all paths of each chain up to each step, nats, as `symhmm.chains.filters.prefix_weights`.

    It is differentiable in the emission of the step itself, once; where the gradient of its transition is wanted, too, the
    joint states get one dense matrix.

    Args:
        start: shape (*batch, S), nats.
        transition, now_transition: shape (*batch, T or 1, F), nats, entries of the factors of all stages.
        emission, now_emission: shape (*batch, T or 1, S), nats.
        length: T.
        stages: of a step.

    Returns:
        shape (*batch, T), float64.
    """
    if now_transition.requires_grad:
        matrices = dense(transition, stages), dense(now_transition, stages)
        return prefix_weights(start, matrices[0], emission, matrices[1], now_emission, length)
    fixed = tuple(x.detach() for x in (start, transition, emission, now_transition))
    weights: Tensor = _PrefixWeights.apply(now_emission, *fixed, length, stages)
    return weights


class _PrefixWeights(torch.autograd.Function):
    """The probabilities of the states are kept where they are asked for: they are the gradient."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        now_emission, start, transition, emission, now_transition, length, stages = args
        past = call_for((transition, emission, start), length, stages)
        now = call_for((now_transition, now_emission.detach(), start), length, stages)
        batch = np.broadcast_shapes(past.layout.batch, now.layout.batch)
        start = start.expand(*batch, stages.states)
        past = call_for((transition, emission, start), length, stages)
        now = call_for((now_transition, now_emission.detach(), start), length, stages)
        kept = bool(ctx.needs_input_grad[0])
        totals, states = _run(past, now, (start, transition, emission, now_transition, now_emission.detach()), kept)
        ctx.save_for_backward(states)
        ctx.shape, ctx.dtype = now_emission.shape, now_emission.dtype
        return totals

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = grads
        (states,) = ctx.saved_tensors
        g = (states * weight.unsqueeze(-1)).sum_to_size(ctx.shape).to(ctx.dtype)
        return (g, *(None for _ in range(6)))


def _run(past: Call, now: Call, tensors: tuple[Tensor, ...], kept: bool) -> tuple[Tensor, Tensor]:
    """Weights of all prefixes (*batch, T), and the probabilities of the states (*batch, T, S) if they are kept."""
    start, transition, emission, now_transition, now_emission = tensors
    layout, table = past.layout, past.tables
    starts = start.to(torch.float64).reshape(-1, layout.states).contiguous().numpy()
    same = _alike(transition, now_transition) and _alike(emission, now_emission)
    totals = torch.empty(layout.chains, layout.length, dtype=torch.float64)
    size = (layout.chains, layout.length, layout.states) if kept else (0, 0, 0)
    states = torch.empty(size, dtype=torch.float64)
    careful = np.zeros(layout.chains, np.bool_)
    seconds = layout.chains * layout.length * (table.products + 20 * layout.states) * 2e-9
    f, *terms = past.chain_terms(transition, emission)
    g, *now_terms = now.chain_terms(now_transition, now_emission)

    def pass_over(chains: list[tuple[int, int]]) -> None:
        run([
            partial(
                filter_stages, first, last, layout.states, layout.length, table.stages, table.numbers, table.largest,
                starts, careful, same, f, *terms[:2], past.entry, *terms[2:], g, *now_terms[:2], now.entry,
                *now_terms[2:], totals.numpy(), states.numpy(),
            )
            for first, last in chains
        ])  # fmt: skip

    pass_over(cut(layout.chains, thread_count(seconds, max(layout.chains, 1))))
    if careful.any():
        pass_over([(r, r + 1) for r in np.flatnonzero(careful).tolist()])
    batch = layout.batch if kept else (0,)
    return totals.view(*layout.batch, layout.length), states.view(*batch, *states.shape[1:])


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers, perhaps at the same place."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()) or torch.equal(x, y)
