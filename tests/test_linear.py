"""Sums of weighted data as matrix products: the same numbers and gradients, and only where it pays."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.compiler.step import trace

T, K, N = 300, 3, 40  # 36000 numbers: large


def draws(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Y, Z = draws(T, 1, N).exp(), draws(T, 1, N, seed=1)
MASK, OTHER = draws(T, 1, N, seed=2) > -1, draws(T, 1, N, seed=3) > -1
A, B = draws(K, 1, seed=4), draws(K, 1, seed=5)


def products(step):
    return sum("weighted" in str(n.target) for n in step.body.graph.nodes)


def large(step, size=T * N):
    """Operations whose result is as large as the data."""
    return sum(
        n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor) and n.meta["val"].numel() >= size
        for n in step.body.graph.nodes
        if not any(name in str(n.target) for name in ("reshape", "permute", "expand"))
    )


def same(f, values, data, *, at=None):
    """Trace ``f`` and check value and gradients at another point; returns the step."""
    step = trace(f, values, data)
    at = [x + 0.3 for x in values] if at is None else at
    free, again = ([x.clone().requires_grad_() for x in at] for _ in range(2))
    wanted, seen = f(*free, *data), step.body(*again, *step.constants(data))
    assert_close(seen, wanted, rtol=1e-11, atol=1e-11)
    weight = draws(*wanted.shape, seed=9)
    found = torch.autograd.grad(seen, again, weight, allow_unused=True)
    for g, h in zip(found, torch.autograd.grad(wanted, free, weight, allow_unused=True), strict=True):
        assert_close(g, h, rtol=1e-10, atol=1e-10)
    return step


def zero(x):
    return torch.zeros((), dtype=x.dtype)


def gamma(a, b, y, mask):
    """A log-density with logarithms of data and weights, constants of the states, and a mask."""
    value = torch.xlogy(a, b) + torch.xlogy(a - 1, y) - b * y - torch.lgamma(a)
    return torch.where(mask, value, zero(value))


def test_an_exponential_family_is_one_product():
    step = same(gamma, [A.exp(), B.exp()], [Y, MASK])
    assert products(step) == large(step) == 1


def test_streams_with_masks_of_their_own_share_the_product():
    def f(a, b, y, z, mask, other):
        first = gamma(a, b, y, mask).permute(1, 0, 2).reshape(K, T * N)
        second = torch.where(other, -a * z.cos() / 2 + 1.5, zero(z)).permute(1, 0, 2).reshape(K, T * N)
        return first + second

    step = same(f, [A.exp(), B.exp()], [Y, Z, MASK, OTHER])
    assert products(step) == large(step) == 1


def test_squares_are_not_multiplied_out():
    def normal(mu, s, y, mask):
        value = -((y - mu) ** 2) / (2 * s.exp() ** 2) - s - 0.9
        return torch.where(mask, value, zero(value))

    step = same(normal, [A, B], [Y, MASK])
    assert products(step) == 1
    assert large(step) == 2  # the constants of the states where they count, and the squares
    step = same(lambda mu, s, y: 1 - (y - mu) ** 2 / s.exp(), [A, B], [Y])
    assert (products(step), large(step)) == (0, 1)
    step = trace(normal, [A, B], [Y, MASK])
    # Far from zero the digits stay: a square that was multiplied out would have lost eight of them.
    far = [1e4 + A, B]
    seen = step.body(*far, *step.constants([1e4 + Y, MASK]))
    assert_close(seen, normal(*far, 1e4 + Y, MASK), rtol=1e-11, atol=1e-9)


def test_weights_that_differ_between_members_are_batches():
    def f(a, b, y):
        return a * y + torch.xlogy(b.exp(), y) - a

    step = same(f, [draws(K, N), B], [Y])
    assert products(step) == 1


def test_a_sum_over_covariates_becomes_rows():
    x = draws(T, 1, N, 4, seed=7)
    step = same(lambda a, b, x: (a * x).sum(-1) - b, [draws(K, 1, 4), B], [x])
    assert products(step) == large(step) == 1


def test_what_is_not_linear_stays_beside_the_product():
    def f(a, b, y, z, mask):
        kernel = torch.log1p(torch.exp(a * z))
        value = b * kernel + a * y - b
        return torch.where(mask, value, zero(y))

    step = same(f, [A, B], [Y, Z, MASK])
    assert products(step) == 1
    step = same(lambda a, y, mask: torch.where(mask, torch.sin(a * y), zero(y)), [A], [Y, MASK])
    assert products(step) == 0


def test_small_sums_are_left_alone():
    step = same(gamma, [A.exp(), B.exp()], [Y[:20], MASK[:20]])
    assert products(step) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_counts_take_the_dtype_of_the_weights(dtype):
    counts = (4 * Y).long()
    step = trace(lambda a, n: a * n - a.exp(), [A.to(dtype)], [counts])
    assert products(step) == 1
    seen = step.body(A.to(dtype), *step.constants([counts]))
    assert_close(seen, A.to(dtype) * counts - A.to(dtype).exp())


def test_masked_data_may_be_anything():
    y = torch.where(MASK, Y, torch.nan)
    step = trace(gamma, [A.exp(), B.exp()], [Y, MASK])
    assert products(step) == 1
    seen = step.body(A.exp(), B.exp(), *step.constants([y, MASK]))
    assert_close(seen, gamma(A.exp(), B.exp(), Y, MASK))


def test_an_impossible_state_stays_impossible_and_a_masked_step_possible():
    a, b = A.exp(), B.exp()
    b[0] = 0.0  # xlogy(a, 0) = -inf
    step = trace(gamma, [A.exp(), B.exp()], [Y, MASK])
    seen = step.body(a, b, *step.constants([Y, MASK]))
    assert_close(seen, gamma(a, b, Y, MASK))
    assert bool((seen[:, 0][~MASK[:, 0]] == 0).all())
    assert bool((seen[:, 0][MASK[:, 0]] == -torch.inf).all())


def test_zeros_in_the_data_are_xlogy():
    y = torch.where(OTHER, Y, 0.0)
    a = torch.ones_like(A)
    a[0] = 2.0
    step = trace(gamma, [A.exp(), B.exp()], [Y, MASK])
    seen = step.body(a, B.exp(), *step.constants([y, MASK]))
    assert_close(seen, gamma(a, B.exp(), y, MASK))
