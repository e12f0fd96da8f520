"""Every family of numbers against scipy or mpmath: value, gradient, sum or integral, distribution function, moments and draws."""

import itertools
import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, stats
from torch.autograd import grad, gradcheck
from torch.distributions import constraints
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import symhmm
from symhmm.distributions import (
    Beta,
    BetaMeanPrecision,
    GammaMeanSd,
    Hurdle,
    NegativeBinomialMean,
    TruncatedNormal,
    VonMises,
    WrappedCauchy,
    ZeroInflated,
    ZeroOneInflated,
)
from symhmm.distributions.special import betainc
from symhmm.errors import ShapeError, ValuesError

EXACT = {"rtol": 1e-11, "atol": 1e-12}


def tensor(value):
    return torch.tensor(value, dtype=torch.float64)


# Name: how to make it from parameters, the parameters (three sets each), values of the support, atoms, ends of the rest.
CONTINUOUS = {
    "von Mises": (VonMises, [[0.1, -2.0, 3.0], [0.0, 1.5, 90.0]], [-3.0, 0.4, 2.9], [], (-math.pi, math.pi)),
    "wrapped Cauchy": (WrappedCauchy, [[0.1, -2.0, 3.0], [0.0, 0.5, 0.97]], [-3.0, 0.4, 2.9], [], (-math.pi, math.pi)),
    "gamma": (GammaMeanSd, [[1.0, 2.0, 9.0], [0.5, 2.0, 2.0]], [0.1, 2.0, 9.0], [], (0, math.inf)),
    "beta": (Beta, [[1.5, 2.0, 30.0], [1.2, 5.0, 2.0]], [0.1, 0.4, 0.95], [], (0, 1)),
    "beta by mean": (BetaMeanPrecision, [[0.3, 0.5, 0.9], [4.0, 2.5, 70.0]], [0.1, 0.4, 0.95], [], (0, 1)),
    "cut normal": (
        lambda m, s: TruncatedNormal(m, s, -1.0, 2.0),
        [[0.0, -7.0, 30.0], [1.0, 1.5, 2.0]],
        [-0.9, 0.2, 1.99],
        [],
        (-1, 2),
    ),
    "cut below": (
        lambda m, s: TruncatedNormal(m, s, low=0.0),
        [[0.0, -7.0, 3.0], [1.0, 1.5, 2.0]],
        [0.01, 0.2, 5.0],
        [],
        (0, math.inf),
    ),
    "cut above": (
        lambda m, s: TruncatedNormal(m, s, high=0.0),
        [[0.0, 7.0, -3.0], [1.0, 1.5, 2.0]],
        [-0.01, -0.2, -5.0],
        [],
        (-math.inf, 0),
    ),
    "inflated gamma": (
        lambda m, s, p: ZeroInflated(GammaMeanSd(m, s), p),
        [[1.0, 2.0, 9.0], [0.5, 2.0, 2.0], [0.1, 0.5, 0.01]],
        [0.0, 2.0, 9.0],
        [0.0],
        (0, math.inf),
    ),
    "hurdle Weibull": (
        lambda a, b, p: Hurdle(dist.Weibull(a, b), p),
        [[1.0, 2.0, 9.0], [1.5, 2.0, 2.0], [0.1, 0.5, 0.01]],
        [0.0, 2.0, 9.0],
        [0.0],
        (0, math.inf),
    ),
    "inflated log-normal": (
        lambda a, b, p: ZeroInflated(dist.LogNormal(a, b), p),
        [[0.0, -1.0, 1.0], [0.5, 1.0, 0.3], [0.1, 0.5, 0.01]],
        [0.0, 2.0, 3.0],
        [0.0],
        (0, math.inf),
    ),
    "inflated beta": (
        lambda a, b, p: ZeroInflated(Beta(a, b), p),
        [[1.5, 2.0, 30.0], [1.2, 5.0, 2.0], [0.1, 0.5, 0.01]],
        [0.0, 0.2, 0.9],
        [0.0],
        (0, 1),
    ),
    "zero-one beta": (
        lambda m, q, e, p: ZeroOneInflated(BetaMeanPrecision(m, q), e, p),
        [[0.3, 0.5, 0.9], [4.0, 2.5, 70.0], [0.1, 0.5, 0.2], [0.2, 0.5, 0.9]],
        [0.0, 0.4, 1.0],
        [0.0, 1.0],
        (0, 1),
    ),
}
COUNTS = {
    "negative binomial": (NegativeBinomialMean, [[4.0, 0.3, 20.0], [0.7, 1e-4, 3.0]], [0.0, 2.0, 31.0]),
    "inflated Poisson": (
        lambda r, p: ZeroInflated(dist.Poisson(r), p),
        [[4.0, 0.3, 20.0], [0.7, 1e-4, 0.3]],
        [0.0, 2.0, 31.0],
    ),
    "hurdle Poisson": (
        lambda r, p: Hurdle(dist.Poisson(r), p),
        [[4.0, 1e-3, 20.0], [0.7, 1e-4, 0.3]],
        [0.0, 2.0, 31.0],
    ),
    "hurdle negative binomial": (
        lambda m, d, p: Hurdle(NegativeBinomialMean(m, d), p),
        [[4.0, 0.3, 20.0], [0.7, 1e-4, 3.0], [0.1, 0.5, 0.01]],
        [0.0, 2.0, 31.0],
    ),
}
FAMILIES = {**{n: c[:3] for n, c in CONTINUOUS.items()}, **COUNTS}


