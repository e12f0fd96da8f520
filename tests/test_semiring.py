"""The reductions of the semirings where nothing is possible."""

import math

import pytest
import torch
from torch.testing import assert_close

from symhmm.semiring import LOG, MAX, log_sum_exp


@pytest.mark.parametrize("semiring", [LOG, MAX])
def test_a_sum_over_one_entry_is_that_entry(semiring):
    x = torch.tensor([[-3.0], [-torch.inf], [1e4]])
    assert_close(semiring.reduce(x, -1), x[:, 0])


def test_log_sum_exp_equals_torch_with_two_derivatives():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert_close(log_sum_exp(x, 1), x.logsumexp(1))
    assert torch.autograd.gradcheck(lambda x: log_sum_exp(x, 0), x)
    assert torch.autograd.gradgradcheck(lambda x: log_sum_exp(x, 0), x)


def test_what_is_impossible_has_no_gradient_of_any_order():
    x = torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]], requires_grad=True)
    total = log_sum_exp(x, -1)
    assert_close(total, torch.tensor([-torch.inf, 0.0]))
    (first,) = torch.autograd.grad(total[1] + total[0].clamp(min=-1), x, create_graph=True)
    assert_close(first, torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    (second,) = torch.autograd.grad(first.sum(), x)
    assert_close(second, torch.zeros(2, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_peaks_that_are_no_finite_number(dtype):
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([[inf, 0.0], [inf, inf], [nan, 0.0], [-inf, nan], [-6e4, -6e4]], dtype=dtype).requires_grad_()
    total = log_sum_exp(x, -1)
    wanted = torch.tensor([inf, inf, nan, nan, -6e4 + math.log(2)], dtype=dtype)
    assert_close(total, wanted, equal_nan=True)
    (gradient,) = torch.autograd.grad(total[4], x)
    assert_close(gradient[4], torch.full((2,), 0.5, dtype=dtype))


def test_under_transforms():
    x = torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]], dtype=torch.float64)
    assert_close(torch.func.vmap(lambda y: log_sum_exp(y, 0))(x), log_sum_exp(x, -1))
    found = torch.func.vmap(torch.func.grad(lambda y: log_sum_exp(y, 0)))(x)
    assert_close(found, torch.stack([x[0].softmax(0), torch.zeros(2, dtype=torch.float64)]))


def test_names():
    assert (repr(LOG), repr(MAX)) == ("LOG", "MAX")
