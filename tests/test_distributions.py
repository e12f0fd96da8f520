"""Distributions against mpmath at forty digits, in value and gradient, under vmap and under tracing."""

import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch.autograd import grad, gradcheck
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from symhmm.distributions import GammaMeanSd, VonMises, stationary_distribution
from symhmm.errors import ShapeError, ValuesError

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


def exact_von_mises(value, loc, concentration):
    value, loc, k = map(mpmath.mpf, (value, loc, concentration))
    return k * mpmath.cos(value - loc) - mpmath.log(2 * mpmath.pi * mpmath.besseli(0, k))


def exact_gamma(value, mean, sd):
    value, mean, sd = map(mpmath.mpf, (value, mean, sd))
    shape, rate = (mean / sd) ** 2, mean / sd**2
    return shape * mpmath.log(rate) + (shape - 1) * mpmath.log(value) - rate * value - mpmath.loggamma(shape)


def exact_with_gradient(function, *arguments):
    """Value and gradient by numerical differentiation in forty digits."""
    with mpmath.workdps(40):
        gradient = []
        for i in range(len(arguments)):
            order = tuple(int(i == j) for j in range(len(arguments)))
            # A parameter at the edge of its range (concentration 0) is approached from above.
            gradient.append(float(mpmath.diff(function, arguments, order, direction=1, h=mpmath.mpf(10) ** -18)))
        return float(function(*arguments)), gradient


@pytest.mark.parametrize("concentration", [0.0, 1e-6, 0.3, 3.75, 7.9, 8.1, 60.0, 2000.0, 1e5])
@pytest.mark.parametrize("angle", [0.4, -3.0, 9.0])
def test_von_mises_value_and_gradient(concentration, angle):
    inputs = [tensor(x).requires_grad_() for x in (angle, 0.39, concentration)]
    actual = VonMises(inputs[1], inputs[2], validate_args=True).log_prob(inputs[0])
    value, gradient = exact_with_gradient(exact_von_mises, angle, 0.39, concentration)
    assert_close(actual, tensor(value), rtol=1e-13, atol=1e-13)
    assert_close(torch.stack(grad(actual, inputs)), tensor(gradient), rtol=1e-11, atol=1e-11)


def test_von_mises_integrates_to_one_where_the_polynomial_does_not():
    angles = torch.linspace(-math.pi, math.pi, 20001, dtype=torch.float64)[1:]
    for k in (0.0, 1.0, 3.0, 30.0):
        total = VonMises(0.3, tensor(k)).log_prob(angles).exp().mean() * 2 * math.pi
        assert abs(total - 1) < 1e-13
    polynomial = dist.VonMises(0.3, tensor(3.0)).log_prob(angles).exp().mean() * 2 * math.pi
    assert abs(polynomial - 1) > 1e-9


def test_von_mises_samples_have_its_moments():
    k = tensor([0.0, 1e-7, 0.5, 4.0, 500.0])
    d = VonMises(tensor(1.0), k)
    draws = d.sample((40000,))
    assert draws.abs().max() <= math.pi
    assert_close(torch.cos(draws - 1.0).mean(0), 1 - d.variance, rtol=0, atol=0.02)
    assert_close(torch.sin(draws - 1.0).mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=0.02)


@pytest.mark.parametrize(("mean", "sd"), [(4.0, 2.0), (0.01, 0.3), (300.0, 1.0)])
@pytest.mark.parametrize("ratio", [0.05, 1.0, 3.0])
def test_gamma_value_and_gradient(mean, sd, ratio):
    inputs = [tensor(x).requires_grad_() for x in (ratio * mean, mean, sd)]
    actual = GammaMeanSd(inputs[1], inputs[2], validate_args=True).log_prob(inputs[0])
    value, gradient = exact_with_gradient(exact_gamma, ratio * mean, mean, sd)
    # Shape 90000 adds terms of 1e6 that cancel: the tolerance is relative to those.
    scale = max(1.0, (mean / sd) ** 2)
    assert_close(actual, tensor(value), rtol=1e-12, atol=2e-15 * scale * 20)
    assert_close(torch.stack(grad(actual, inputs)), tensor(gradient), rtol=1e-10, atol=1e-14 * scale * 20)


def test_gamma_moments_and_reparametrised_draws():
    mean, sd = tensor(5.0).requires_grad_(), tensor(2.0).requires_grad_()
    d = GammaMeanSd(mean, sd)
    assert_close((d.mean, d.stddev), (mean, sd), **EXACT)
    draws = d.rsample((20000,))
    assert_close((draws.mean(), draws.std()), (tensor(5.0), tensor(2.0)), rtol=0.02, atol=0)
    # E[x] = mean, so the average path derivative with respect to the mean is 1.
    assert_close(grad(draws.mean(), mean)[0], tensor(1.0), rtol=0.02, atol=0)