def made(name):
    make, parameters, values = FAMILIES[name]
    return make, [tensor(p) for p in parameters], tensor(values)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_mass_is_one_and_cdf_mean_and_variance_are_integrals(name):
    make, parameters, values, atoms, (low, high) = CONTINUOUS[name]
    circle = (low, high) == (-math.pi, math.pi)
    for i in range(3):
        d = make(*(tensor(p[i]) for p in parameters))

        def density(x, d=d):
            return d.log_prob(tensor(float(x))).exp().item()

        def over(f, end, d=d, density=density):
            points = sorted({low, end, *(x for x in atoms if x <= end)})
            inner = np.linspace(-0.5, 0.5, 9) * 8 * float(d.variance) ** 0.5 + float(d.mean)
            edges = [points[0], *(x for x in inner if points[0] < x < points[-1]), points[-1]]
            parts = [
                integrate.quad(lambda x: f(x) * density(x), a, b, epsabs=1e-12, epsrel=1e-12, limit=400)[0]
                for a, b in itertools.pairwise(edges)
            ]
            return sum(parts) + sum(f(x) * density(x) for x in atoms if x <= end)

        assert over(lambda x: 1.0, high) == pytest.approx(1, abs=1e-9)
        centre = float(d.mean)
        mean = over((lambda x, c=centre: math.cos(x - c)) if circle else (lambda x: x), high)
        assert mean == pytest.approx(1 - d.variance.item() if circle else d.mean.item(), rel=1e-8, abs=1e-10)
        if not circle:
            square = over(lambda x, m=mean: (x - m) ** 2, high)
            assert square == pytest.approx(d.variance.item(), rel=1e-7, abs=1e-10)
        for x in values:
            assert d.cdf(tensor(x)).item() == pytest.approx(over(lambda x: 1.0, x), abs=1e-9)
        for x in atoms:
            step = d.cdf(tensor(x)) - d.cdf_below(tensor(x))
            assert step.item() == pytest.approx(density(x), abs=1e-12)


