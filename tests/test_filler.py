"""Filler: what stands behind the end of the data is found, and forecasts that would read it are refused."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import symhmm
from symhmm.errors import GraphError
from symhmm.posterior.evaluated import evaluated
from symhmm.posterior.filler import other_filler
from symhmm.posterior.forecast import predict

MOVES = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def regressing(y, mask, x):
    """Observations depend on the one before and on a covariate."""
    a = pyro.param("a", torch.tensor([0.9, 0.2]))
    with pyro.plate("animal", y.shape[1]):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(MOVES[z]))
            before = torch.zeros(y.shape[1]) if t == 0 else y[t - 1]
            with pyro.poutine.mask(mask=mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(a[z] * before + x[t], 1.0), obs=y[t])


def driven(y, mask, x):
    """States depend on whether the observation before was positive; two numbers are observed together."""
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        p = MOVES[z] if t == 0 else torch.where(y[t - 1, :1] > 0, MOVES[z], MOVES[z].flip(-1))
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        with pyro.poutine.mask(mask=mask[t]):
            pyro.sample(f"y_{t}", dist.Normal((z + x[t]).unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1), obs=y[t])


def data(steps, members, extra):
    generator = torch.Generator().manual_seed(3)
    y = torch.randn(steps, members, generator=generator)
    mask = torch.ones(steps + extra, members, dtype=torch.bool)
    mask[steps:] = False
    return torch.cat([y, torch.zeros(extra, members)]), mask, torch.linspace(0.0, 1.0, steps + extra)


def test_an_observation_that_depends_on_the_one_before_is_forecast_one_step_ahead():
    y, mask, x = data(6, 3, 3)
    mask[4:, 1] = False
    shorter = symhmm.compile(regressing, y[:6], mask[:6], x[:6])
    future = symhmm.compile(regressing, y, mask, x)
    v = shorter.initial()
    found = predict(shorter, v, 1, future=future)
    for n, last in enumerate((5, 3, 5)):
        p = found["z_{time}"].sel(animal=n).values[0]
        wanted = (p * v["a"]).sum() * y[last, n] + x[last + 1]
        assert_close(found["y_{time}"].sel(animal=n, quantity="mean").values[0], wanted, rtol=1e-10, atol=1e-10)
    with pytest.raises(GraphError, match=r"'y_\{time\}' 2 steps ahead[\s\S]*from args\[0\] after[\s\S]*horizon of 1"):
        predict(shorter, v, 2, future=future)
    # What the states will be does not depend on it.
    assert predict(shorter, v, 3, "z_{time}", future=future)["z_{time}"].values.shape == (3, 3, 2)


def test_states_that_depend_on_the_observation_before_are_refused_too():
    y, mask, x = data(6, 2, 2)
    shorter = symhmm.compile(driven, y[:6], mask[:6, 0], x[:6])
    future = symhmm.compile(driven, y, mask[:, 0], x)
    assert set(predict(shorter, {}, 1, future=future)) == {"z_{time}", "y_{time}"}
    with pytest.raises(GraphError, match=r"'z_\{time\}' 2 steps ahead"):
        predict(shorter, {}, 2, "z_{time}", future=future)


def test_only_observations_behind_the_end_of_each_member_are_filler():
    y, mask, x = data(5, 2, 2)
    mask[3:, 1] = False
    mask[1, 0] = False  # a hole within a sequence is no end
    density = symhmm.compile(regressing, y, mask, x)
    at = evaluated(density, density.initial())
    low, high = other_filler(density, density.initial(), at, at.loops[0])
    behind = ~mask
    behind[1, 0] = False
    # The first steps run one by one and have no place on the axis: the values there are no candidates.
    seen = y[1:][~behind[1:]]
    assert low.arguments == high.arguments == ("args[0]",)
    assert_close(low.density.data[0], torch.where(behind, seen.min(), y))
    assert_close(high.density.data[0], torch.where(behind, seen.max(), y))
    assert torch.equal(low.density.data[2], x)
    assert_close(high.density.log_prob(density.initial()), density.log_prob(density.initial()))


def test_data_without_an_end_have_no_filler():
    y, mask, x = data(5, 2, 0)
    density = symhmm.compile(regressing, y, mask, x)
    at = evaluated(density, density.initial())
    assert other_filler(density, density.initial(), at, at.loops[0]) == []
