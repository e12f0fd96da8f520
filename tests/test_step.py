"""Traced steps: equal to the function, cut at the data, without dead or repeated nodes."""

import pytest
import torch

from symhmm.compiler.step import trace
from symhmm.errors import ProgramError


def replay(step, values, data):
    return step.body(*values, *step.constants(data))


def test_data_only_work_moves_to_the_prologue():
    step = trace(lambda x, y: (x * y.exp().sum()).sum(), [torch.ones(3)], [torch.zeros(4)])
    assert step.nodes == 2
    x, y = torch.randn(3), torch.randn(4)
    torch.testing.assert_close(replay(step, [x], [y]), (x * y.exp().sum()).sum())


def test_repeated_and_dead_work_is_removed():
    def f(x):
        x.sin()  # dead
        return x.exp() + x.exp()

    assert trace(f, [torch.ones(3)], []).nodes == 2


def test_in_place_writes_are_kept():
    def f(x, y):
        out = torch.zeros(3)
        out[0] = x[0]
        out[1:] = y[1:]
        out += x
        return out

    step = trace(f, [torch.ones(3)], [torch.ones(3)])
    x, y = torch.randn(3), torch.randn(3)
    torch.testing.assert_close(replay(step, [x], [y]), f(x, y))


def test_output_that_is_data_or_a_value():
    step = trace(lambda x, y: (x, y * 2), [torch.ones(2)], [torch.ones(2)])
    x, y = torch.randn(2), torch.randn(2)
    seen = replay(step, [x], [y])
    torch.testing.assert_close(seen[0], x)
    torch.testing.assert_close(seen[1], 2 * y)


def test_gradients_run_without_autograd():
    def f(x, y):
        x = x.detach().requires_grad_()
        value = (x.log_softmax(-1) * y).sum()
        return value.detach(), *torch.autograd.grad(value, x)

    step = trace(f, [torch.ones(3)], [torch.ones(3)], gradients=True)
    assert not any("detach" in str(n.target) for n in step.body.graph.nodes)
    x, y = torch.randn(3), torch.randn(3)
    for seen, wanted in zip(replay(step, [x], [y]), f(x, y), strict=True):
        torch.testing.assert_close(seen, wanted)


def test_random_numbers_are_refused():
    with pytest.raises(ProgramError, match="draws random numbers"):
        trace(lambda x: x + torch.randn(3), [torch.ones(3)], [])


def test_logarithms_of_data_are_taken_once():
    def f(x, y):
        x = x.detach().requires_grad_()
        value = torch.xlogy(x - 1, y).sum() + torch.xlogy(y, x).sum()
        return value.detach(), *torch.autograd.grad(value, x)

    y = torch.tensor([0.0, 0.0, 2.0, 3.0])
    step = trace(f, [torch.full((4,), 2.0)], [y], gradients=True)
    assert not any("xlogy" in str(n.target) for n in step.body.graph.nodes)
    # One logarithm is left: that of the value. Zero times the logarithm of zero stays zero, also in the gradient.
    assert sum("log" in str(n.target) and "logical" not in str(n.target) for n in step.body.graph.nodes) == 1
    for x in (torch.tensor([1.0, 1.5, 2.5, 1.0]), torch.tensor([1.0, 1.0, 1.0, 3.0])):
        for seen, wanted in zip(replay(step, [x], [y]), f(x, y), strict=True):
            torch.testing.assert_close(seen, wanted)


def test_numbers_may_take_part_in_derivatives_again():
    step = trace(lambda x, y: (x * y, x), [torch.ones(3)], [torch.ones(3)])
    x = torch.ones(3, requires_grad=True)
    product, same = step.numbers([x.detach()], step.constants([torch.full((3,), 2.0)]))
    assert not product.is_inference() and not same.is_inference()
    (product * x).sum().backward()
    torch.testing.assert_close(x.grad, torch.full((3,), 2.0))


def test_torch_functions_take_the_place_of_their_operators():
    def f(x, y):
        parts = torch.stack([x.clamp(-1, 1), x.flip(0), torch.where(y > 0, x, -x), x.cumsum(0), x**2 - 3])
        a = torch.cat([parts.logsumexp(1, keepdim=True), parts.amax(1, keepdim=True)], 1)
        b = (1 - parts.masked_fill(y < 0, 0.5)).sum(0, keepdim=True).mT.reshape(-1)
        return a.select(0, 1), torch.addcmul(b, x, y) / 2 + torch.xlogy(y.abs(), x.abs()), (x > y) & ~(x < 0)

    x, y = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    step = trace(f, [x], [y])
    assert sum("aten" in str(n.target) for n in step.body.graph.nodes) == 0, step.body.graph
    for seen, wanted in zip(step.numbers([x], step.constants([y])), f(x, y), strict=True):
        torch.testing.assert_close(seen, wanted)
