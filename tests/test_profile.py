"""Profile likelihood against likelihood ratios in closed form."""

from math import erfc, exp, inf, log, sqrt

import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_em import lumps, touching
from scipy.optimize import brentq
from torch.distributions import constraints

from symhmm.errors import FitError
from symhmm.fitting import fit

HALF = 3.841458820694124 / 2  # nats at 95 percent


def ends(fall, best, low, high):
    """Where a fall in nats, zero at ``best``, crosses the quantile on both sides."""
    return brentq(lambda v: fall(v) - HALF, low, best), brentq(lambda v: fall(v) - HALF, best, high)


def test_normal_mean_and_standard_deviation():
    y = cf.sample(25)
    found = fit(cf.gaussian, y, method="mle", tolerance=1e-9)
    n, mean, sd = len(y), y.mean().item(), y.std(correction=0).item()
    loc = found.profile("loc")
    # n/2 log(1 + (mu - mean)^2 / sd^2)
    reach = sd * sqrt(exp(2 * HALF / n) - 1)
    assert (loc.low, loc.high) == pytest.approx((mean - reach, mean + reach), abs=1e-3)
    assert loc.zero is None
    scale = found.profile("sd")
    wanted = ends(lambda s: n * log(s / sd) + n / 2 * ((sd / s) ** 2 - 1), sd, 0.3 * sd, 4 * sd)
    assert (scale.low, scale.high) == pytest.approx(wanted, abs=1e-3)
    assert scale.zero is None
    # The curve is the closed form, too.
    for value, fall in scale.curve.rows:
        assert fall == pytest.approx(n * log(value / sd) + n / 2 * ((sd / value) ** 2 - 1), abs=1e-5)
    assert "95% interval" in repr(scale)


def test_level():
    y = cf.sample(25)
    found = fit(cf.gaussian, y, method="mle", fix={"sd": cf.real(3.0)})
    loc = found.profile("loc", level=0.8)
    assert loc.high - loc.low == pytest.approx(2 * 1.2815515655446004 * 3 / 5, rel=1e-4)


@pytest.mark.parametrize("unit", [1e-3, 1e5])
def test_units_of_the_data_do_not_matter(unit):
    y = cf.sample(25)
    start = {"loc": y.mean() * unit, "sd": y.std() * unit}
    one, other = (
        fit(cf.gaussian, y * u, method="em", start={n: v * u / unit for n, v in start.items()}, restarts=1)
        for u in (1.0, unit)
    )
    for name in ("loc", "sd"):
        a, b = one.profile(name), other.profile(name)
        assert (b.low, b.high) == pytest.approx((a.low * unit, a.high * unit), rel=1e-4)


def test_probability_and_element_of_a_simplex_are_binomial():
    def model(y):
        p = pyro.param("p", lambda: cf.real([0.2, 0.3, 0.1, 0.4]), constraint=constraints.simplex)
        q = pyro.param("q", lambda: cf.real(0.5), constraint=constraints.unit_interval)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)
            pyro.sample("x", dist.Bernoulli(q), obs=(y == 2).double())

    y = torch.tensor([0] * 9 + [1] * 5 + [2] * 4 + [3] * 12)
    found = fit(model, y, method="em")

    def fall(count, p):
        best = count / 30
        return count * log(best / p) + (30 - count) * log((1 - best) / (1 - p))

    for k, count in enumerate([9, 5, 4, 12]):
        one = found.profile(f"p[{k}]")
        wanted = ends(lambda p, c=count: fall(c, p), count / 30, 1e-6, 1 - 1e-6)
        assert (one.low, one.high) == pytest.approx(wanted, abs=1e-4)
    q = found.profile("q")
    assert (q.low, q.high) == pytest.approx(ends(lambda p: fall(4, p), 4 / 30, 1e-6, 1 - 1e-6), abs=1e-4)


def test_probability_at_the_edge_of_its_support():
    def model(y):
        q = pyro.param("q", lambda: cf.real(0.5), constraint=constraints.unit_interval)
        with pyro.plate("n", len(y)):
            pyro.sample("x", dist.Bernoulli(q), obs=y)

    one = fit(model, torch.zeros(12, dtype=cf.REAL), method="em").profile("q")
    assert one.low == 0.0
    assert one.high == pytest.approx(1 - exp(-HALF / 12), abs=1e-4)


def test_others_follow():
    # The line's slope when its intercept follows: the normal theory of least squares with known noise.
    def model(y):
        x = torch.linspace(1.0, 3.0, len(y), dtype=cf.REAL)
        b = pyro.param("b", lambda: cf.real([0.0, 0.0]))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(b[0] + b[1] * x, 1.0), obs=y)

    y = torch.linspace(0.0, 5.0, 20, dtype=cf.REAL)
    found = fit(model, y, method="mle", tolerance=1e-10).profile("b[1]")
    x = torch.linspace(1.0, 3.0, 20, dtype=cf.REAL)
    se = 1 / (x - x.mean()).square().sum().sqrt().item()
    assert found.high - found.low == pytest.approx(2 * sqrt(2 * HALF) * se, rel=1e-4)


