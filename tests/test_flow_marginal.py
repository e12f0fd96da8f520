"""One random intercept on a transition logit: the plain and the corrected marginal, each at its own maximum."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import symhmm

REAL = torch.float64


def intercept(y):
    """Three states; ``d`` is each individual's own deviation on the logit of moving from the first to the second."""
    loc = pyro.param("loc", torch.tensor([-1.5, 0.3, 2.0], dtype=REAL))
    sd = pyro.param("sd", torch.ones(3, dtype=REAL), constraint=constraints.positive)
    mu = pyro.param("mu", torch.full((6,), -2.9, dtype=REAL))
    tau = pyro.param("tau", torch.tensor(1.0, dtype=REAL), constraint=constraints.positive)
    with pyro.plate("individual", y.shape[1], dim=-1):
        d = pyro.sample("d", dist.Normal(torch.zeros((), dtype=REAL), tau))
        moves = mu + torch.nn.functional.pad(d[..., None], (0, 5))
        logits = torch.zeros(*d.shape, 9, dtype=REAL).index_copy(-1, torch.tensor([1, 2, 3, 5, 6, 7]), moves)
        logits = logits.reshape(*d.shape, 3, 3)
        z = 0
        for t in pyro.markov(range(len(y))):
            row = torch.zeros(3, dtype=REAL) if t == 0 else Vindex(logits)[..., z, :]
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=row))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], sd[z]), obs=y[t])


@pytest.fixture
def density(data_file):
    table = pd.read_csv(data_file("sim_mixed.csv"))
    rows = [g["y"].to_numpy() for _, g in table.groupby("ID", sort=False)]
    return symhmm.compile(intercept, torch.from_numpy(np.stack(rows)).T.contiguous())


def on_a_grid(density, values, points=161):
    """Log-likelihood with the effects integrated by the trapezium rule over eight standard deviations on both sides."""
    at = 8 * values["tau"] * torch.linspace(-1, 1, points, dtype=REAL)
    individuals = values["d"].numel()
    terms = torch.stack([density.per("individual", {**values, "d": x.expand(individuals)}) for x in at])
    return float((terms.logsumexp(0) + (at[1] - at[0]).log()).sum())


@pytest.mark.slow
def test_each_marginal_has_its_own_maximum(density):
    plain = symhmm.fit(density, method="laplace", restarts=1)
    assert plain.status.ok
    assert plain.objective == pytest.approx(-17539.6614, abs=0.01)
    exact = symhmm.fit(density, method="laplace", restarts=1, correct=True)
    assert exact.status.ok
    assert exact.estimate.error <= 0.05
    assert exact.objective == pytest.approx(-17539.4429, abs=max(exact.estimate.error, 5e-4))
    assert float(exact.values["tau"]) == pytest.approx(0.999, abs=0.02)
    assert float(exact.values["tau"]) > float(plain.values["tau"])
    # Both are integrals that a plain grid gives as well, and the corrected maximum is the higher one.
    for fit in (plain, exact):
        value, error = fit.estimate.marginal
        assert value == pytest.approx(on_a_grid(density, fit.values), abs=max(error, 5e-4))
    assert exact.objective > plain.estimate.marginal[0]


@pytest.mark.slow
def test_a_maximum_of_draws_is_that_of_quadrature_within_its_error(density, monkeypatch):
    """The way that is taken with more effects for each member, where quadrature knows the answer."""
    from symhmm.infer import laplace_fit
    from symhmm.infer.laplace_exact import nodes

    def draws(modes, **options):
        return nodes(modes, **{**options, "quadrature": 0})

    monkeypatch.setattr(laplace_fit, "nodes", draws)
    fit = symhmm.fit(density, method="laplace", restarts=1, correct=True)
    assert fit.estimate.objective_name == "log-likelihood (importance-weighted)"
    assert fit.status.ok
    assert 0 < fit.estimate.error <= 0.05
    assert fit.objective == pytest.approx(-17539.4429, abs=4 * fit.estimate.error)
    assert float(fit.values["tau"]) == pytest.approx(0.999, abs=0.02)
