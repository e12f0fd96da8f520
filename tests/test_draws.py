"""Draws as a posterior, and what is said of them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.infer.draws import agreement, diagnose, draws, relabelled, verdict
from symhmm.infer.sampler import Chain

pytest.importorskip("arviz")


def model(y):
    mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=y.dtype), 1.0))
    pyro.sample("y", dist.Normal(mu, scale).expand([len(y)]).to_event(1), obs=y)


ENTRIES = symhmm.compile(model, torch.zeros(2, dtype=torch.float64)).layout.entries


def chain(points, diverging=0, depth=3.0, seed=0):
    n = len(points)
    generator = np.random.default_rng(seed)
    return Chain(
        points, np.zeros(n), generator.normal(size=n), (np.arange(n) < diverging) * 1.0, np.full(n, depth), np.ones(n)
    )


def independent(chains=4, n=400, seed=0):
    return np.random.default_rng(seed).normal(size=(chains, n, 2))


def posterior(x, **options):
    found = [chain(c, seed=i, **options) for i, c in enumerate(x)]
    return draws(torch.from_numpy(x), found, ENTRIES), found


def test_the_table_is_that_of_the_constrained_values():
    x = independent()
    table = posterior(x)[0].table
    scale = np.exp(x[..., 1]).reshape(-1)
    assert table["name"] == ("mu", "scale")
    row = table.rows[1]
    assert np.allclose(row[1:5], [scale.mean(), scale.std(ddof=1), *np.quantile(scale, [0.025, 0.975])])
    assert row[5] == pytest.approx(1.0, abs=0.01)
    assert 1200 < row[6] < 2200


def test_diagnose_agrees_with_a_formula_for_r_hat():
    """Two chains that are apart by d: R-hat of normal numbers is about sqrt(1 + d^2 / 4 ...) of ranks; only large is asked."""
    x = independent(2)
    x[1] += 1.0
    table = diagnose({"mu": torch.from_numpy(x[..., 0]), "scale": torch.from_numpy(x[..., 1])}, ENTRIES)
    assert min(table["r_hat"]) > 1.1


def test_agreement_of_one_chain_compares_its_halves():
    x = independent(1, 1000)
    assert agreement(x)[0].max() < 1.02
    x[:, 500:] += 2.0
    assert agreement(x)[0].min() > 1.3


def test_sample_takes_the_draws_themselves():
    found, _ = posterior(independent())
    thinned = found.sample(100)
    everything = {tuple(v) for v in found.all.tolist()}
    assert thinned.shape == (100, 2)
    assert len({tuple(v) for v in thinned.tolist()}) == 100
    assert {tuple(v) for v in thinned.tolist()} <= everything
    more = found.sample(5000, seed=3)
    assert more.shape == (5000, 2)
    assert torch.equal(more, found.sample(5000, seed=3))
    assert {tuple(v) for v in more.tolist()} <= everything


def test_middle_and_spread_are_of_all_chains():
    x = independent()
    found, _ = posterior(x)
    assert np.allclose(found.sd, x.reshape(-1, 2).std(0, ddof=1))
    assert np.allclose(found.vector, np.sort(x.reshape(-1, 2), 0)[799])
    assert torch.equal(found.permuted(torch.tensor([1, 0])).chains, found.chains[..., [1, 0]])


def test_states_of_chains_are_put_into_one_order():
    """A chain that has found the states the other way round is turned; one that cannot be turned stays."""

    def mixture(y):
        one = torch.ones(2, dtype=y.dtype)
        weight = pyro.sample("weight", dist.Dirichlet(2 * one))
        mean = pyro.sample("mean", dist.Normal(0 * one, 3 * one).to_event(1))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(weight))
            pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)

    density = symhmm.compile(mixture, torch.linspace(-3, 3, 7, dtype=torch.float64))
    generator = np.random.default_rng(0)
    x = torch.from_numpy(np.array([0.4, -2.0, 2.0]) + 0.1 * generator.normal(size=(3, 50, 3)))
    y = x.clone()
    y[2] = torch.stack([-x[2, :, 0], x[2, :, 2], x[2, :, 1]], -1)  # the logit of the first weight turns its sign
    entries = density.layout.entries
    moved, switched = relabelled(density, y, entries)
    assert switched == 50
    assert torch.allclose(moved, x, atol=1e-10)
    assert torch.equal(relabelled(density, x, entries)[0], x)
    alone = symhmm.compile(model, torch.zeros(2, dtype=torch.float64))
    assert relabelled(alone, x[..., :2], ENTRIES)[1] == 0


def test_verdicts():
    good, chains = posterior(independent())
    assert verdict(good, chains, (), 10).ok
    assert verdict(good, chains, ("no prior: mu",), 10).causes == ("no prior: mu",)

    x = independent()
    x[3] += 3.0
    apart = verdict(*posterior(x), (), 10)
    assert not apart.ok
    assert any("chains disagree: " in c for c in apart.causes)
    assert "draws=1600" in apart.try_

    diverged = verdict(*posterior(independent(), diverging=20), (), 10)
    assert not diverged.ok
    assert "80 of 1600 trajectories diverged" in diverged.causes
    assert diverged.try_ == "target_accept=0.95"
    assert verdict(*posterior(independent(), diverging=1), (), 10).ok

    deep = verdict(*posterior(independent(), depth=10.0), (), 10)
    assert not deep.ok
    assert deep.try_ == "max_depth=12"

    x = np.cumsum(independent(), axis=1) / 20
    assert not verdict(*posterior(x), (), 10).ok
    assert not verdict(*posterior(independent(2, 3)), (), 10).ok