def spread_fall(y, tau, best):
    """Nats that the marginal likelihood of a balanced random intercept falls when its spread is ``tau``."""
    n, m = y.shape
    means = y.mean(1)
    total = (means - means.mean()).square().sum().item()

    def value(t):
        v = t**2 + 4.0 / m
        return -n / 2 * log(v) - total / (2 * v)

    return value(best) - value(tau)


def test_spread_of_random_effects_that_is_not_zero():
    y = cf.balanced()
    found = fit(cf.random_intercept, y, method="laplace").profile("tau")
    _, best = cf.random_intercept_maximum(y)
    wanted = ends(lambda t: spread_fall(y, t, best), best, 1e-3, 10.0)
    assert (found.low, found.high) == pytest.approx(wanted, abs=2e-3)
    assert found.zero is None


@pytest.mark.parametrize("shrink", [0.0, 0.38])
def test_spread_of_random_effects_that_may_be_zero(shrink):
    y = cf.balanced()
    y = y - (1 - shrink) * (y.mean(1, keepdim=True) - y.mean())
    found = fit(cf.random_intercept, y, method="laplace").profile("tau")
    _, best = cf.random_intercept_maximum(y)
    assert found.low == 0.0
    wanted = brentq(lambda t: spread_fall(y, t, best) - HALF, max(best, 1e-6), 10.0)
    assert found.high == pytest.approx(wanted, abs=2e-3)
    # Half of chi-squared with one degree of freedom lies at zero.
    fall = spread_fall(y, 0.0, best)
    assert found.zero == pytest.approx(0.5 * erfc(sqrt(fall)), abs=2e-3)
    assert "zero has p = " in repr(found)


def test_value_that_the_data_do_not_know():
    def model(y):
        a = pyro.param("a", lambda: cf.real(0.5))
        b = pyro.param("b", lambda: cf.real(1.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(a + 0.0 * b, 1.0), obs=y)

    found = fit(model, cf.sample(), method="mle").profile("b")
    assert (found.low, found.high) == (-inf, inf)


def test_mixture_agrees_with_refits():
    y = touching()
    found = fit(lumps, y, method="em", tolerance=1e-9)
    one = found.profile("loc[0]")
    assert one.low < found.values["loc"][0] < one.high
    for end in (one.low, one.high):
        held = found.values["loc"].clone()
        held[0] = end

        def other(y, end=end):
            weights = pyro.param("weights", lambda: found.values["weights"], constraint=constraints.simplex)
            loc = pyro.param("loc", lambda: found.values["loc"][1])
            scale = pyro.param("scale", lambda: found.values["scale"], constraint=constraints.positive)
            with pyro.plate("n", len(y)):
                z = pyro.sample("z", dist.Categorical(weights))
                pyro.sample("y", dist.Normal(torch.stack([cf.real(end), loc])[z], scale[z]), obs=y)

        refit = fit(other, y, method="mle", restarts=1, tolerance=1e-9)
        assert found.objective - refit.objective == pytest.approx(HALF, abs=2e-3)


def test_tied_values_move_together():
    y = touching()
    found = fit(lumps, y, method="mle", tie=[("scale[0]", "scale[1]")], tolerance=1e-9)
    first, second = found.profile("scale[0]"), found.profile("scale[1]")
    assert (first.low, first.high) == pytest.approx((second.low, second.high), rel=1e-6)


def test_a_fit_below_its_maximum_is_told():
    y = touching()
    poor = fit(lumps, y, method="mle", restarts=1, max_evaluations=5)
    assert not poor.status.ok
    assert "not at its maximum" in poor.profile("loc[0]").remark


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("loc", r"2 values(.|\n)*profile\('loc\[0\]'\)"),
        ("loc[2]", "no such part"),
        ("lock[0]", "names 'lock'"),
        ("scale[0]", "names 'scale', which is not fitted"),
    ],
)
def test_what_has_no_profile(name, text):
    found = fit(lumps, touching(), method="em", fix={"scale": cf.real([1.0, 1.0])}, restarts=1)
    with pytest.raises(FitError, match=text):
        found.profile(name)


def test_ordered_values_and_odd_levels_are_refused():
    found = fit(lumps, touching(), method="mle", order="loc", restarts=1)
    with pytest.raises(FitError, match=r"ordered(.|\n)*without order="):
        found.profile("loc[1]")
    with pytest.raises(FitError, match="level=95"):
        found.profile("scale[0]", level=95)