DISTRIBUTIONS = {
    "von Mises": (VonMises, tensor([0.1, -0.2, 2.0]), tensor([0.0, 1.0, 50.0]), tensor([0.3, 1.0, 2.2])),
    "gamma": (GammaMeanSd, tensor([1.0, 2.0, 9.0]), tensor([1.0, 0.3, 20.0]), tensor([0.3, 1.0, 2.2])),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_expand_vmap_and_trace_agree_with_plain_calls(name):
    family, first, second, value = DISTRIBUTIONS[name]
    direct = family(first, second, validate_args=False).log_prob(value)

    expanded = family(first, second).expand((4, 3))
    assert isinstance(expanded, family) and expanded.batch_shape == (4, 3)
    assert_close(expanded.log_prob(value), direct.expand(4, 3), **EXACT)
    assert expanded.sample((2,)).shape == (2, 4, 3)
    assert family(first, second).to_event(1).expand((4,)).log_prob(value).shape == (4,)

    def log_prob(a, b, x):
        return family(a, b, validate_args=False).log_prob(x)

    assert_close(torch.func.vmap(log_prob)(first, second, value), direct, **EXACT)
    traced = make_fx(log_prob)(first, second, value)
    assert_close(traced(first + 0.1, second + 0.1, value), log_prob(first + 0.1, second + 0.1, value), **EXACT)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_arguments_outside_their_range_are_refused(name):
    family, first, _, _ = DISTRIBUTIONS[name]
    with pytest.raises(ValueError, match="constraint"):
        family(first, tensor(-1.0), validate_args=True)


def test_both_work_as_sites_of_a_pyro_program():
    def model(step, angle):
        mean = pyro.param("mean", tensor(1.0), constraint=dist.constraints.positive)
        k = pyro.param("k", tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("row", len(step)):
            pyro.sample("step", GammaMeanSd(mean, tensor(1.0)), obs=step)
            pyro.sample("angle", VonMises(tensor(0.0), k), obs=angle)

    step, angle = tensor([0.5, 2.0, 1.5]), tensor([0.1, -2.0, 0.7])
    loss = SVI(model, lambda *_: None, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO()).evaluate_loss(step, angle)
    expected = (
        GammaMeanSd(tensor(1.0), tensor(1.0)).log_prob(step).sum() + VonMises(0.0, tensor(1.0)).log_prob(angle).sum()
    )
    assert abs(loss + expected) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 5])
def test_stationary_distribution_is_kept_by_its_chain(size):
    transition = torch.rand(3, 2, size, size, dtype=torch.float64).softmax(-1).requires_grad_()
    start = stationary_distribution(transition)
    assert start.shape == (3, 2, size)
    assert_close((start.unsqueeze(-2) @ transition).squeeze(-2), start, **EXACT)
    assert_close(start.sum(-1), torch.ones(3, 2, dtype=torch.float64), **EXACT)
    assert_close(torch.linalg.matrix_power(transition, 200)[..., 0, :], start, **EXACT)


def test_stationary_distribution_derivatives_and_transforms():
    logits = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)

    def start(logits):
        return stationary_distribution(logits.softmax(-1))

    assert gradcheck(start, logits, rtol=1e-7, atol=1e-9)
    assert torch.autograd.gradgradcheck(start, logits, rtol=1e-6, atol=1e-8)
    assert_close(torch.func.vmap(start)(logits), start(logits), **EXACT)
    assert_close(make_fx(start)(logits)(logits + 1.0 * logits.sin()), start(logits + logits.sin()), **EXACT)


def test_a_state_never_visited_has_zero_probability_and_a_gradient():
    transition = tensor([[0.8, 0.2, 0.0], [0.4, 0.6, 0.0], [0.3, 0.3, 0.4]]).requires_grad_()
    start = stationary_distribution(transition)
    assert start.min() >= 0 and start[2] < 1e-15
    # Moving mass e from 1 -> 1 to 1 -> 3 makes state 3 visited: its share grows by (2/3) e / 0.6.
    slope = grad(start[2], transition)[0]
    assert_close(slope[0, 2] - slope[0, 0], tensor(2 / 3 / 0.6), **EXACT)


def test_stationary_distribution_names_what_is_wrong():
    with pytest.raises(ShapeError, match=r"seen shape \(2, 3\)"):
        stationary_distribution(torch.ones(2, 3))
    with pytest.raises(ValuesError, match="never meet"):
        stationary_distribution(torch.eye(2))
