"""Forward filters of a batch of chains: the log-weight of the data up to every step, with other terms at the step itself."""

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

    The forward recursion (Rabiner 1989, eq. 19 to 21), scaled; cost T S K per chain, no memory but the result. It is
    differentiable in the terms of the step itself, once: d / d now_emission[t] are the probabilities of the state of step
    t given the data up to t.

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
    """The recursion runs again for the gradient, so that nothing of it is kept."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        now_transition, now_emission, start, transition, emission, length = args
        tensors = [x.detach() for x in (start, transition, emission, now_transition, now_emission)]
        ctx.save_for_backward(*tensors)
        ctx.length = length
        out, ctx.careful = _run(tensors, length, None, [])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = grads
        tensors = list(ctx.saved_tensors)
        wanted = [torch.zeros(x.shape, dtype=x.dtype) if ctx.needs_input_grad[i] else None
                  for i, x in enumerate(tensors[3:])]  # fmt: skip
        _run(tensors, ctx.length, weight, wanted, ctx.careful)
        return (*wanted, None, None, None, None)


def _run(
    tensors: list[Tensor],
    length: int,
    weight: Tensor | None,
    gradients: list[Tensor | None],
    careful: NDArray[np.bool_] | None = None,
) -> tuple[Tensor, NDArray[np.bool_]]:
    start, *steps = tensors
    states, size = steps[0].shape[-2:]
    batch = common_batch(start.shape[:-1], *(x.shape[: x.dim() - n] for x, n in zip(steps, (3, 2, 3, 2), strict=True)))
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
    for g, n in zip(gradients or [None, None], (3, 2), strict=True):
        memory, at = terms(steps[0].new_zeros([1] * (len(batch) + n)) if g is None else g, n, layout)
        written += [g is not None, memory, at.chains, at.time]
        shared |= g is not None and g.shape[: g.dim() - n].numel() < layout.chains
    done = np.zeros(layout.chains, np.bool_) if careful is None else careful
    seconds = layout.chains * length * (12 * size + 2 * states * size) * 1e-9
    parts = cut(layout.chains, 1 if shared else thread_count(seconds, max(layout.chains, 1)))

    for again in (False, True):
        if not again or (careful is None and done.any()):
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
    """Whether two tensors are the same numbers at the same place."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
