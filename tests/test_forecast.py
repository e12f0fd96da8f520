"""Forecasts against filters and mixtures worked out by hand, and against the posterior of masked steps."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.testing import assert_close

import symhmm
from symhmm.errors import GraphError
from symhmm.posterior.forecast import predict

EXACT = {"rtol": 1e-10, "atol": 1e-10}
A = torch.tensor([[[0.9, 0.1], [0.3, 0.7]], [[0.5, 0.5], [0.4, 0.6]]], dtype=torch.float64)
P = (0.1, 0.5, 0.9)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def program(y, mask, x=None):
    """Two kinds of animals, counts and lengths; with ``x`` both moves and lengths depend on a covariate."""
    loc = pyro.param("loc", torch.tensor([-1.0, 2.0]))
    with pyro.plate("animal", y.shape[1]):
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.4, 0.6])))
        z = None
        for t in pyro.markov(range(len(y))):
            p = torch.ones(2) / 2 if z is None else Vindex(A)[kind, z]
            if x is not None and z is not None:
                p = (Vindex(A.log())[kind, z] + x[t].unsqueeze(-1) * torch.tensor([0.0, 1.0])).softmax(-1)
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            with pyro.poutine.mask(mask=mask[t]):
                shift = 0.0 if x is None else x[t]
                pyro.sample(f"y_{t}", dist.Normal(loc[z] + shift, torch.tensor([0.5, 1.5])[z]), obs=y[t])
                pyro.sample(f"n_{t}", dist.Poisson(torch.tensor([1.0, 7.0])[z]), obs=y[t].abs().round())


def ragged(steps=6, extra=0):
    generator = torch.Generator().manual_seed(4)
    y = torch.randn(steps, 3, generator=generator) * 2
    mask = torch.arange(steps).unsqueeze(-1) < torch.tensor([6, 3, 4])
    mask[1, 0] = False
    pad = torch.zeros(extra, 3)
    return torch.cat([y, pad]), torch.cat([mask, pad.bool()])


def by_hand(y, mask, loc, n, horizon):
    """State probabilities (horizon, 2) of animal n by a joint filter over kind and state."""
    sd, rate = torch.tensor([0.5, 1.5]), torch.tensor([1.0, 7.0])
    joint = torch.tensor([0.4, 0.6]).unsqueeze(-1) * torch.ones(2) / 2
    end = int(mask[:, n].nonzero().max()) + 1
    rows = []
    for t in range(end + horizon):
        if t:
            joint = torch.einsum("ki,kij->kj", joint, A)
        if t >= end:
            rows.append(joint.sum(0) / joint.sum())
        elif mask[t, n]:
            joint = joint * dist.Normal(loc, sd).log_prob(y[t, n]).exp()
            joint = joint * dist.Poisson(rate).log_prob(y[t, n].abs().round()).exp()
    return torch.stack(rows)


def test_each_member_is_forecast_from_its_own_end():
    y, mask = ragged()
    density = symhmm.compile(program, y, mask)
    v = density.initial()
    found = predict(density, v, 4, quantiles=P)
    for n in range(3):
        p = by_hand(y, mask, v["loc"], n, 4)
        assert_close(found["z_{time}"].sel(animal=n).values, p, **EXACT)
        mean = (p * v["loc"]).sum(-1)
        second = (p * (v["loc"] ** 2 + torch.tensor([0.25, 2.25]))).sum(-1)
        mine = found["y_{time}"].sel(animal=n)
        assert_close(mine.sel(quantity="mean").values, mean, **EXACT)
        assert_close(mine.sel(quantity="sd").values, (second - mean**2).sqrt(), **EXACT)
        fn = dist.Normal(v["loc"], torch.tensor([0.5, 1.5]))
        counts = dist.Poisson(torch.tensor([1.0, 7.0]))
        for q in P:
            x = mine.sel(quantity=f"{100 * q:g}%").values
            assert_close((p * fn.cdf(x.unsqueeze(-1))).sum(-1), torch.full((4,), q), **EXACT)
            k = found["n_{time}"].sel(animal=n, quantity=f"{100 * q:g}%").values
            below = torch.special.gammaincc(k.unsqueeze(-1) + 1, counts.rate)
            before = below - counts.log_prob(k.unsqueeze(-1)).exp()
            assert ((p * below).sum(-1) >= q - 1e-9).all() and ((p * before).sum(-1) < q).all()
        mean = (p * counts.rate).sum(-1)
        assert_close(found["n_{time}"].sel(animal=n, quantity="mean").values, mean, rtol=1e-8, atol=1e-8)


def test_masked_steps_give_the_same_forecast():
    density, longer = symhmm.compile(program, *ragged()), symhmm.compile(program, *ragged(extra=4))
    v = density.initial()
    here, there = predict(density, v, 4), predict(density, v, 4, future=longer)
    for site in here:
        assert here[site].dims == there[site].dims
        assert here[site].labels == there[site].labels
        assert_close(here[site].values, there[site].values, **EXACT)


def test_future_covariates_are_those_given():
    (y, mask), x = ragged(), torch.linspace(-1, 1, 6).unsqueeze(-1) * torch.ones(3)
    fit = symhmm.fit(program, y, mask, x, max_evaluations=3)
    with pytest.raises(GraphError, match=r"without future covariates: the probabilities of 'z_\{time\}'"):
        fit.predict(2)
    with pytest.raises(GraphError, match="end 2 steps after the last observation, the horizon is 5"):
        fit.predict(5, *ragged(extra=2), torch.cat([x, torch.zeros(2, 3)]))
    ahead = torch.tensor([[5.0], [-5.0]]) * torch.ones(3)
    found = fit.predict(2, *ragged(extra=2), torch.cat([x, ahead]))
    mean = found["y_{time}"].sel(quantity="mean", animal=0).values
    p = found["z_{time}"].sel(animal=0).values
    assert_close(mean, (p * fit.values["loc"]).sum(-1) + ahead[:, 0], **EXACT)
    assert p[0, 1] > 0.9 > 0.1 > p[1, 1]
    # The second animal has ended earlier: its next steps are those after its own end.
    assert_close(
        found["y_{time}"].sel(quantity="mean", animal=1).values,
        (found["z_{time}"].sel(animal=1).values * fit.values["loc"]).sum(-1) + x[3:5, 1],
        **EXACT,
    )


def test_an_emission_with_covariates_needs_a_future_only_for_itself():
    def model(y, x):
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else A[0][z]))
            pyro.sample(f"y_{t}", dist.Normal(z + x[t], 1.0), obs=y[t])

    density = symhmm.compile(model, torch.randn(5), torch.randn(5))
    with pytest.raises(GraphError, match=r"the numbers of the distribution of 'y_\{time\}'"):
        predict(density, {}, 1)
    assert predict(density, {}, 1, "z_{time}")["z_{time}"].values.shape == (1, 2)
    with pytest.raises(GraphError, match="no site 'w' to forecast"):
        predict(density, {}, 1, "w")


def test_several_values_make_one_mixture():
    density = symhmm.compile(program, *ragged())
    v, w = density.initial(), {"loc": torch.tensor([0.5, 4.0])}
    one, two, both = predict(density, v, 2), predict(density, w, 2), predict(density, [v, w], 2)
    assert_close(both["z_{time}"].values, (one["z_{time}"].values + two["z_{time}"].values) / 2, **EXACT)
    a, b, c = (x["y_{time}"] for x in (one, two, both))
    mean = c.sel(quantity="mean").values
    assert_close(mean, (a.sel(quantity="mean").values + b.sel(quantity="mean").values) / 2, **EXACT)
    second = [x.sel(quantity="sd").values ** 2 + x.sel(quantity="mean").values ** 2 for x in (a, b)]
    assert_close(c.sel(quantity="sd").values, (sum(second) / 2 - mean**2).sqrt(), **EXACT)


def test_second_order_and_two_coupled_chains_are_forecast_as_masked_steps_are():
    def model(y, mask):
        deep = torch.tensor([[[0.8, 0.2], [0.6, 0.4]], [[0.3, 0.7], [0.1, 0.9]]])
        a = b = w = 0
        for t in pyro.markov(range(len(y)), history=2):
            c = pyro.sample(f"z_{t}", dist.Categorical(Vindex(deep)[a, b]))
            w = pyro.sample(f"w_{t}", dist.Categorical(Vindex(A)[c, w]))
            a, b = b, c
            with pyro.poutine.mask(mask=mask[t]):
                pyro.sample(f"y_{t}", dist.StudentT(5.0, c + 2.0 * w, 1.0), obs=y[t])

    y, mask = torch.randn(7, generator=torch.Generator().manual_seed(0)), torch.ones(7).bool()
    density = symhmm.compile(model, y, mask)
    longer = symhmm.compile(model, torch.cat([y, torch.zeros(3)]), torch.cat([mask, torch.zeros(3).bool()]))
    here, there = predict(density, {}, 3), predict(density, {}, 3, future=longer)
    assert set(here) == {"z_{time}", "w_{time}", "y_{time}"}
    for site in here:
        assert_close(here[site].values, there[site].values, **EXACT)
