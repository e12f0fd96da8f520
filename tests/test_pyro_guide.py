import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch.distributions import constraints

import symhmm
from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.fitting import fit
from symhmm.infer import svi
from symhmm.infer.objective import objective

REAL = cf.REAL


def by_hand(y):
    loc = pyro.param("q_loc", lambda: torch.zeros(len(y), dtype=REAL))
    scale = pyro.param("q_scale", lambda: torch.full((len(y),), 0.5, dtype=REAL), constraint=constraints.positive)
    with pyro.plate("group", len(y), dim=-1):
        pyro.sample("d", dist.Normal(loc, scale))


def test_a_guide_by_hand_finds_the_posterior():
    y = cf.balanced()
    pyro.get_param_store().clear()
    f = fit(cf.random_intercept, y, method="svi", guide=by_hand, steps=900, cooldown=400, evaluate=200)
    loc, tau = f.values["loc"].item(), f.values["tau"].item()
    mean, sd = cf.random_intercept_posterior(y, loc, tau)
    assert tau == pytest.approx(cf.random_intercept_maximum(y)[1], rel=0.05)
    table = f.random_effects("group")
    assert table["estimate"] == pytest.approx(mean.tolist(), abs=0.15)
    assert table["sd"] == pytest.approx([sd] * len(y), rel=0.15)
    exact = cf.random_intercept_marginal(y, loc, tau)
    assert exact - 0.1 < f.objective <= exact + 3 * f.estimate.error
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    "asked",
    [
        AutoMultivariateNormal,
        pytest.param(AutoNormal, marks=pytest.mark.slow),
        AutoLowRankMultivariateNormal,
    ],
)
def test_autoguides_find_the_evidence_of_a_normal_posterior(asked):
    y = cf.sample(30)
    _, covariance, evidence = cf.with_prior_posterior(y)
    estimate = svi.run(compile(cf.with_prior, y), guide=asked, steps=900, cooldown=300, evaluate=200)
    if asked is AutoNormal:
        assert estimate.objective < evidence - 0.1
        return
    assert estimate.objective == pytest.approx(evidence, abs=0.05)
    assert estimate.posterior.sd.tolist() == pytest.approx(covariance.diagonal().sqrt().tolist(), rel=0.15)


def test_a_made_autoguide_and_its_class_are_the_same():
    y = cf.sample(10)
    made = AutoMultivariateNormal(symhmm.marginalize(cf.with_prior))
    one, two = (
        svi.run(compile(cf.with_prior, y), guide=g, steps=60, cooldown=20, evaluate=5)
        for g in (made, AutoMultivariateNormal)
    )
    assert one.objective == pytest.approx(two.objective, abs=2.0)


def test_gradient_is_that_of_the_value():
    goal = svi.target(compile(cf.random_intercept, cf.balanced(3, 4)), {}, "svi")
    state = svi.init(goal, svi.Options(guide=by_hand, restarts=1))
    assert state.guide.noise_size == 3
    bound = objective(state.goal, state.guide, 2, weighted=False, batches=None)
    noise = torch.randn(2, 3, generator=cf.generator(1), dtype=REAL)
    phi = state.phi + 0.1
    _, gradient = bound(phi, noise)
    for i in range(len(phi)):
        e = torch.zeros_like(phi)
        e[i] = 1e-6
        slope = (bound(phi + e, noise)[0] - bound(phi - e, noise)[0]) / 2e-6
        assert gradient[i].item() == pytest.approx(slope.item(), rel=1e-5, abs=1e-6)


def test_what_a_guide_must_do():
    def nothing(y):
        pass

    def counts(y):
        with pyro.plate("group", len(y), dim=-1):
            pyro.sample("d", dist.Poisson(torch.ones(len(y), dtype=REAL)))

    density = compile(cf.random_intercept, cf.balanced())
    with pytest.raises(FitError, match=r"does not draw 'd'(.|\n)*the guide draws: nothing"):
        svi.run(density, guide=nothing)
    with pytest.raises(FitError, match=r"no gradient(.|\n)*Poisson"):
        svi.run(density, guide=counts)


def test_a_point_guide_is_a_joint_mode():
    y = cf.sample(20)
    mean, _, _ = cf.with_prior_posterior(y)
    estimate = svi.run(compile(cf.with_prior, y), guide=AutoDelta, steps=700, cooldown=200, evaluate=2)
    assert estimate.values["b"].tolist() == pytest.approx(mean.tolist(), abs=0.05)
