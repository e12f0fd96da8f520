"""Residuals against the distribution function of the forecast, worked out by a filter by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

import symhmm
from symhmm.distributions import (
    Beta,
    GammaMeanSd,
    Hurdle,
    NegativeBinomialMean,
    VonMises,
    ZeroInflated,
    ZeroOneInflated,
)
from symhmm.errors import GraphError, ProgramError
from symhmm.posterior.residuals import describe, describe_members, residuals

A = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def program(y, mask, emission):
    rate = pyro.param("rate", torch.tensor([1.0, 6.0]))
    with pyro.plate("animal", y.shape[1]):
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else A[z]))
            with pyro.poutine.mask(mask=mask[t]):
                pyro.sample(f"y_{t}", emission(rate[z]), obs=y[t])


def data(steps=400, animals=2):
    generator = torch.Generator().manual_seed(0)
    z = torch.zeros(animals, dtype=torch.int64)
    rows = []
    for _ in range(steps):
        z = torch.multinomial(A[z], 1, generator=generator).squeeze(-1)
        rows.append(z)
    rate = torch.tensor([1.0, 6.0])[torch.stack(rows)]
    mask = torch.rand(steps, animals, generator=generator) > 0.1
    return rate, mask, generator


def by_hand(y, mask, p, cdf):
    """P(Y_t <= y_t | past) by a filter: p and cdf have shape (T, N, 2)."""
    rows, state = [], torch.full((y.shape[1], 2), 0.5)
    for t in range(len(y)):
        rows.append((state * cdf[t]).sum(-1))
        state = torch.where(mask[t, :, None], state * p[t], state)
        state = (state / state.sum(-1, keepdim=True)) @ A
    return torch.stack(rows)


def normal(rate):
    return dist.Normal(rate, 1.0)


def student(rate):
    return dist.StudentT(5.0, rate)


def test_continuous_residuals_are_those_of_the_forecast():
    rate, mask, generator = data()
    y = rate + torch.randn(rate.shape, generator=generator)
    density = symhmm.compile(program, y, mask, normal)
    found = residuals(density, density.initial(), "y_{time}")
    states = dist.Normal(torch.tensor([1.0, 6.0]), 1.0)
    u = by_hand(y, mask, states.log_prob(y[..., None]).exp(), states.cdf(y[..., None]))
    assert found.dims == ("time", "animal")
    assert torch.equal(found.values.isnan(), ~mask)
    assert_close(found.values[mask], torch.special.ndtri(u)[mask], rtol=1e-7, atol=1e-7)
    (row,) = describe(found).rows
    assert abs(row[1]) < 0.15 and abs(row[2] - 1) < 0.1 and row[3] > 1e-3 and abs(row[4]) < 0.1


def test_counts_lie_between_their_bounds():
    rate, mask, generator = data(100)
    y = torch.poisson(rate, generator=generator)
    density = symhmm.compile(program, y, mask, dist.Poisson)
    found = residuals(density, density.initial(), "y_{time}", seed=3)
    states = dist.Poisson(torch.tensor([1.0, 6.0]))
    p = states.log_prob(y[..., None]).exp()

    def cdf(x):
        x = x[..., None]
        return torch.where(x < 0, 0.0, torch.special.gammaincc(x.clamp_min(0) + 1, states.rate))

    u = torch.special.ndtr(found.values)
    assert (u <= by_hand(y, mask, p, cdf(y)) + 1e-9)[mask].all()
    assert (u >= by_hand(y, mask, p, cdf(y - 1)) - 1e-9)[mask].all()
    assert torch.equal(residuals(density, density.initial(), "y_{time}", seed=3).values[mask], found.values[mask])


@pytest.mark.parametrize(
    "emission",
    [
        lambda rate: Hurdle(GammaMeanSd(rate, 1.0), 0.2 / rate),
        lambda rate: ZeroInflated(dist.Poisson(rate), 0.3),
        lambda rate: NegativeBinomialMean(rate, 0.4),
        lambda rate: VonMises(0.0, rate),
        lambda rate: ZeroOneInflated(Beta(rate, 2.0), 0.3, rate / 8),
    ],
    ids=["zeros and gamma", "zeros and Poisson", "negative binomial", "angles", "proportions"],
)
def test_residuals_of_the_true_model_are_normal(emission):
    rate, mask, _ = data(300)
    torch.manual_seed(1)
    density = symhmm.compile(program, emission(rate).sample(), mask, emission)
    found = residuals(density, density.initial(), "y_{time}", seed=3)
    assert torch.equal(found.values.isnan(), ~mask)
    (row,) = describe(found).rows
    assert abs(row[1]) < 0.15 and abs(row[2] - 1) < 0.12 and row[3] > 1e-3 and abs(row[4]) < 0.1


def test_draws_take_the_place_of_a_distribution_function():
    rate, mask, _ = data(400)
    y = rate + torch.as_tensor(stats.t(5).rvs(tuple(rate.shape), random_state=1))
    density = symhmm.compile(program, y, mask, student)
    found = residuals(density, density.initial(), "y_{time}", seed=3)
    states = torch.tensor([1.0, 6.0])
    p = dist.StudentT(5.0, states).log_prob(y[..., None]).exp()
    cdf = torch.as_tensor(stats.t(5).cdf((y[..., None] - states).numpy()))
    error = torch.special.ndtr(found.values) - by_hand(y, mask, p, cdf)
    assert torch.equal(found.values.isnan(), ~mask)
    assert 1e-4 < error[mask].abs().max() < 5 * 0.5 / 2000**0.5
    table = describe_members(found)
    assert table["animal"] == (0, 1) and sum(table["n"]) == int(mask.sum())
    assert all(abs(x) < 0.15 for x in (*table["mean"], *table["autocorrelation"])) and min(table["p (normal)"]) > 1e-3


def test_refusals():
    rate, mask, _ = data(10)
    density = symhmm.compile(program, rate, mask, student)
    with pytest.raises(GraphError, match="no observed site 'x'"):
        residuals(density, density.initial(), "x")

    def pairs(y):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"y_{t}", dist.MultivariateNormal(torch.eye(2)[z], torch.eye(2)), obs=y[t])

    with pytest.raises(ProgramError, match="several dimensions"):
        residuals(symhmm.compile(pairs, torch.zeros(4, 2)), {}, "y_{time}")
