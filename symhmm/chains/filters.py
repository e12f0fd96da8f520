"""Forward filters of a batch of chains: the log-weight of the data up to every step, with other terms at the step itself."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains.filter_steps import filter_rows
from symhmm.chains.layout import Layout, common_batch
from symhmm.chains.places import Array, Places, terms
from symhmm.chains.threads import cut, run, thread_count

Terms = tuple[Array, Places]


def prefix_weights(
    start: Tensor, transition: Tensor, emission: Tensor, now_transition: Tensor, now_emission: Tensor, length: int
) -> Tensor:
    """Log-weight of all paths of each chain up to each step, nats: log p(y_1..y_t) for every t at once.

    The forward recursion (Rabiner 1989, eq. 19 to 21), scaled; cost T S K per chain, no memory but the result and its
    gradient. It is differentiable in the terms of the step itself, once: d / d now_emission[t] are the probabilities of the
    state of step t given the data up to t.

    Args:
        start: shape (*batch, S), nats; weight of each joint state before the first step.
        transition: shape (*batch, T or 1, S, K), nats; of the steps before. All have as many batch dimensions.
        emission: shape (*batch, T or 1, K), nats; of the steps before.
        now_transition, now_emission: the same at step t itself.
        length: T.

    Returns:
        shape (*batch, T), float64.

    >>> stay, e = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()[None], torch.zeros(3, 2)
    >>> prefix_weights(torch.tensor([0.0, -torch.inf]), stay, e, stay, e, 3).exp().round(decimals=4)
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    weights: Tensor = _PrefixWeights.apply(
        now_transition, now_emission, start.detach(), transition.detach(), emission.detach(), length
    )
    return weights


class _PrefixWeights(torch.autograd.Function):
    """Where only the emission is asked about, the probabilities of the states are kept: they are its gradient. Otherwise
    the recursion runs again for the gradient, so that nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        now_transition, now_emission, start, transition, emission, length = args
        tensors = [x.detach() for x in (start, transition, emission, now_transition, now_emission)]
        ctx.length, ctx.kept = length, tuple(ctx.needs_input_grad[:2]) == (False, True)
        if not ctx.kept:
            out, ctx.careful = _run(tensors, length)
            ctx.save_for_backward(*tensors)
            return out
        states = torch.zeros(*_batch(tensors), length, now_emission.shape[-1], dtype=torch.float64)
        out, _ = _run(tensors, length, None, (None, states))
        ctx.save_for_backward(states)
        ctx.shape = now_emission.shape
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = grads
        if ctx.kept:
            (states,) = ctx.saved_tensors
            return (None, (states * weight.unsqueeze(-1)).sum_to_size(ctx.shape), None, None, None, None)
        tensors = list(ctx.saved_tensors)
        wanted = tuple(
            torch.zeros(x.shape, dtype=x.dtype) if ctx.needs_input_grad[i] else None for i, x in enumerate(tensors[3:])
        )
        _run(tensors, ctx.length, weight, wanted, ctx.careful)
        return (*wanted, None, None, None, None)


def _batch(tensors: list[Tensor]) -> tuple[int, ...]:
    return common_batch(*(x.shape[: x.dim() - n] for x, n in zip(tensors, (1, 3, 2, 3, 2), strict=True)))


def _run(
    tensors: list[Tensor],
    length: int,
    weight: Tensor | None = None,
    gradients: Sequence[Tensor | None] = (None, None),
    careful: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, NDArray[np.bool_]]:
    """Weights of all prefixes, and the chains that were run in logarithms.

    Args:
        tensors: start, transition, emission, and these two at the step itself.
        weight: shape (*batch, T), of each prefix in the gradients; 1 if None. No prefixes are returned then.
        gradients: of the terms at the step itself, added to.
        careful: what an earlier run found; no weight must be given without, unless no gradient has a shared dimension.
    """
    start, *steps = tensors
    states, size = steps[0].shape[-2:]
    batch = _batch(tensors)
    layout = Layout(batch, length, states, width=1, blocks=1)
    starts = start.expand(*batch, states).to(torch.float64).reshape(-1, states).contiguous().numpy()
    read = [x for step, n in zip(steps, (3, 2, 3, 2), strict=True) for x in _flat(terms(step, n, layout))]
    same = all(_alike(x, y) for x, y in zip(steps[:2], steps[2:], strict=True))
    totals = torch.empty(layout.chains if weight is None else 0, length, dtype=torch.float64)
    weights = np.zeros((0, 0))
    if weight is not None:
        weights = weight.expand(*batch, length).to(torch.float64).reshape(-1, length).contiguous().numpy()
    written: list[Any] = []
    shared = False
    for g, n in zip(gradients, (3, 2), strict=True):
        memory, at = terms(steps[0].new_zeros([1] * (len(batch) + n)) if g is None else g, n, layout)
        written += [g is not None, memory, at.chains, at.time]
        shared |= g is not None and g.shape[: g.dim() - n].numel() < layout.chains
    done = np.zeros(layout.chains, np.bool_) if careful is None else careful
    seconds = layout.chains * length * (12 * size + 2 * states * size) * 1e-9
    parts = cut(layout.chains, 1 if shared else thread_count(seconds, max(layout.chains, 1)))

    for again in (False, True):
        if not again or (careful is None and done.any()):
            if again:
                for g in gradients:
                    if g is not None:
                        # What such a chain has added before it was given up.
                        g.view(layout.chains, *g.shape[len(batch) :])[torch.from_numpy(done)] = 0.0
            run([
                partial(
                    filter_rows, first, last, again, size, states // size, length, starts, done, same,
                    *read, totals.numpy(), weights, *written,
                )
                for first, last in parts
            ])  # fmt: skip
    return totals.view(*batch, length) if weight is None else totals, done


def _flat(found: Terms) -> list[Any]:
    memory, at = found
    return [memory, at.chains, at.time, *at.inner]


def _alike(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers, perhaps at the same place."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    return (x.data_ptr() == y.data_ptr() and x.stride() == y.stride()) or torch.equal(x, y)
