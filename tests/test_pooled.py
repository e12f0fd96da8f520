"""Starts around the fit in which all states are alike: its closed form, and poor starts of programs."""

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_em import lumps, plain_hmm, touching

from symhmm.compiler.density import compile
from symhmm.infer import em, mle
from symhmm.infer.pooled import Search, starts
from symhmm.infer.target import target


def places(density, **options):
    """Constrained values at each start."""
    goal = target(density, {}, "mle", options.pop("start", None))
    found = starts(goal, Search(**options))
    return [goal.values(goal.embed(torch.from_numpy(x))) for x in found.points], goal


def test_starts_lie_around_the_pooled_fit_where_the_own_start_is_worse():
    y = 50.0 + 0.2 * touching()
    found, _ = places(compile(lumps, y), restarts=40, screen=1)
    loc = torch.stack([v["loc"] for v in found])
    # Around the mean of the data, by their spread: a single observation's standard error where each state has half of them.
    torch.testing.assert_close(loc.mean(0), y.mean().expand(2), rtol=0, atol=0.3)
    assert loc.std(0).tolist() == pytest.approx([0.8 * y.std().item()] * 2, rel=0.35)
    # What only latents depend on keeps its start.
    weights = torch.stack([v["weights"] for v in found])
    assert weights.mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.15)


def test_own_start_is_kept_where_it_is_better():
    start = {"loc": cf.real([-1.4, 1.6])}
    found, goal = places(compile(lumps, touching()), start=start, restarts=2)
    torch.testing.assert_close(found[0]["loc"], goal.values(goal.start)["loc"], rtol=0, atol=0.1)


@pytest.mark.parametrize("jitter", [0.0, {"scale": 0.5}])
def test_own_start_is_kept_where_it_was_asked_for(jitter):
    found, goal = places(compile(lumps, 50.0 + touching()), restarts=3, jitter=jitter)
    for values in found:
        assert torch.equal(values["loc"], goal.values(goal.start)["loc"])


def test_density_that_is_not_finite_at_its_start_is_still_started():
    def model(y):
        loc = pyro.param("loc", cf.real([0.0, 0.0]))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(cf.real([0.5, 0.5])))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)
        pyro.factor("wall", torch.where(loc[0] > -0.2, 0.0, -torch.inf) + 0.0 * loc[0])

    estimate = mle.run(compile(model, cf.two_lumps()), start={"loc": cf.real([-1.0, 0.0])})
    assert np.isfinite(estimate.objective)


@pytest.mark.parametrize("driver", [mle, em])
@pytest.mark.parametrize(("unit", "origin"), [(1.0, 0.0), (50.0, 1000.0), (0.01, 0.0)])
def test_units_and_origin_of_the_data_do_not_matter(driver, unit, origin):
    z = (torch.rand(6, 40, generator=cf.generator(1)) < 0.2).long().cumsum(1) % 3
    noise = torch.randn(6, 40, generator=cf.generator(2), dtype=cf.REAL)
    y = cf.real([-3.0, 0.0, 4.0])[z] + noise
    estimate = driver.run(compile(plain_hmm, origin + unit * y))
    assert estimate.status.ok
    loc = ((estimate.values["loc"] - origin) / unit).sort().values
    assert loc.tolist() == pytest.approx([-3.0, 0.0, 4.0], abs=0.4)
