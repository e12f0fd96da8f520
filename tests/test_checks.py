"""Posterior predictive checks: replicated data look like the data where the model is right, and only there."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.testing import assert_close

import symhmm
from symhmm.errors import DataError
from symhmm.posterior.checks import check
from symhmm.posterior.forward import data

MATRIX = torch.tensor([[0.9, 0.1], [0.3, 0.7]])


def program(y, counts, mask):
    loc = pyro.param("loc", torch.tensor([-2.0, 3.0]))
    with pyro.plate("animal", y.shape[1], dim=-1):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(MATRIX[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z] + shift, 0.5).mask(mask[t]), obs=y[t])
            with poutine.mask(mask=mask[t]):
                pyro.sample(f"c_{t}", dist.Poisson(2.0), obs=counts[t])


@pytest.fixture
def density():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(40, 3, generator=generator) < 0.8
    y = torch.where(mask, 3 * torch.randn(40, 3, generator=generator), torch.nan)
    return symhmm.compile(program, y, torch.full((40, 3), 2.0), mask)


def test_data_are_those_of_the_program_with_nan_where_nothing_is_seen(density):
    y, counts, mask = density.arguments.rebuild(density.data)[0]
    found = data(density, density.initial())
    assert_close(found["y_{time}"].values, y, equal_nan=True)
    assert_close(found["c_{time}"].values, torch.where(mask, counts, torch.nan), equal_nan=True)
    assert found["y_{time}"].dims == ("time", "animal")


def test_a_statistic_that_the_model_cannot_make_is_in_the_tail(density):
    values = density.initial()
    found = check(
        density,
        [values],
        {"mean count": lambda x: x["c_{time}"].nanmean(), "spread": lambda x: x["c_{time}"].nansum(0)},
        400,
        seed=1,
    )
    assert found.replicated["spread"].shape == (400, 3)
    assert 0.2 < found.tail("mean count") < 0.8
    assert "spread[2]" in repr(found)
    # Constant counts: their spread is 0, and that of a Poisson variable never.
    constant = check(density, [values], lambda x: (x["c_{time}"] - 2).square().nanmean(), 200)
    assert constant.observed["statistic"] == 0 and constant.tail("statistic") == 1
    assert_close(constant.replicated["statistic"].mean(), torch.tensor(2.0).double(), atol=0.1, rtol=0)


def test_new_members_spread_more_than_the_same_ones(density):
    values = density.initial() | {"shift": torch.tensor([0.5, 0.5, 0.5])}

    def level(x):
        return x["y_{time}"].nanmean(0)[0]

    same, other = (check(density, [values], level, 300, new_members=new) for new in (False, True))
    assert other.replicated["statistic"].std() > same.replicated["statistic"].std() * 1.2


def test_several_values_share_the_draws(density):
    values = [density.initial() | {"loc": torch.tensor([a, a])} for a in (-50.0, 50.0)]
    found = check(density, values, lambda x: x["y_{time}"].nanmean(), 10).replicated["statistic"]
    assert found.shape == (10,) and (found < 0).sum() == 5


def test_a_statistic_whose_size_depends_on_the_data_is_refused(density):
    with pytest.raises(DataError, match="has shape"):
        check(density, [density.initial()], lambda x: x["c_{time}"][x["c_{time}"] == 2], 5)


def test_a_site_that_is_not_there_is_named(density):
    with pytest.raises(DataError, match=r"no observed site 'w'"):
        check(density, [density.initial()], lambda data: data["w"].nanmean(), 2)
