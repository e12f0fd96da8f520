"""Operations written on a tape: the numbers that torch makes, of every word, in any arrangement, special numbers among them."""

import pytest
import torch
from torch.nn.functional import softplus
from torch.testing import assert_close

from symhmm.compiler.step import trace
from symhmm.compiler.tape import MOST
from symhmm.compiler.taped import TapedStep, taped
from symhmm.compiler.taping import MOST_DEAR

SPECIAL = torch.tensor(
    [-torch.inf, -3.5, -2.0, -1e-3, -0.0, 0.0, 1e-8, 0.5, 1.0, 2.0, 33.3, torch.inf, torch.nan]
).double()
X, Y = SPECIAL[:, None].expand(13, 13).clone(), SPECIAL.expand(13, 13).clone()
A, B = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
aten = torch.ops.aten


def left(f, *inputs):
    """Operations that torch still carries out, after comparing numbers with the function itself."""
    step = taped(trace(f, inputs, []), len(inputs), fewest=-99)
    assert_close(step.numbers(inputs, step.constants([])), f(*inputs), equal_nan=True, rtol=1e-12, atol=1e-13)
    if not isinstance(step, TapedStep):
        return ["all"]
    return [
        n.name
        for n in step.body.graph.nodes
        if n.op == "call_function" and n.name.split("_")[0] not in ("play", "getitem")
    ]


@pytest.mark.parametrize(
    "f",
    [
        torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.xlogy, torch.pow,
        lambda x, y: torch.addcmul(x, x, y),
        lambda x, y: torch.where(x > y, x, -1.0),
        lambda x, y: torch.where(x.isfinite(), x, y),
        lambda x, y: torch.where((x < y) & ~(y >= 1) | (x > 30), x, y),
        lambda x, y: torch.where(torch.logical_or(x, y), x, 7.0),
        lambda x, y: torch.where(torch.logical_and(x, y), torch.logical_not(x).double(), y),
        lambda x, y: x.masked_fill(x <= y, torch.inf),
        lambda x, y: (x == y).to(x.dtype) - (x != 1).to(x.dtype),
        lambda x, y: aten.softplus_backward(x, y, 1, 20),
        aten.sigmoid_backward.default, aten.tanh_backward.default,
    ],
)  # fmt: skip
def test_two_operands(f):
    assert left(lambda x, y: f(x, y) * 1.5, X, Y) == []


@pytest.mark.parametrize(
    "f",
    [
        torch.neg, torch.abs, torch.sign, torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.sin, torch.cos,
        torch.tanh, torch.sigmoid, torch.erf, torch.lgamma, torch.digamma, torch.reciprocal, torch.square, torch.relu, softplus,
        lambda x: softplus(x, threshold=0.7),
        lambda x: torch.rsub(x, 3),
        lambda x: x**0.5,
        lambda x: x**-0.5,
        lambda x: 2 / x,
        lambda x: x**2,
        lambda x: x**-1.5,
        lambda x: 2.0**x,
        lambda x: x.clamp(-1, 2),
        lambda x: x.clamp(max=0.5),
        lambda x: x.clamp_min(0.5),
    ],
)  # fmt: skip
def test_one_operand(f):
    assert left(lambda x: f(x) * 1.5, X) == []


@pytest.mark.parametrize("x", [X, A], ids=["special", "normal"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x: x.sum(1),
        lambda x: x.sum(),
        lambda x: x.mT.sum((0, 1), keepdim=True),
        lambda x: x[None, :, 1:].sum((0, 2)),
        lambda x: x.amax(0),
        lambda x: x.amax(1, keepdim=True),
        lambda x: x.logsumexp(1),
        lambda x: x[:, 1:3].logsumexp((0, 1)),
        lambda x: x.cumsum(1),
        lambda x: x.cumprod(0),
        lambda x: x.log_softmax(0),
        lambda x: x.softmax(-1),
        lambda x: aten._softmax_backward_data(x, x.sin(), 0, torch.float64),
        lambda x: aten._log_softmax_backward_data(x, x.sin(), -1, torch.float64),
    ],
)
def test_many_numbers_to_one(f, x):
    assert left(lambda x: f(x) * 1.5, x) == []


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x @ y.mT,
        lambda x, y: x @ y[0],
        lambda x, y: x[0].dot(y[1]),
        lambda x, y: torch.bmm(x.expand(2, 3, 4), y.mT.expand(2, 4, 3)),
    ],
)
def test_products_of_matrices(f):
    assert left(lambda x, y: f(x, y) * 1.5, A, B) == []


