"""Curves against formulas of the parameters at covariates that the data never had."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import symhmm
from symhmm.distributions import stationary_distribution
from symhmm.errors import GraphError, ValuesError

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def program(x, y, effect=False):
    base = pyro.param("base", torch.tensor([-1.0, 1.0]))
    slope = pyro.param("slope", torch.tensor([0.5, 0.2]))
    loc = pyro.param("loc", torch.tensor([-1.0, 1.5]))
    with pyro.plate("animal", y.shape[1]):
        own = pyro.sample("own", dist.Normal(0.0, 1.0)) if effect else 0.0
        z = None
        for t in pyro.markov(range(len(y))):
            up = torch.tensor([0.0, 0.0])[0] if z is None else (base + slope * x[t])[z] + own
            up = up.expand(y.shape[1]) if z is None else up
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=torch.stack([torch.zeros_like(up), up], -1)))
            with pyro.poutine.mask(mask=~y[t].isnan()):
                pyro.sample(f"y_{t}", dist.Normal(loc[z] + 0.3 * x[t], 1.0), obs=y[t])


@pytest.fixture(scope="module")
def fit():
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, generator=generator)
    y = torch.randn(150, 2, generator=generator) + 1.5 * torch.rand(150, 2, generator=generator).round()
    return symhmm.fit(program, x, y, max_evaluations=30)


def formula(v, grid):
    up = (v["base"] + v["slope"] * grid[:, None]).sigmoid()
    return torch.stack([1 - up, up], -1)


def test_curves_are_the_formulas_at_new_covariates(fit):
    grid = torch.linspace(-3, 5, 6)
    found = fit.curves(grid, torch.full((6, 1), torch.nan), along=("temperature", grid), draws=60, seed=1)
    moves = found["transition of z_{time}"]
    assert moves.dims == ("temperature", "animal", "from", "to", "interval")
    assert moves.labels["temperature"] == tuple(grid[1:].tolist())
    p = formula(fit.values, grid[1:])
    assert_close(moves.sel(animal=0, interval="estimate").values, p, **EXACT)
    rest = found["stationary z_{time}"].sel(animal=0)
    assert_close(rest.sel(interval="estimate").values, stationary_distribution(p), **EXACT)
    draws = torch.stack([stationary_distribution(formula(v, grid[1:])) for v in fit.uncertain(60, seed=1)])
    for p in (0.025, 0.975):
        assert_close(rest.sel(interval=f"{100 * p:g}%").values, draws.quantile(p, 0), **EXACT)
    loc = found["y_{time}"].sel(animal=0, quantity="loc", interval="estimate").values
    assert_close(loc, fit.values["loc"] + 0.3 * grid[1:, None], **EXACT)


def test_normal_draws_have_the_errors_of_the_information(fit):
    drawn = torch.stack([v["loc"] for v in fit.uncertain(4000)])
    assert_close(drawn.std(0), fit.standard_errors["loc"], rtol=0.06, atol=0.0)
    found = fit.interval(lambda v: v["loc"][1] - v["loc"][0], draws=4000)
    se = fit.delta(lambda v: v["loc"][1] - v["loc"][0])
    assert_close(found.values[2] - found.values[1], 2 * 1.96 * se, rtol=0.08, atol=0.0)


def test_members_that_are_others_need_effects(fit):
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    mixed = symhmm.fit(program, torch.zeros(20), y, True, method="svi", steps=20, cooldown=10, restarts=1)
    grid, nothing = torch.linspace(-1, 1, 4), torch.full((4, 1), torch.nan)
    with pytest.raises(ValuesError, match="own"):
        mixed.curves(grid, nothing, True, draws=2)
    found = mixed.curves(grid, nothing, True, draws=2, effects={"own": torch.zeros(1)})
    p = found["transition of z_{time}"].sel(animal=0, interval="estimate").values
    assert_close(p, formula(mixed.values, grid[1:]), **EXACT)
    with pytest.raises(GraphError, match="another number of steps"):
        fit.curves(grid, nothing, along=("x", grid[1:]), draws=2)


def test_new_members_of_any_number(fit):
    y = torch.randn(20, 2, generator=torch.Generator().manual_seed(1))
    mixed = symhmm.fit(program, torch.zeros(20), y, True, method="svi", steps=20, cooldown=10, restarts=1)
    found = mixed.simulate(3, torch.zeros(8), torch.zeros(8, 5), True, new_members=True)
    assert found["y_{time}"].values.shape == (3, 8, 5)
    assert not torch.equal(found["y_{time}"].values[0], found["y_{time}"].values[1])
    seen = mixed.check(lambda d: d["y_{time}"].nanmean(), 50)
    assert seen.replicated["statistic"].shape == (50,)
    assert 0.001 < seen.tail("statistic") < 0.999
