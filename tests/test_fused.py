"""Which chains of a recorded step are one operation with their gradients, and that nothing changes by it."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from symhmm.chains.operator import chain_evidence, chain_message
from symhmm.compiler.step import trace

TOGETHER, APART = ["chain_evidence_gradient"], ["chain_evidence", "chain_backward"]


def total(z: Tensor, extra: Tensor) -> Tensor:
    return z.sum()


def halved(z: Tensor, extra: Tensor) -> Tensor:
    return (z / 2).sum() - extra.sum()


def weighted(z: Tensor, extra: Tensor) -> Tensor:
    return (z * extra.exp()).sum()


def mixture(z: Tensor, extra: Tensor) -> Tensor:
    return (z + extra).logsumexp(0)


def weighted_by_itself(z: Tensor, extra: Tensor) -> Tensor:
    return (z * (extra * z).exp()).sum()


def square(z: Tensor, extra: Tensor) -> Tensor:
    return z.square().sum()


def twice(z: Tensor, extra: Tensor) -> Tensor:
    return (z * extra).sum() + z.sum()


@pytest.mark.parametrize(
    "use, wanted",
    [
        (total, TOGETHER), (halved, TOGETHER), (weighted, TOGETHER), (twice, TOGETHER), (mixture, APART),
        (weighted_by_itself, APART), (square, APART),
    ],
)  # fmt: skip
@pytest.mark.parametrize("late", [False, True])
def test_one_operation_unless_weights_hang_on_values(use, wanted, late):
    """``late``: what the value is used with is only made after the chain."""

    def step(initial: Tensor, transition: Tensor, emission: Tensor, extra: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (initial, transition, emission, extra)]
        if late:
            z = chain_evidence(*inputs[:3])
            value = use(z, inputs[3].sin() * inputs[3])
        else:
            other = inputs[3].sin() * inputs[3]
            value = use(chain_evidence(*inputs[:3]), other)
        found = torch.autograd.grad(value, inputs, allow_unused=True)
        return [value.detach(), *(torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True))]

    torch.manual_seed(0)
    first, other = ([torch.randn(s, dtype=torch.float64) for s in ((3,), (1, 3, 3), (5, 9, 3), (5,))] for _ in range(2))
    recorded = trace(step, first, [], gradients=True)
    assert operators(recorded) == wanted
    for values in (first, other):
        assert_close(recorded.numbers(values, recorded.constants([])), tuple(step(*values)), rtol=1e-10, atol=1e-10)


def operators(recorded) -> list[str]:
    return [n.target.__name__ for n in recorded.body.graph.nodes if "chain" in n.name]


def test_each_of_several_chains_is_decided_by_itself():
    """The second one's weights are the first one's values."""

    def step(transition: Tensor, emission: Tensor, later: Tensor) -> list[Tensor]:
        inputs = [x.detach().requires_grad_() for x in (transition, emission, later)]
        even = torch.zeros(2, dtype=torch.float64)
        a, b = chain_evidence(even, inputs[0], inputs[1]), chain_evidence(even, inputs[0], inputs[2])
        value = (a * b).sum() + chain_evidence(even, inputs[0], inputs[1] + inputs[2]).sum()
        return [value.detach(), *torch.autograd.grad(value, inputs)]

    values = [torch.randn(s, dtype=torch.float64) for s in ((1, 2, 2), (4, 7, 2), (4, 7, 2))]
    recorded = trace(step, values, [], gradients=True)
    assert sorted(operators(recorded)) == sorted(["chain_evidence", "chain_backward", *TOGETHER, *TOGETHER])
    assert_close(recorded.numbers(values, recorded.constants([])), tuple(step(*values)), rtol=1e-10, atol=1e-10)


def test_a_value_alone_and_messages_stay_as_they_are():
    inputs = [torch.randn(s) for s in ((3,), (1, 3, 3), (5, 9, 3))]
    assert operators(trace(chain_evidence, inputs, [], gradients=True)) == ["chain_evidence"]

    def step(initial: Tensor, transition: Tensor, emission: Tensor) -> list[Tensor]:
        transition = transition.detach().requires_grad_()
        value = (chain_message(transition, emission) + initial).logsumexp(-1).sum()
        return [value.detach(), *torch.autograd.grad(value, transition)]

    assert operators(trace(step, inputs, [], gradients=True)) == ["chain", "chain_backward"]
