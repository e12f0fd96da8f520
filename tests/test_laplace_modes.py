"""The search for modes ends, whatever the numbers, and a marginal goes to its limit as a spread goes to zero."""

import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints

import symhmm
from symhmm.compiler.density import compile
from symhmm.infer.laplace import laplace
from symhmm.infer.laplace_members import Members
from symhmm.infer.laplace_modes import NEWTON


def centred(y, prior=dist.Normal):
    """Each group's own mean around ``loc``; what lies between the groups is lost to rounding where ``tau`` is tiny."""
    loc = pyro.param("loc", cf.real(0.3))
    tau = pyro.param("tau", cf.real(1.0), constraint=constraints.positive)
    with pyro.plate("group", y.shape[0], dim=-1):
        d = pyro.sample("d", prior(1.7 * loc, tau))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(d, cf.real(2.0)), obs=y.T)


def heavy(loc, scale):
    return dist.StudentT(4.0, loc, scale)


def exact(y, values):
    m = y.shape[1]
    covariance = 4.0 * torch.eye(m, dtype=cf.REAL) + values[1] ** 2
    return MultivariateNormal((1.7 * values[0]).expand(m), covariance).log_prob(y).sum()


def at(loc, tau):
    return {"loc": cf.real(loc), "tau": cf.real(tau)}


@pytest.mark.parametrize("loc", [0.3, 3.0])
def test_the_marginal_goes_to_its_limit_at_zero(loc):
    y = cf.balanced()
    marginal = laplace(compile(centred, y))
    # Up and down: neither where the last search ended nor how far it was matters.
    for power in (0, -3, -7, -9, -11, -13, -16, -20, -40, -12, -8, -1, -15, 1):
        v = cf.real([loc, 10.0**power]).requires_grad_()
        wanted = exact(y, v)
        (slope,) = torch.autograd.grad(wanted, v)
        value, gradient = marginal.value_and_grad(marginal.pack(at(loc, 10.0**power)))
        assert value.item() == pytest.approx(wanted.item(), abs=2e-6), power
        assert gradient[0].item() == pytest.approx(slope[0].item(), rel=1e-6), power
        assert gradient[1].item() == pytest.approx((v[1] * slope[1]).item(), abs=1e-5), power


def test_every_search_is_bounded(monkeypatch):
    """From a spread of one to any other, also to those whose squares are no numbers: once without end."""
    marginal = laplace(compile(centred, cf.balanced()))
    calls, slope = [0], Members.slope

    def counted(self, theta, points):
        calls[0] += 1
        assert calls[0] < 20 * NEWTON, "the search does not end"
        return slope(self, theta, points)

    monkeypatch.setattr(Members, "slope", counted)
    for tau in (1e-50, 1e-100, 1e-160, 1e-200, 1e-300, 1e100, 1e160, 1e300):
        calls[0] = 0
        marginal.log_prob(at(0.3, 1.0))
        value = marginal.log_prob(at(0.3, tau))
        assert calls[0] < 100, tau
        assert bool(value.isfinite()) or tau < 1e-60 or tau > 1e60
    assert marginal.log_prob(at(0.3, 1e-160)).isnan()


def test_effects_that_cannot_be_resolved_have_no_value():
    """Tails heavier than normal, seen over a step that rounding makes long, are not taken for a normal curvature."""

    def program(y):
        centred(y, heavy)

    marginal = laplace(compile(program, cf.balanced()))
    limit = exact(cf.balanced(), cf.real([0.3, 0.0]))
    gap = [float(marginal.log_prob(at(0.3, tau)) - limit) for tau in (1e-4, 1e-6)]
    # Laplace's approximation of a Student t is off by a constant for each group, at any spread.
    each = float(dist.StudentT(4.0, 0.0, 1.0).log_prob(torch.tensor(0.0, dtype=cf.REAL)))
    wanted = 12 * (each + 0.5 * torch.log(torch.tensor(2 * torch.pi / 1.25, dtype=cf.REAL)).item())
    assert gap == pytest.approx([wanted] * 2, abs=1e-3)
    assert marginal.log_prob(at(0.3, 1e-12)).isnan()


def test_a_fit_that_ends_at_zero_has_the_errors_of_the_model_without_the_effect():
    y = cf.balanced()
    y = y - y.mean(1, keepdim=True) + 5.0
    fit = symhmm.fit(centred, y, method="laplace", restarts=1)
    assert fit.status.ok
    assert "at the edge" in repr(fit.status)
    assert fit.objective == pytest.approx(float(exact(y, cf.real([5.0 / 1.7, 0.0]))), abs=1e-5)
    rows = {
        r[0]: r[1:5]
        for r in zip(*(fit.fixed_effects()[c] for c in ("name", "estimate", "se", "2.5%", "97.5%")), strict=True)
    }
    assert rows["loc"][:2] == pytest.approx((5.0 / 1.7, 2.0 / y.numel() ** 0.5 / 1.7), rel=1e-4)
    assert rows["tau"][2] == 0.0
    assert torch.tensor([rows["tau"][1], rows["tau"][3]]).isnan().all()
    assert fit.variance_components()["remark"] == ("at zero",)


def lines(y, x, slopes):
    """Own intercepts, and own slopes where ``slopes``; shape of y and x (groups, repeats)."""
    beta = pyro.param("beta", cf.real([0.0, 0.0]))
    tau = pyro.param("tau", cf.real(1.0), constraint=constraints.positive)
    sd = pyro.param("sd", cf.real(1.0), constraint=constraints.positive)
    spread = pyro.param("spread", cf.real(0.5), constraint=constraints.positive) if slopes else None
    with pyro.plate("group", len(y), dim=-1):
        a = pyro.sample("a", dist.Normal(beta[0], tau))
        b = pyro.sample("b", dist.Normal(beta[1], spread)) if slopes else beta[1]
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(a + b * x.T, sd), obs=y.T)


def test_errors_beside_a_spread_at_zero_are_those_of_the_model_without_it():
    noise = torch.randn(10, 7, generator=cf.generator(2), dtype=cf.REAL)
    x = torch.linspace(-1.0, 1.0, 6, dtype=cf.REAL).expand(10, 6)
    y = 2.0 + noise[:, :1] + noise[:, 1:]
    # Every group has a slope of exactly one half, so that slopes differ less than noise alone would make them.
    y = y + (0.5 - (y * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)) * x
    with_slopes, without = (symhmm.fit(lines, y, x, s, method="laplace", restarts=1) for s in (True, False))
    assert with_slopes.status.ok
    assert with_slopes.objective == pytest.approx(without.objective, abs=1e-5)
    assert with_slopes.standard_errors["spread"].isnan()
    for name in ("beta", "tau", "sd"):
        torch.testing.assert_close(with_slopes.values[name], without.values[name], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(with_slopes.standard_errors[name], without.standard_errors[name], rtol=2e-3, atol=0)
    rows = with_slopes.fixed_effects()
    k = rows["name"].index("spread")
    assert rows["2.5%"][k] == 0.0
    assert "spread = " in repr(with_slopes.status)
    # What is held out is not lost: its profile still bounds it from above.
    found = with_slopes.profile("spread")
    assert found.low == 0.0
    assert 0.1 < found.high < 2.0
    assert found.zero == pytest.approx(0.5, abs=0.01)