@pytest.mark.parametrize("name", COUNTS)
def test_probabilities_sum_to_one_and_cdf_mean_and_variance_are_sums(name):
    make, parameters, _ = made(name)
    d = make(*parameters)
    y = torch.arange(3000.0, dtype=torch.float64)[:, None]
    p = d.log_prob(y).exp()
    assert_close(p.sum(0), torch.ones(3).double(), rtol=0, atol=1e-10)
    assert_close((y * p).sum(0), d.mean, rtol=1e-9, atol=0)
    assert_close((y * y * p).sum(0) - d.mean**2, d.variance, rtol=1e-8, atol=0)
    # torch's incomplete gamma function, which makes Poisson's, is good to 3e-10.
    assert_close(d.cdf(y[:60]), p.cumsum(0)[:60], rtol=0, atol=1e-9)
    assert_close(d.cdf(y[:60] - 1), p.cumsum(0)[:60] - p[:60], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_are_those_of_differences(name):
    make, parameters, values = made(name)
    # Differences step over the edge of a range: concentration 0 is von Mises' own test.
    inner = [torch.where(p == 0, p + 0.1, p).requires_grad_() for p in parameters]
    assert gradcheck(lambda *p: make(*p).log_prob(values), inner, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_its_moments_and_shape(name):
    make, parameters, _ = made(name)
    d = make(*parameters)
    draws = d.sample((20000,))
    assert draws.shape == (20000, 3) and d.support.check(draws).all()
    if name in ("von Mises", "wrapped Cauchy"):
        assert_close(torch.cos(draws - d.mean).mean(0), 1 - d.variance, rtol=0, atol=0.02)
        assert_close(torch.sin(draws - d.mean).mean(0), torch.zeros(3).double(), rtol=0, atol=0.02)
        return
    error = (d.variance / 20000).sqrt()
    assert ((draws.mean(0) - d.mean).abs() < 5 * error).all()
    fourth = ((draws - d.mean) ** 4).mean(0)
    assert ((draws.var(0) - d.variance).abs() < 5 * (fourth / 20000).sqrt() + 1e-12).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_expand_vmap_and_trace_agree_with_plain_calls(name):
    make, parameters, values = made(name)
    direct = make(*parameters).log_prob(values)
    d = make(*parameters).expand((4, 3))
    assert d.batch_shape == (4, 3) and type(d) is type(make(*parameters))
    assert_close(d.log_prob(values), direct.expand(4, 3), **EXACT)
    assert d.sample((2,)).shape == (2, 4, 3) and d.mean.shape == (4, 3)
    assert make(*parameters).to_event(1).expand((4,)).log_prob(values).shape == (4,)

    def log_prob(x, *p):
        with pyro.validation_enabled(False):
            return make(*p).log_prob(x)

    assert_close(torch.func.vmap(log_prob)(values, *parameters), direct, **EXACT)
    traced = make_fx(log_prob)(values, *parameters)
    moved = [p * 0.9 for p in parameters]
    assert_close(traced(values.flip(0), *moved), log_prob(values.flip(0), *moved), **EXACT)


@pytest.mark.parametrize("name", FAMILIES)
def test_as_the_emission_of_a_chain_with_missing_values(name):
    """Compiled: vectorised over time, masked, and equal to the sum over both paths of states by hand."""
    make, parameters, values = made(name)
    y = values.repeat(2)
    seen = tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0]) > 0
    y = torch.where(seen, y, torch.nan)
    start = [p[1:] for p in parameters]

    def constraint(p):
        shares = constraints.unit_interval if (p < 1).all() else constraints.positive
        return shares if (p > 0).all() else constraints.real

    def model(y, seen):
        own = [pyro.param(f"p{i}", p, constraint(p)) for i, p in enumerate(start)]
        z = 0
        stay = tensor([[0.8, 0.2], [0.3, 0.7]])
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(stay[z]))
            with pyro.poutine.mask(mask=seen[t]):
                pyro.sample(f"y_{t}", make(*(p[z] for p in own)), obs=y[t])

    density = symhmm.compile(model, y, seen)
    assert density.compiled.mode == "captured"
    free = [p.clone().requires_grad_() for p in start]
    emission = torch.where(
        seen[:, None], make(*free).log_prob(torch.where(seen, y, values[1])[:, None]), tensor(0.0)
    ).exp()
    stay, alpha = tensor([[0.8, 0.2], [0.3, 0.7]]), tensor([1.0, 0.0])
    for e in emission:
        alpha = (alpha @ stay) * e
    wanted = alpha.sum().log()
    at = {f"p{i}": p.clone().requires_grad_() for i, p in enumerate(start)}
    found = density.log_prob(at)
    assert_close(found, wanted, **EXACT)
    assert_close(grad(found, list(at.values())), grad(wanted, free), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dispersion", [1e-12, 1e-6, 0.0199, 0.0201, 0.7, 30.0])
@pytest.mark.parametrize(("y", "mean"), [(0, 0.01), (3, 2.5), (1000, 900.0)])
def test_negative_binomial_to_forty_digits(y, mean, dispersion):
    def exact(m, d):
        m, r = mpmath.mpf(m), 1 / mpmath.mpf(d)
        value = mpmath.loggamma(y + r) - mpmath.loggamma(r) - mpmath.loggamma(y + 1)
        return value + y * mpmath.log(m / (m + r)) + r * mpmath.log(r / (m + r))

    m, d = tensor(mean).requires_grad_(), tensor(dispersion).requires_grad_()
    actual = NegativeBinomialMean(m, d).log_prob(tensor(float(y)))
    with mpmath.workdps(80):
        wanted = float(exact(mean, dispersion))
        slopes = [
            float(mpmath.diff(lambda x: exact(x, dispersion), mean, h=mpmath.mpf(10) ** -20)),
            float(mpmath.diff(lambda x: exact(mean, x), dispersion, h=mpmath.mpf(10) ** -30)),
        ]
    # lgamma(1000) is good to 1e-12.
    assert_close(actual, tensor(wanted), rtol=1e-11, atol=1e-11)
    # The slope in a dispersion d loses eps / d; in log d, in which one fits, it loses nothing.
    assert_close(
        torch.stack(grad(actual, [m, d])), tensor(slopes), rtol=1e-8, atol=(1e-8 + 1e-15 / dispersion) * (1 + y)
    )


def test_negative_binomial_is_that_of_scipy():
    y = torch.arange(30.0).double()
    d = NegativeBinomialMean(tensor(3.0), tensor(0.4))
    assert_close(d.log_prob(y), tensor(stats.nbinom(2.5, 2.5 / 5.5).logpmf(y.numpy())), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("a", [0.05, 1.0, 7.3, 800.0, 9000.0])
@pytest.mark.parametrize("b", [0.05, 1.0, 7.3, 800.0, 9000.0])
def test_incomplete_beta_is_that_of_scipy(a, b):
    from scipy import special

    mean, sd = a / (a + b), math.sqrt(a * b / (a + b) ** 2 / (a + b + 1))
    x = tensor([0.0, 1e-9, *np.clip(mean + sd * np.array([-6, -2, -0.5, 0, 0.3, 2, 6]), 0, 1).tolist(), 1 - 1e-9, 1.0])
    assert_close(betainc(tensor(a), tensor(b), x), tensor(special.betainc(a, b, x.numpy())), rtol=1e-9, atol=1e-11)


def test_incomplete_beta_gradients():
    a, b, x = tensor([0.5, 3.0]).requires_grad_(), tensor([2.0, 4.0]).requires_grad_(), tensor([0.2, 0.7])
    assert gradcheck(betainc, [a, b, x.requires_grad_()], atol=1e-6)
    edge = grad(betainc(a, b, tensor([0.0, 1.0])).sum(), [a, b])
    assert all((g == 0).all() for g in edge)


@pytest.mark.parametrize("k", [0.0, 1e-6, 0.7, 19.0, 21.0, 400.0, 1e7])
def test_von_mises_distribution_function(k):
    loc = 0.5
    spread = min(1.0, 1 / math.sqrt(max(k, 1e-3)))
    for value in (loc - 2 * spread, loc + 0.3 * spread, loc + 3 * spread, math.pi, -math.pi):
        if not -math.pi <= value <= math.pi:
            continue
        with mpmath.workdps(30):
            points = [
                -mpmath.pi,
                *(x for x in (loc - 8 * spread, loc, loc + 8 * spread) if -math.pi < x < value),
                value,
            ]
            total = mpmath.quad(lambda x: mpmath.exp(k * (mpmath.cos(x - loc) - 1)), points)
            wanted = float(total / (2 * mpmath.pi * mpmath.besseli(0, k) * mpmath.exp(-k)))
        found = VonMises(tensor(loc), tensor(k)).cdf(tensor(value))
        assert found.item() == pytest.approx(wanted, abs=2e-13)
    theta, c = tensor(1.1).requires_grad_(), tensor(max(k, 1e-3)).requires_grad_()
    slope = grad(VonMises(tensor(loc), c).cdf(theta), theta)[0]
    assert_close(slope, VonMises(tensor(loc), c).log_prob(theta).exp(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rho", [0.0, 0.4, 0.999999])
def test_wrapped_cauchy_is_that_of_scipy_and_precise_near_its_limit(rho):
    x = tensor([-3.0, 1e-7, 2.0])

    def exact(x):
        with mpmath.workdps(40):
            r = mpmath.mpf(rho)
            return float(mpmath.log((1 - r**2) / (2 * mpmath.pi * (1 + r**2 - 2 * r * mpmath.cos(mpmath.mpf(x))))))

    assert_close(WrappedCauchy(0.0, tensor(rho)).log_prob(x), tensor([exact(v) for v in x.tolist()]), **EXACT)
    if 0 < rho < 0.9:
        wanted = stats.wrapcauchy(rho).logpdf(x.numpy() % (2 * math.pi))
        assert_close(WrappedCauchy(0.0, tensor(rho)).log_prob(x), tensor(wanted), **EXACT)


@pytest.mark.parametrize(
    ("loc", "low", "high"), [(0, -1, 2), (60, -1, 2), (-60, -1, 2), (0, 30, math.inf), (0, -math.inf, -30)]
)
def test_cut_normal_is_that_of_scipy_far_in_the_tails(loc, low, high):
    x = {True: low + 0.01, False: high - 0.01}[math.isfinite(low)]
    with mpmath.workdps(60):
        mass = (
            mpmath.ncdf(high - loc) - mpmath.ncdf(low - loc)
            if loc >= 0 and low < 0
            else mpmath.ncdf(loc - low) - mpmath.ncdf(loc - high)
        )
        wanted = float(mpmath.log(mpmath.npdf(x - loc) / mass))
    d = TruncatedNormal(tensor(float(loc)), tensor(1.0), float(low), float(high))
    assert d.log_prob(tensor(x)).item() == pytest.approx(wanted, rel=1e-10)
    d = TruncatedNormal(tensor(float(loc)), tensor(1.0), float(low), float(high), validate_args=False)
    assert d.log_prob(tensor(5.0 if high == 2 else 0.0)) == -math.inf


def test_probabilities_of_zero_and_one_at_their_own_ends_have_gradients():
    for p in (0.0, 1.0):
        zero = tensor(p).requires_grad_()
        value = tensor(0.0 if p else 2.0)
        for family in (ZeroInflated, Hurdle):
            for base in (GammaMeanSd(tensor(1.0), tensor(1.0)), dist.Poisson(tensor(1.0))):
                log_prob = family(base, zero).log_prob(value)
                assert log_prob.isfinite() and grad(log_prob, zero)[0].isfinite()


def test_zero_inflation_is_pyros_for_counts():
    y = torch.arange(9.0).double()
    ours = ZeroInflated(dist.Poisson(tensor(2.0)), tensor(0.3)).log_prob(y)
    assert_close(ours, dist.ZeroInflatedPoisson(rate=tensor(2.0), gate=tensor(0.3)).log_prob(y), **EXACT)


def test_wrappers_broadcast_with_their_base():
    d = Hurdle(GammaMeanSd(torch.ones(3, 1).double(), 1.0), tensor([0.1, 0.2]))
    assert d.batch_shape == d.base_dist.batch_shape == (3, 2) and d.log_prob(tensor(0.0)).shape == (3, 2)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ShapeError, match=r"event shape \(3,\)"):
        ZeroInflated(dist.Normal(torch.zeros(3), 1.0).to_event(1), 0.1)
    with pytest.raises(ValuesError, match="smaller one first"):
        TruncatedNormal(0.0, 1.0, 2.0, 2.0)
    for make in (
        lambda: WrappedCauchy(0.0, tensor(1.0), validate_args=True),
        lambda: NegativeBinomialMean(tensor(1.0), tensor(0.0), validate_args=True),
        lambda: BetaMeanPrecision(tensor(1.5), tensor(2.0), validate_args=True),
        lambda: ZeroInflated(dist.Poisson(tensor(1.0)), tensor(1.5), validate_args=True),
    ):
        with pytest.raises(ValueError, match="constraint"):
            make()
