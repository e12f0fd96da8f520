"""Signs, ones and quotients in traced graphs: fewer operations, the same numbers and derivatives."""

import random

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


@pytest.mark.parametrize(
    "f, numbers",
    [
        (lambda x, y: x.square().sum() + (x - 1).square().sum(), 1),
        (lambda x, y: (((x - y) / y) ** 2).sum(0).prod(), 2),
        (lambda x, y: (x**2 * y).sum() + (x**3).sum(), 2),
        (lambda x, y: (x**2).square().sum(), 1),
    ],
)
def test_the_numbers_of_derivatives_of_powers_are_taken_last(f, numbers):
    def gradient(x, y):
        free = [z.detach().requires_grad_() for z in (x, y)]
        return torch.cat(torch.autograd.grad(f(*free), free, materialize_grads=True))

    _, after = both(gradient, X, Y)
    assert sum(name == "aten.mul.Scalar" for name in operations(after)) == numbers, operations(after)
    torch.testing.assert_close(after(X, Y)[0], gradient(X, Y), rtol=1e-12, atol=1e-12)


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


def test_signs_and_numbers_of_powers_among_views_come_to_an_end():
    def f(x):
        (of_x,) = torch.autograd.grad((-(x[:, None] ** 2)).sum(), x)
        return -(-(of_x[:, None].mT) * of_x.reshape(3, 4, 1)).reshape(12)

    x = X.clone().requires_grad_()
    _, after = both(f, x)
    torch.testing.assert_close(after(x)[0], f(x))


def at_random(draw, inputs, depth):
    """A number made of operations that the laws are about, in any order."""
    made = list(inputs)
    for _ in range(depth):
        x, y = draw.choice(made), draw.choice(made)
        step = draw.choice(
            [
                lambda x, y: -x, lambda x, y: x * 2.0, lambda x, y: x**2, lambda x, y: x[..., None], lambda x, y: x[None],
                lambda x, y: x.sum(-1, keepdim=True) if x.dim() else x, lambda x, y: x.sum(0) if x.dim() else x,
                lambda x, y: x + y, lambda x, y: x - y, lambda x, y: x * y, lambda x, y: x / (y**2 + 1),
                lambda x, y: x.mT if x.dim() > 1 else x, lambda x, y: x.clamp(-1, 1), lambda x, y: x.reshape(-1),
                lambda x, y: torch.where(y > 0, x, 0.0), lambda x, y: x.expand(2, *x.shape), lambda x, y: (x - 1.5) * -1.0,
            ]
        )  # fmt: skip
        try:
            result = step(x, y)
        except RuntimeError:  # shapes that do not fit
            continue
        if result.numel() <= 400 and result.dim() <= 6:
            made.append(result)
    return sum(x.sin().sum() for x in made[-6:])


@pytest.mark.parametrize("seed", range(40))
def test_any_order_of_operations_comes_to_an_end_with_the_same_numbers(seed):
    def f(*values):
        free = [x.detach().requires_grad_() for x in values]
        value = at_random(random.Random(seed), free, 4 + seed % 26)
        return value.detach(), *torch.autograd.grad(value, free, materialize_grads=True)

    inputs, other = ([torch.randn(s, dtype=torch.float64) for s in ((3, 4), (4,), (3, 1), ())] for _ in range(2))
    step = trace(f, inputs[:3], inputs[3:], gradients=True)
    torch.testing.assert_close(step.numbers(other[:3], step.constants(other[3:])), f(*other), rtol=1e-9, atol=1e-9)
