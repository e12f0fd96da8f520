"""ArviZ: pointwise values against brute force, LOO that runs, names of dimensions, and refusals."""

import itertools
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex

import symhmm
from symhmm.errors import FitError, GraphError
from symhmm.posterior.align import symmetry
from symhmm.posterior.inference_data import inference_data, points_of

SIMPLEX = torch.distributions.constraints.simplex


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def model(y, mask):
    """Two states, a random effect for each animal, fixed effects with priors."""
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    stay = pyro.param("stay", lambda: torch.tensor([[0.8, 0.2], [0.3, 0.7]]), SIMPLEX)
    with pyro.plate("animal", y.shape[1]):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else Vindex(stay)[z, :]))
            with pyro.poutine.mask(mask=mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z] + shift, 1.0), obs=y[t])


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(0)
    y = torch.randn(5, 6, generator=g, dtype=torch.float64) + 2.0 * (torch.arange(5).unsqueeze(-1) % 2)
    mask = torch.ones(5, 6, dtype=torch.bool)
    mask[3:, 1] = mask[2, 4] = False
    return y, mask


def draws(density, chains, count):
    g = torch.Generator().manual_seed(1)
    each = [density.unpack(torch.randn(density.size, generator=g)) for _ in range(chains * count)]
    return {n: torch.stack([v[n] for v in each]).unflatten(0, (chains, count)) for n in each[0]}


def by_hand(y, mask, loc, stay, shift):
    """Log-likelihood of one animal: all paths written out."""
    total = []
    for path in itertools.product(range(2), repeat=len(y)):
        score = np.log(0.5) + sum(np.log(stay[a, b]) for a, b in itertools.pairwise(path))
        for t, k in enumerate(path):
            if mask[t]:
                score += -0.5 * (y[t] - loc[k] - shift) ** 2 - 0.5 * np.log(2 * np.pi)
        total.append(score)
    return np.logaddexp.reduce(total)


def test_pointwise_values_are_those_of_all_paths_written_out(data):
    y, mask = data
    density = symhmm.compile(model, y, mask)
    found = draws(density, 2, 3)
    out = inference_data(density, found, labels={"animal": list("abcdef")}, predictive=4)
    terms = out.log_likelihood["y"]
    assert terms.dims == ("chain", "draw", "animal")
    assert list(terms.animal.values) == list("abcdef")
    for c, d, n in itertools.product(range(2), range(3), range(6)):
        v = {name: x[c, d].numpy() for name, x in found.items()}
        wanted = by_hand(y[:, n].numpy(), mask[:, n], v["loc"], v["stay"], v["shift"][n])
        assert float(terms[c, d, n]) == pytest.approx(wanted, abs=1e-10)
    assert out.posterior["shift"].dims == ("chain", "draw", "animal")
    assert out.posterior["stay"].shape == (2, 3, 2, 2)
    assert out.observed_data["y"].dims == ("time", "animal")
    seen = out.observed_data["y"].values
    assert np.isnan(seen[~mask.numpy()]).all() and (seen[mask.numpy()] == y[mask].numpy()).all()
    assert out.posterior_predictive["y"].shape == (1, 4, 5, 6)


def test_states_of_draws_are_aligned_and_named(data):
    density = symhmm.compile(model, *data)
    g = torch.Generator().manual_seed(2)
    loc = torch.tensor([-1.0, 2.0]) + 0.1 * torch.randn(20, 2, generator=g)
    swap = torch.arange(20) % 3 == 0
    stay = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).expand(20, 2, 2)
    mixed = {
        "loc": torch.where(swap[:, None], loc.flip(1), loc),
        "stay": torch.where(swap[:, None, None], stay.flip(1, 2), stay),
        "shift": torch.zeros(20, 6),
    }
    found = symmetry(density)
    out = inference_data(density, {n: x[None] for n, x in mixed.items()}, order=found, order_by="loc")
    assert np.allclose(out.posterior["loc"].values[0], loc.numpy())
    assert np.allclose(out.posterior["stay"].values[0], stay.numpy())
    assert out.posterior["loc"].dims == ("chain", "draw", "state")
    assert out.posterior["stay"].dims == ("chain", "draw", "from_state", "to_state")


def test_a_fit_gives_loo_and_waic(data):
    fit = symhmm.fit(model, *data, method="svi", steps=200, cooldown=50, restarts=1)
    out = fit.to_arviz(draws=200)
    assert dict(out.log_likelihood.sizes) == {"chain": 1, "draw": 200, "animal": 6}
    for compare in (arviz.loo, arviz.waic):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # six animals with effects of their own: some weigh much
            found = compare(out, pointwise=True)
        assert np.isfinite(found.iloc[0])
        assert found.n_data_points == 6
    with pytest.raises(FitError, match="no posterior"):
        symhmm.fit(model, *data, method="map", restarts=1).to_arviz()


def test_points_that_are_none_are_refused(data):
    graph = symhmm.compile(model, *data).graph
    assert points_of(graph, None) == ("animal",)
    for given in ("time", "z_{time}", "y_{time}"):
        with pytest.raises(GraphError, match=r"LOO and WAIC of such values are wrong"):
            points_of(graph, given)
    with pytest.raises(GraphError, match="there is no plate 'whale'"):
        points_of(graph, "whale")
