"""A whole chain as one torch operator: its message, the terms of its initial state, and the sum over that.

What is left of a short chain in single operations (an addition, exponentials, sums, logarithms, and their gradients) takes
longer than its kernels.

Value and gradient are one operator, too, for recorded steps in which the gradient does not hang on the value
(`symhmm.compiler.fused`): messages between the two then stay in the cache.
"""

from typing import Any

import torch
from torch import Tensor

from symhmm.chains.registered import (
    chain_backward,
    cpu_operator,
    every,
    fake_chain_gradients,
    leading,
    like_chain,
    no_second_gradient,
    shaped,
)


@cpu_operator
def chain_evidence(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probability (*batch) of all that was seen, probability (*batch, S) of each initial state given it, and what
    `chain` keeps for the gradient. The batch of ``initial`` (*batch, S), nats, is that of the chains or shared."""
    from symhmm.chains import cpu

    return cpu.evidence(initial, transition, emission, terminal, length)


@chain_evidence.register_kernel("cuda")
def _(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from symhmm.chains import cuda

    message, messages, between, products = cuda.forward(transition, emission, terminal, length)
    joint = initial + message
    evidence = joint.logsumexp(-1)
    occupancy = (joint - evidence[..., None]).exp().masked_fill_(evidence[..., None] == -torch.inf, 0)
    return evidence, occupancy, messages, between, products


@shaped(chain_evidence)
def _(initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, ...]:
    message, *kept = like_chain(transition, emission, terminal, length)
    return message.new_empty(message.shape[:-1]), message, *kept


def _setup_evidence(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:4], *output[1:])
    ctx.length, ctx.shape = inputs[4], inputs[0].shape
    ctx.set_materialize_grads(False)


def _evidence_gradient(ctx: Any, gradient: Tensor | None, occupancy: Tensor | None, *_: None) -> tuple[Any, ...]:
    if occupancy is not None:  # only a second derivative asks for it
        no_second_gradient(ctx)
    if gradient is None:
        return (None,) * 5
    transition, emission, terminal, occupancy, *kept = ctx.saved_tensors
    weight = gradient[..., None] * occupancy
    of_chain = (
        chain_backward(weight, transition, emission, terminal, *kept, ctx.length)
        if any(ctx.needs_input_grad[1:4])
        else (None,) * 3
    )
    return weight.sum_to_size(ctx.shape) if ctx.needs_input_grad[0] else None, *of_chain, None


def _batched_evidence(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    inputs = [leading(x, d) for x, d in zip(args[:4], in_dims[:4], strict=True)]
    initial, *terms = inputs
    # Members that differ in their initial terms alone are told apart by the terminal ones, which are small.
    if all(d is None for d in in_dims[1:4]):
        terms[2] = terms[2].expand(info.batch_size, *terms[2].shape[1:])
    return chain_evidence(initial, *terms, args[4]), (0,) * 5


chain_evidence.register_autograd(_evidence_gradient, setup_context=_setup_evidence)
chain_evidence.register_vmap(_batched_evidence)


@cpu_operator
def chain_evidence_gradient(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, weight: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The first result of `chain_evidence`, the second times ``weight`` (*batch, sizes of 1 broadcast; one if None), and the
    gradients of the weighted sum of the first in the shapes of transition, emission and terminal."""
    from symhmm.chains import whole

    return whole.evidence_and_gradient(initial, transition, emission, terminal, weight, length)


@chain_evidence_gradient.register_kernel("cuda")
def _(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, weight: Tensor | None, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from symhmm.chains import cuda

    evidence, first, messages, between, products = chain_evidence(initial, transition, emission, terminal, length)
    first = first if weight is None else weight[..., None] * first
    return evidence, first, *cuda.backward(first, transition, emission, terminal, messages, between, products, length)


@shaped(chain_evidence_gradient)
def _(
    initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, weight: Tensor | None, length: int
) -> tuple[Tensor, ...]:
    first, *_ = like_chain(transition, emission, terminal, length)
    return first.new_empty(first.shape[:-1]), first, *fake_chain_gradients(first, transition, emission, terminal)


def _batched_gradient(
    info: Any, in_dims: tuple[int | None, ...], *args: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    inputs = [None if x is None else every(info, x, d) for x, d in zip(args[:5], in_dims[:5], strict=True)]
    return chain_evidence_gradient(*inputs, args[5]), (0,) * 5


chain_evidence_gradient.register_autograd(no_second_gradient)
chain_evidence_gradient.register_vmap(_batched_gradient)
