"""The torch reference of the chains: derivatives of second order, and the scan where it does less than a loop."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains.reference import scan, sequential
from symhmm.semiring import LOG, MAX


def terms(length, size, history, batch=(), holes=0.0):
    generator = torch.Generator().manual_seed(length)
    shapes = (*batch, length, size**history, size), (length, size), (*batch, size**history)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    inputs[0][torch.rand(shapes[0], generator=generator) < holes] = -torch.inf
    return [x.requires_grad_() for x in inputs]


@pytest.mark.parametrize("contract", [sequential, scan])
@pytest.mark.parametrize("length, size, history", [(1, 2, 1), (4, 2, 1), (5, 2, 2), (4, 1, 3)])
def test_two_derivatives_are_right(contract, length, size, history):
    inputs = terms(length, size, history)
    assert torch.autograd.gradcheck(lambda *x: contract(*x, length, history), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: contract(*x, length, history), inputs)


@pytest.mark.parametrize("contract", [sequential, scan])
def test_forbidden_moves_give_finite_derivatives(contract):
    length, history = 5, 2
    inputs = terms(length, 2, history, holes=0.5)
    with torch.no_grad():
        inputs[1][2] = torch.tensor([-torch.inf, 0.0])
    message = contract(*inputs, length, history)
    loss = torch.where(message.isfinite(), message, 0).sum()
    first = torch.autograd.grad(loss, inputs, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
    assert all(g.isfinite().all() for g in (*first, *second))


@pytest.mark.parametrize("semiring", [LOG, MAX])
@pytest.mark.parametrize("length, history", [(1, 1), (64, 1), (63, 1), (37, 2), (38, 3), (2, 3), (1000, 1)])
def test_scan_equals_the_loop(length, history, semiring):
    inputs = terms(length, 2, history, batch=(3,))
    assert_close(
        scan(*inputs, length, history, semiring), sequential(*inputs, length, history, semiring), rtol=1e-10, atol=0
    )


@pytest.mark.parametrize("history", [1, 2, 3])
def test_a_chain_that_is_constant_over_time_is_a_power(history):
    inputs = [x.detach() for x in terms(1, 2, history, batch=(2,))]
    assert_close(scan(*inputs, 1001, history), sequential(*inputs, 1001, history), rtol=1e-10, atol=0)
    # A billion steps are thirty squarings; a stochastic matrix keeps its row sums.
    stochastic = inputs[0].log_softmax(-1)
    assert_close(
        scan(stochastic, torch.zeros(1, 2).double(), torch.zeros(2**history).double(), 10**9, history).exp(),
        torch.ones(2, 2**history).double(),
    )


@pytest.mark.parametrize("contract", [sequential, scan])
def test_half_precision_and_integers_of_steps(contract):
    inputs = [x.detach().bfloat16() for x in terms(6, 2, 1)]
    wanted = sequential(*[x.double() for x in inputs], 6, 1)
    assert_close(contract(*inputs, 6, 1).double(), wanted, rtol=3e-2, atol=3e-2)
