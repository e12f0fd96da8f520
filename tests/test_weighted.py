"""Weighted sums of data: equal to the sum written out, its derivatives, and what zero times infinity is."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.compiler.weighted import weighted

B, J, K, R = 2, 3, 4, 7


def inputs(batch=B):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(batch, J, K, generator=generator, dtype=torch.float64)
    return weights, torch.randn(batch, J, R, generator=generator, dtype=torch.float64), torch.tensor(True)


def plain(weights, rows, _):
    return (weights[:, :, :, None] * rows[:, :, None, :]).sum(1)


@pytest.mark.parametrize("batch", [1, B])
def test_value_and_first_two_derivatives(batch):
    weights, rows, clean = inputs(batch)
    weights.requires_grad_()
    assert_close(weighted(weights, rows, clean), plain(weights, rows, clean))
    assert torch.autograd.gradcheck(lambda w: weighted(w, rows, clean), weights)
    assert torch.autograd.gradgradcheck(lambda w: weighted(w, rows, clean).sin(), weights)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch's own, in forward mode
def test_vmap_of_value_and_gradient():
    weights, rows, clean = inputs()
    many = torch.stack([weights, weights.sin(), 2 * weights], 1)  # members in the second dimension
    seen = torch.func.vmap(lambda w: weighted(w, rows, clean), in_dims=1)(many)
    assert_close(seen, torch.stack([plain(w, rows, clean) for w in many.unbind(1)]))

    def objective(f):
        return lambda w: f(w, rows, clean).sin().sum()

    seen = torch.func.vmap(torch.func.grad(objective(weighted)), in_dims=1)(many)
    assert_close(seen, torch.stack([torch.func.grad(objective(plain))(w) for w in many.unbind(1)]))
    hessian = torch.func.hessian(objective(weighted))(weights)
    assert_close(hessian, torch.func.hessian(objective(plain))(weights))


def test_vmap_over_rows():
    weights, rows, clean = inputs()
    many, g = torch.stack([rows, 2 * rows]), torch.randn(B, K, R, dtype=torch.float64)

    def slope(r):
        return torch.func.grad(lambda w: (g * weighted(w, r, clean)).sum())(weights)

    seen = torch.func.vmap(lambda r: weighted(weights, r, clean))(many)
    assert_close(seen, torch.stack([plain(weights, r, clean) for r in many]))
    assert_close(torch.func.vmap(slope)(many), torch.stack([slope(r) for r in many]))


def test_a_row_of_zeros_counts_nothing_whatever_its_weight():
    weights, rows, clean = inputs()
    rows[:, 0, 2:] = 0
    weights[:, 0, 1] = -torch.inf
    seen = weighted(weights, rows, clean)
    assert_close(seen[:, 1, 2:], plain(weights[:, 1:], rows[:, 1:], clean)[:, 1, 2:])
    assert bool((seen[:, 1, :2].abs() == torch.inf).all())
    others = [0, 2, 3]
    assert_close(seen[:, others], plain(weights, rows, clean)[:, others])


def test_zero_times_an_infinite_row_is_zero_as_in_xlogy():
    y = torch.tensor([0.0, 2.0, 0.0])
    x = torch.tensor([0.0, 1.5], requires_grad=True)
    rows, clean = y.log().reshape(1, 1, 3), torch.tensor(False)
    seen, wanted = weighted(x.reshape(1, 1, 2), rows, clean)[0], torch.xlogy(x[:, None], y)
    assert_close(seen, wanted)
    # A state that is not in play has no gradient; the others keep theirs.
    weight = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, 0.0]])
    (g,) = torch.autograd.grad(seen, x, weight)
    (h,) = torch.autograd.grad(wanted, x, weight)
    assert_close(g, torch.tensor([y[1].log(), 2 * y[1].log()]))
    assert_close(h[0], g[0])


def test_missing_numbers_are_not_hidden():
    weights, rows, _ = inputs(1)
    rows[0, 1, 3] = torch.nan
    weights[0, 1, 2] = 0
    seen = weighted(weights, rows, torch.tensor(False))
    assert bool(seen[0, :, 3].isnan().all())
    assert not bool(seen[0, :, :3].isnan().any())
