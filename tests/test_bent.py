import closed_forms as cf
import pytest
import torch

from symhmm.infer.guide import Moments
from symhmm.tables.bent import Bends, Bent


def bends(shape=()):
    generator = cf.generator(5)
    skew, tail = (0.5 * torch.randn(*shape, generator=generator, dtype=cf.REAL) for _ in range(2))
    return Bends(skew, tail)


def test_inverse_and_its_derivative():
    f = bends((40,))
    x = torch.linspace(-4.0, 4.0, 40, dtype=cf.REAL).requires_grad_()
    back, change = f.inverse(f(x))
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(change, -slope.log(), rtol=1e-9, atol=1e-9)


def test_the_middle_stays_where_it_is():
    f = bends((6,))
    x = torch.zeros(6, dtype=cf.REAL).requires_grad_()
    (slope,) = torch.autograd.grad(f(x).sum(), x)
    torch.testing.assert_close(f(x), torch.zeros_like(x))
    torch.testing.assert_close(slope, torch.ones_like(x))


def test_a_negative_skew_makes_the_lower_tail_longer_and_a_small_tail_makes_both_heavier():
    three = cf.real([-3.0, 3.0])
    low, high = Bends(cf.real(-0.5), cf.real(0.0))(three).tolist()
    assert -low > 1.5 * high
    low, high = Bends(cf.real(0.0), cf.real(-0.5))(three).tolist()
    assert -low == pytest.approx(high)
    assert high > 4


def test_moments_by_quadrature_are_those_of_draws():
    f, sd = bends((3,)), cf.real([0.5, 1.0, 1.5])
    mean, variance = f.moments(sd)
    drawn = f(sd * torch.randn(400_000, 3, generator=cf.generator(6), dtype=cf.REAL))
    torch.testing.assert_close(mean, drawn.mean(0), rtol=0, atol=0.02 * float(drawn.std(0).max()))
    torch.testing.assert_close(variance, drawn.var(0), rtol=0.05, atol=0)


def test_bent_density_is_one_in_total_and_that_of_its_draws():
    moments = Moments(cf.real([[0.3]]), cf.real([[0.7]]), bends=bends((1, 1)))
    u = torch.linspace(-40.0, 40.0, 400_001, dtype=cf.REAL)
    total = torch.vmap(moments.log_density)(u[:, None, None]).exp().sum() * (u[1] - u[0])
    assert total.item() == pytest.approx(1.0, abs=1e-5)
    root = cf.real([[[0.7, 0.0], [0.4, 0.5]]])
    both = Moments(cf.real([[0.3, -1.0]]), cf.real([[0.7, 0.5]]), root=root, bends=bends((1, 2)))
    e = torch.randn(2, generator=cf.generator(1), dtype=cf.REAL)
    slope = torch.func.jacrev(both.draw)(e)[0]
    wanted = torch.distributions.Normal(0.0, 1.0).log_prob(e).sum() - torch.linalg.slogdet(slope)[1]
    torch.testing.assert_close(both.log_density(both.draw(e)), wanted[None])


def test_as_a_result():
    root, f = cf.real([[[0.7, 0.0], [0.4, 0.5]]]), bends((1, 2))
    block = Bent((), torch.tensor([[3, 1]]), cf.real([[0.3, -1.0]]), root, f)
    noise = torch.randn(200_000, 1, 2, generator=cf.generator(2), dtype=cf.REAL)
    drawn = block.draw(torch.zeros(0), noise)
    moments = Moments(block.loc, cf.real([[0.7, 0.5]]), root=root, bends=f)
    torch.testing.assert_close(drawn[:5], torch.vmap(moments.draw)(noise[:5, 0]))
    torch.testing.assert_close(block.variance(torch.zeros(0)), drawn.var(0), rtol=0.05, atol=0)
    assert block.moved(torch.tensor([2, 0, 1, 3])).index.tolist() == [[3, 0]]
