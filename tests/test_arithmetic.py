"""Signs, ones and quotients in traced graphs: fewer operations, the same numbers and derivatives."""

import pytest
import torch
from test_laws import X, Y, both, operations, shorter

from symhmm.compiler.step import trace


@pytest.mark.parametrize(
    "f, left",
    [
        (lambda x, y: (-x).neg() * y, 1),
        (lambda x, y: (-x) * (-y), 1),
        (lambda x, y: -1.0 * x + y, 1),
        (lambda x, y: x + (-y), 1),
        (lambda x, y: x - (-y), 1),
        (lambda x, y: (-x) + y, 1),
        (lambda x, y: (-x) - (-y), 1),
        (lambda x, y: -(x - y), 1),
        (lambda x, y: (-x) - y, 2),
        (lambda x, y: (-(x * 2) / y).sum(0).reshape(2, 2) - y[:1].reshape(2, 2), 8),
        (lambda x, y: (-x) ** 2 + (-y).abs(), 3),
        (lambda x, y: -x - 3.0 + y, 2),
        (lambda x, y: 3.0 - (-x) + y, 2),
        (lambda x, y: (-x) @ y.mT - 1.5, 3),
        (lambda x, y: -(x * y.sum(0)), 3),
    ],
)
def test_signs_are_taken_last_or_vanish(f, left):
    names = shorter(f, X, Y, left=left)
    assert sum("neg" in name for name in names) == sum("neg" in name for name in names[-1:])


def test_the_sign_of_a_few_numbers_is_not_taken_of_many():
    few, many = torch.randn(3, 1, dtype=torch.float64), torch.randn(3, 10_000, dtype=torch.float64)
    _, after = both(lambda x, y: (-x * y).exp(), few, many)
    assert operations(after)[0] == "aten.neg.default"


@pytest.mark.parametrize(
    "f, left",
    [
        (lambda x, y: x * torch.ones_like(y), 0),
        (lambda x, y: torch.ones_like(y)[:1] * x, 0),
        (lambda x, y: x / y.new_ones(4) + y.new_zeros(3, 1), 0),
        (lambda x, y: x - torch.full_like(x, 0.0), 0),
        (lambda x, y: x * torch.full_like(x, 2.0), 2),
        (lambda x, y: x[:1] * torch.ones_like(y), 2),
    ],
)
def test_ones_and_zeros_that_change_nothing(f, left):
    shorter(lambda x, y: f(x, y).exp(), X, Y, left=left + 1)


def test_ones_of_another_dtype_stay():
    _, after = both(lambda x: x * torch.ones_like(x, dtype=torch.float64), torch.arange(3))
    assert after(torch.arange(3))[0].dtype == torch.float64


def test_what_hangs_on_a_shape_alone_does_not_hang_on_the_numbers():
    _, after = both(lambda x: torch.cat([x.new_zeros(2, 4), torch.full_like(x, 3.0), x]), X)
    full = [n for n in after.graph.nodes if "full" in str(n.target)]
    assert len(full) == 2 and not any(n.all_input_nodes for n in full)


def test_a_quotient_and_its_gradient_divide_once():
    def f(x, y):
        q = x / y
        (of_x, of_y) = torch.autograd.grad(q.sin().sum(), (x, y))
        return torch.stack([of_x, of_y])

    inputs = X.clone().requires_grad_(), (Y.abs() + 1).requires_grad_()
    _, after = both(f, *inputs)
    assert sum("div" in name for name in operations(after)) == 2  # x / y, and the gradient of that by y
    torch.testing.assert_close(after(*inputs)[0], f(*inputs))


def test_products_of_quotients_by_the_same_number_come_to_an_end():
    shorter(lambda x, y: (x / y / y) * (x.exp() / y / y) + (x / y) * (x / y / y), X, Y, left=8)


def test_what_a_cut_leaves_alone_is_asked_once():
    def f(x):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((x.clamp(-0.5, 0.5) * x).sum(), x)
        return gradient

    x = torch.tensor([-1.0, -0.5, 0.2, 0.5, 3.0, torch.nan])
    step = trace(f, [x], [], gradients=True)
    names = [n.target.__name__ for n in step.body.graph.nodes if n.op == "call_function"]
    assert "eq" in names and not {"logical_and", "ge", "le"} & set(names)
    torch.testing.assert_close(step.numbers([x], step.constants([])), f(x), equal_nan=True)
