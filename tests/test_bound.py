import re

import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.compiler.density import compile
from symhmm.infer import bound, svi
from symhmm.tables.results import Posterior
from symhmm.tables.reweighted import Reweighted

EFFECTS = cf.real([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]) / 10
ERRORS = cf.real([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]) / 10


def schools(y):
    """Rubin's eight schools: a spread near zero, and effects that depend on it as in a funnel."""
    mu = pyro.sample("mu", dist.Normal(cf.real(0.0), 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(cf.real(1.0)))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, ERRORS), obs=y)


def schools_posterior():
    """Means and standard deviations of mu, tau and the first effect, and the log-evidence, by quadrature over tau."""
    tau = (torch.arange(20_000, dtype=cf.REAL) + 0.5) * 3e-4
    variance = tau[:, None].square() + ERRORS.square()
    total, pull = 1 + (1 / variance).sum(1), (EFFECTS / variance).sum(1)
    mean = pull / total
    log_p = dist.Normal(0.0, variance.sqrt()).log_prob(EFFECTS).sum(1) - 0.5 * total.log() + 0.5 * pull.square() / total
    log_p = log_p + dist.HalfNormal(cf.real(1.0)).log_prob(tau)
    evidence = float(log_p.logsumexp(0) + torch.tensor(3e-4).log())
    w = log_p.softmax(0)
    share = tau.square() / (tau.square() + ERRORS[0].square())
    first = share * EFFECTS[0] + (1 - share) * mean
    within = share * ERRORS[0].square() + (1 - share).square() / total
    moments = [(mean, 1 / total), (tau, torch.zeros_like(tau)), (first, within)]
    means = [float(w @ m) for m, _ in moments]
    return means, [float((w @ (v + m.square())) - (w @ m).square()) ** 0.5 for m, v in moments], evidence


@pytest.fixture(scope="module")
def fitted():
    return symhmm.fit(schools, EFFECTS, method="svi", restarts=1)


def test_a_funnel_has_the_moments_of_its_posterior(fitted):
    means, sds, evidence = schools_posterior()
    assert fitted.status.ok
    assert isinstance(fitted.estimate.posterior, Reweighted)
    drawn = fitted.posterior_draws
    for name, mean, sd in zip(("mu", "tau", "theta"), means, sds, strict=True):
        x = drawn[name].reshape(len(drawn[name]), -1)[:, 0]
        assert float(x.mean()) == pytest.approx(mean, abs=0.12 * sd), name
        assert float(x.std()) == pytest.approx(sd, rel=0.1), name
    assert fitted.estimate.marginal[0] == pytest.approx(evidence, abs=0.03)
    assert fitted.objective < evidence + 3 * fitted.estimate.error


def test_weights_are_said_and_survive_saving(fitted, tmp_path):
    assert "draws of the guide weighted by the posterior: worth" in repr(fitted.status)
    assert "k-hat" in repr(fitted.summary())
    fitted.save(tmp_path)
    loaded = symhmm.load(tmp_path, schools, EFFECTS)
    assert torch.equal(loaded.estimate.posterior.sample(50), fitted.estimate.posterior.sample(50))


def test_a_guide_that_is_the_posterior_needs_no_weights():
    estimate = svi.run(compile(cf.with_prior, cf.sample(30)), evaluate=200, restarts=1)
    assert type(estimate.posterior) is Posterior
    assert "k-hat" not in repr(estimate.status)


def funnels(y):
    """Neal's funnel for each member."""
    with pyro.plate("group", 3):
        s = pyro.sample("s", dist.Normal(cf.real(0.0), 3.0))
        x = pyro.sample("x", dist.Normal(cf.real(0.0), s.exp()))
        pyro.sample("y", dist.Normal(x, 1000.0), obs=y)


def funnel(y):
    s = pyro.sample("s", dist.Normal(cf.real(0.0), 3.0))
    x = pyro.sample("x", dist.Normal(torch.zeros(9, dtype=cf.REAL), s.exp()).to_event(1))
    pyro.sample("y", dist.Normal(x.sum(), 1000.0), obs=y)


@pytest.mark.parametrize(("program", "where"), [(funnels, r"of member \d of group "), (funnel, "")])
def test_a_guide_that_is_much_too_narrow_is_said(program, where):
    y = torch.zeros(3 if where else (), dtype=cf.REAL)
    estimate = svi.run(compile(program, y), guide="meanfield", restarts=1)
    assert type(estimate.posterior) is Posterior
    assert re.search(rf"the guide {where}is not wide enough.*k-hat", repr(estimate.status))


def test_wider_draws_are_weighed_by_their_own_density():
    """Weights of a density that is known: their mean is one, and moments are those of the density."""
    goal = svi.target(compile(cf.with_prior, cf.sample(30)), {}, "svi")
    made = svi.assemble(goal, svi.Options(), torch.full_like(goal.start, 0.3), svi.Optima(), 0).guide
    e = torch.randn(20_000, made.noise_size, generator=cf.generator(1), dtype=cf.REAL)
    wide = bound._widened(made, e[:5000], cf.generator(2))
    assert bool(((wide != e[:5000]).sum(1) == 1).all())
    drawn = torch.cat([e[5000:], wide])
    w = (-bound._widening(made, drawn, 0.25)).exp()
    assert float(w.mean()) == pytest.approx(1.0, abs=0.02)
    assert float((w[:, None] * drawn.square()).mean()) == pytest.approx(1.0, abs=0.03)
    assert float(drawn.square().mean()) > 1.2
