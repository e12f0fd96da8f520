"""NUTS beside its slow twins: a Gibbs sampler that draws the states, and Pyro's own NUTS on the program without them."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from pyro.ops.indexing import Vindex

import symhmm
from symhmm.infer.draws import agreement
from symhmm.posterior.decode import sample_states

pytest.importorskip("nutpie")
N, T, SIGMA, TAU = 4, 15, 0.8, 0.6
STAY = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
CENTRE = torch.tensor([-1.0, 1.2], dtype=torch.float64)


def model(y):
    """Two states whose means are unknown, and individuals that lie above or below them. ``y`` has shape (T, N)."""
    mu = pyro.sample("mu", dist.Normal(CENTRE, 0.5).to_event(1))
    with pyro.plate("individual", N, dim=-1):
        d = pyro.sample("d", dist.Normal(torch.zeros((), dtype=y.dtype), TAU))
        z = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(STAY)[z]))
            pyro.sample(f"y_{t}", dist.Normal(mu[z] + d, SIGMA), obs=y[t])


def data():
    generator = np.random.default_rng(3)
    d, z, y = TAU * generator.normal(size=N), np.zeros(N, dtype=int), np.empty((T, N))
    for t in range(T):
        z = (generator.random(N) < STAY.numpy()[z, 1]).astype(int)
        y[t] = CENTRE.numpy()[z] + d + SIGMA * generator.normal(size=N)
    return torch.from_numpy(y)


@pytest.fixture(scope="module")
def density():
    return symhmm.compile(model, data())


@pytest.fixture(scope="module")
def fit(density):
    return symhmm.fit(density, method="nuts", chains=2, draws=600, tune=150, seed=3)


def gibbs(density, sweeps, seed):
    """States given values, then effects given states, then means given both; shape (sweeps, 2 + N)."""
    generator = np.random.default_rng(seed)
    y, out = data().numpy(), np.empty((sweeps, 2 + N))
    mu, d = CENTRE.numpy().copy(), np.zeros(N)
    for k in range(sweeps):
        values = {"mu": torch.from_numpy(mu), "d": torch.from_numpy(d)}
        z = sample_states(density, values, 1, seed=seed * sweeps + k)["z_{time}"].values[0].numpy()
        precision = T / SIGMA**2 + 1 / TAU**2
        d = (y - mu[z]).sum(0) / SIGMA**2 / precision + generator.normal(size=N) / np.sqrt(precision)
        for s in range(2):
            precision = (z == s).sum() / SIGMA**2 + 1 / 0.25
            mean = ((y - d)[z == s].sum() / SIGMA**2 + CENTRE[s].item() / 0.25) / precision
            mu[s] = mean + generator.normal() / np.sqrt(precision)
        out[k] = np.concatenate([mu, d])
    return out


def assert_agree(a, b, rough=0.15):
    """Means of two sets of chains, shape (chains, draws, numbers), within Monte Carlo error; deviations within ``rough``."""
    moments = []
    for x in (a, b):
        flat = x.reshape(-1, x.shape[-1])
        moments.append((flat.mean(0), flat.std(0), flat.std(0) / np.sqrt(agreement(x)[1])))
    (mean_a, sd_a, error_a), (mean_b, sd_b, error_b) = moments
    assert (np.abs(mean_a - mean_b) < 4 * np.hypot(error_a, error_b)).all(), (mean_a, mean_b, error_a, error_b)
    assert (np.hypot(error_a, error_b) < 0.2 * sd_a).all()
    assert np.allclose(sd_a, sd_b, rtol=rough)


def test_agrees_with_gibbs(density, fit):
    chains = np.stack([gibbs(density, 1500, seed) for seed in (1, 2)])[:, 100:]
    assert_agree(fit.estimate.posterior.chains.numpy(), chains)


def test_states_of_the_draws(density, fit):
    """Probabilities of states averaged over draws are those of states drawn for each draw."""
    smoothed = fit.smooth(draws=200)["z_{time}"].values
    drawn = fit.sample_states(1, draws=200)["z_{time}"].values
    assert drawn.shape == (200, T, N)
    frequency = (drawn == 1).double().mean(0)
    assert float((frequency - smoothed[..., 1]).abs().max()) < 5 * 0.5 / 200**0.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_pyros_own_nuts_on_the_program_without_states(fit):
    pyro.set_rng_seed(0)
    kernel = NUTS(symhmm.marginalize(model))
    # A chain that starts at random may stay where the two states have changed places.
    start = {"mu": CENTRE, "d": torch.zeros(N, dtype=torch.float64)}
    mcmc = MCMC(kernel, num_samples=400, warmup_steps=150, initial_params=start, disable_progbar=True)
    mcmc.run(data())
    samples = mcmc.get_samples()
    found = torch.cat([samples["mu"], samples["d"]], -1).numpy()[None]
    assert_agree(fit.estimate.posterior.chains.numpy(), found, rough=0.3)
