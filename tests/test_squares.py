"""Weighted squares: equal to the sum written out, its derivatives, under vmap, and in pieces."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import squares
from symhmm.chains.square_steps import BLOCK
from symhmm.compiler.squares import squared

B, J, K, R = 2, 3, 4, 700


def inputs(batch=B, columns=R, shared=False):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    before = draw(batch, K, 1 if shared else columns)
    return [before, draw(batch, K), draw(batch, J, K)], draw(batch, J, columns)


def plain(before, scale, weights, rows):
    return before + scale[..., None] * (weights[:, :, :, None] * rows[:, :, None, :]).sum(1) ** 2


def with_rows(rows, clean=True):
    return lambda *values: squared(*values, rows, torch.tensor(clean))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("batch", [1, B])
def test_value_and_first_two_derivatives(batch, shared):
    values, rows = inputs(batch, 5, shared)
    values = [x.requires_grad_() for x in values]
    assert_close(with_rows(rows)(*values), plain(*values, rows))
    assert torch.autograd.gradcheck(with_rows(rows), values)
    assert torch.autograd.gradgradcheck(lambda *v: with_rows(rows)(*v).sin(), values)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [True, False])
def test_blocks_and_parts_add_up(monkeypatch, threads, dtype, shared):
    monkeypatch.setattr(squares, "thread_count", lambda seconds, parts: threads)
    values, rows = inputs(columns=2 * BLOCK + 21, shared=shared)
    values = [x.to(dtype).requires_grad_() for x in values]
    doubles = [x.detach().double().requires_grad_() for x in values]
    seen, wanted = with_rows(rows.to(dtype))(*values), plain(*doubles, rows.to(dtype).double())
    tolerance = {"rtol": 1e-12, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-3}
    assert_close(seen.double(), wanted, **tolerance)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad(seen, values, weight.to(dtype)), torch.autograd.grad(wanted, doubles, weight)
    for g, h in zip(*found, strict=True):
        assert_close(g.double(), h, **tolerance)


def test_vmap_of_value_and_gradient():
    values, rows = inputs(columns=6)
    many = [torch.stack([x, x.sin()]) for x in values]
    assert_close(torch.func.vmap(with_rows(rows))(*many), torch.func.vmap(lambda *v: plain(*v, rows))(*many))

    def slope(f):
        return torch.func.grad(lambda *v: f(*v).sin().sum(), argnums=(0, 1, 2))

    seen = torch.func.vmap(slope(with_rows(rows)))(*many)
    wanted = torch.func.vmap(slope(lambda *v: plain(*v, rows)))(*many)
    for g, h in zip(seen, wanted, strict=True):
        assert_close(g, h)


def test_where_the_sum_is_zero_its_square_counts_nothing():
    values, rows = inputs(columns=6)
    rows[:, :, 3:] = 0
    values[1][:, 2] = -torch.inf
    before = values[0]
    seen = with_rows(rows)(*(x.requires_grad_() for x in values))
    assert_close(seen[..., 3:], before[..., 3:])
    assert bool((seen[:, 2, :3] == -torch.inf).all())
    others = [0, 1, 3]
    assert_close(seen[:, others], plain(*values, rows)[:, others])
    slopes = torch.autograd.grad(seen[..., 3:].sum(), values)
    assert all(bool(g[:, others].isfinite().all()) for g in slopes[:2])


def test_infinite_data():
    values, rows = inputs(columns=6)
    rows[0, 0, 1] = torch.inf
    seen = with_rows(rows, clean=False)(*values)
    assert_close(seen, plain(*values, rows))
    assert bool(seen[0, :, 1].isinf().all())


def test_inside_of_a_transform_that_batches_something_else():
    """Once failed: effects of individuals are batched, and emissions do not depend on them."""
    inputs = (torch.zeros(1, 2, 1), torch.rand(1, 2), torch.rand(1, 3, 2), torch.rand(1, 3, 4), torch.tensor(True))
    wanted = squared(*inputs)
    found = torch.func.vmap(lambda x: x + squared(*inputs))(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(found, torch.stack([wanted, wanted + 1]))


@pytest.mark.parametrize("columns", [6, 40])
def test_infinite_weights_count_nothing_where_rows_are_zero(columns):
    values, rows = inputs(columns=columns)
    rows[:, 1, columns // 2 :] = 0
    values[2][:, 1, 2] = torch.inf
    seen = with_rows(rows)(*values)
    finite = [values[0], values[1], values[2].clone()]
    finite[2][:, 1, 2] = 0
    wanted = plain(*finite, rows)
    wanted[:, 2, : columns // 2] = values[1][:, 2, None].sign() * torch.inf
    assert_close(seen, wanted)


def test_gradients_lie_in_memory_as_their_fake_twins_do():
    values, rows = inputs()
    weight = torch.ones(B, K, R, dtype=torch.float64)
    args = weight, values[1], values[2], rows, torch.tensor(True)
    torch.library.opcheck(torch.ops.symhmm.squared.default, (*values, *args[3:]), test_utils="test_faketensor")
    torch.library.opcheck(torch.ops.symhmm.squared_backward.default, args, test_utils="test_faketensor")