@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: x.mT.reshape(2, 6),
        lambda x, y: x[1:, ::2] - y[:2, 1],
        lambda x, y: torch.cat([x, y.flip(0)], 1),
        lambda x, y: torch.stack([x[:, 0], y[:, 3].exp(), y[:, 1].expand(3)]),
        lambda x, y: x.split([1, 3], 1)[1] * y.unbind(1)[0][:, None],
        lambda x, y: torch.nn.functional.pad(x, (1, 0, 2, 1)),
        lambda x, y: aten.select_backward(x, [3, 5, 4], 1, 2) + aten.slice_backward(y, [3, 9], 1, 1, 9, 2).sum(),
        lambda x, y: x.diagonal() + x.roll(1, 0)[:, 0],
        lambda x, y: x.unsqueeze(1).expand(3, 2, 4).sum(1).squeeze(),
        lambda x, y: x.repeat(2, 1),
    ],
)
def test_views_only_move_places(f):
    assert left(lambda x, y: f(x, y) * 1.5, A, B) == []


@pytest.mark.parametrize(
    "f, name",
    [
        (lambda x: (x.reshape(12, 1) * torch.arange(MOST // 10)).sum(1), "sum"),
        (lambda x: x.expand(MOST_DEAR, 3, 4).exp()[0], "exp"),
        (lambda x: x.div(2, rounding_mode="floor"), "div"),
        (lambda x: softplus(x, beta=2), "softplus"),
        (lambda x: (x > 0).sum(0).to(x.dtype), "sum"),
        (lambda x: torch.sub(x, x.exp(), alpha=2), "sub"),
        (lambda x: torch.rsub(x, 3, alpha=2), "rsub"),
        (lambda x: x.float().double(), "to"),
        (lambda x: x.sort(0).values, "sort"),
        (lambda x: torch.nn.functional.pad(x, (1, 0), value=2.0), "pad"),
        (lambda x: (x.expand(40, 3, 4).reshape(40, 12)) @ (x.reshape(12, 1) + x.reshape(12)), "mm"),
    ],
)
def test_what_is_left_to_torch(f, name):
    assert any(name in x for x in left(lambda x: f(x * 1.5) * 1.5, A))


@pytest.mark.parametrize("f", [torch.log_softmax, torch.softmax])
@pytest.mark.parametrize("dim", [0, 1])
def test_shares_of_large_and_infinite_numbers(f, dim):
    large = torch.tensor(
        [[1e10, 1e10 - 1, 0.0], [-1e12, -1e12 - 2, -torch.inf], [torch.inf, 1.0, 2.0], [-torch.inf] * 3]
    )
    x = torch.cat([large.double(), torch.tensor([[1e10 - 2, torch.nan, 5e9]], dtype=torch.float64)])
    assert left(lambda x: f(x, dim) * 1.5, x if dim else x.mT.contiguous()) == []


@pytest.mark.parametrize("f", [torch.log_softmax, torch.softmax])
def test_shares_of_a_number_without_dimensions(f):
    assert left(lambda x: f(x.sum(), 0) * 1.5, A) == []


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x.exp().mT.as_strided((2, 2), (1, 3)) * 1.5).sin(),
        lambda x: ((x * 2)[:, 1:3].as_strided((2, 2), (1, 4)) + 1).cos(),
    ],
)
def test_who_asks_where_numbers_lie_in_memory_is_left_to_torch(f):
    assert left(f, A) == ["all"]


def test_single_precision():
    f32 = X.float()
    for f in (torch.exp, torch.lgamma, torch.digamma, torch.log1p, torch.sigmoid, softplus, lambda x: x.logsumexp(0)):
        step = taped(trace(f, [f32], []), 1, fewest=-99)
        seen = step.numbers([f32], step.constants([]))
        assert seen.dtype == torch.float32
        assert_close(seen, f(f32.double()).float(), equal_nan=True, rtol=1e-6, atol=1e-7)
