"""A whole chain as one torch operator: its message, the terms of its initial state, and the sum over that.

What is left of a short chain in single operations (an addition, exponentials, sums, logarithms, and their gradients) takes
longer than its kernels.
"""

from typing import Any

import torch
from torch import Tensor

from symhmm.chains.registered import chain_backward, cpu_operator, leading, like_chain, no_second_gradient


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


@chain_evidence.register_fake
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
