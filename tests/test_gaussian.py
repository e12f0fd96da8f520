"""Gaussian hidden Markov models: the same as a forward recursion by hand with scipy's densities, and recovery."""

import math

import pytest
import torch
from scipy import stats
from torch.autograd import gradcheck
from torch.testing import assert_close

from symhmm.distributions import PartlyObservedNormal, stationary_distribution
from symhmm.errors import DataError, SpecError
from symhmm.models.gaussian import GaussianHMM
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def track(steps=40, individuals=3, missing=0.0, seed=0):
    """Two states with opposite correlations; states, and data."""
    g = torch.Generator().manual_seed(seed)
    z = torch.zeros(individuals, dtype=torch.long)
    rows, states = [], []
    tril = torch.tensor([[[1.0, 0.0], [0.8, 0.6]], [[1.0, 0.0], [-0.8, 0.6]]])
    for _ in range(steps):
        z = torch.where(torch.rand(individuals, generator=g) < 0.1, 1 - z, z)
        noise = torch.randn(individuals, 2, 1, generator=g)
        rows.append(torch.tensor([[-1.0, 0.0], [1.0, 0.5]])[z] + (tril[z] @ noise).squeeze(-1))
        states.append(z)
    y = torch.stack(rows)
    y[torch.rand(y.shape, generator=g) < missing] = torch.nan
    return SequenceData.from_tensors({"x": y[..., 0], "v": y[..., 1]}), torch.stack(states)


@pytest.mark.parametrize("covariance", ["full", "diagonal", "shared"])
@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_likelihood_is_that_of_a_forward_recursion_with_scipy(covariance, missing):
    data, _ = track(6, 2, missing)
    density = GaussianHMM(2, ["x", "v"], covariance).log_density(data)
    assert all(note.tier == "vector" for note in density.graph.loops.values())
    values = {n: v.detach() for n, v in density.unpack(density.pack(density.initial()) + 0.2).items()}
    p, total = values["transition"], 0.0
    for n in range(2):
        alpha = stationary_distribution(p)
        for t in range(6):
            alpha = alpha @ p if t else alpha
            seen = [d for d, s in enumerate(("x", "v")) if data.observed[s][t, n]]
            y = torch.stack([data.x[t, n], data.v[t, n]])[seen]
            for k in range(2):
                own = {n: values[n] if covariance == "shared" else values[n][k] for n in ("sd", "corr") if n in values}
                tril = own["sd"][:, None] * own.get("corr", torch.eye(2))
                matrix = tril @ tril.T
                if seen:
                    alpha[k] *= stats.multivariate_normal(values["mean"][k][seen], matrix[seen][:, seen]).pdf(y)
        total += math.log(alpha.sum())
    assert density.log_prob(values).item() == pytest.approx(total, abs=1e-10)


def test_covariances_are_found_again():
    data, states = track(400, 4, missing=0.1)
    fit = GaussianHMM(2, ["x", "v"]).fit(data, restarts=1)
    tril = fit.values["sd"][..., None] * fit.values["corr"]
    assert_close((tril @ tril.mT)[:, 0, 1], torch.tensor([0.8, -0.8]), rtol=0, atol=0.15)
    assert_close(fit.values["mean"], torch.tensor([[-1.0, 0.0], [1.0, 0.5]]), rtol=0, atol=0.2)
    assert (fit.viterbi()["z_{time}"].values == states).double().mean() > 0.9
    assert fit.estimate.n_parameters == 4 + 4 + 2 + 2
    shared = GaussianHMM(2, ["x", "v"], "shared").fit(data, restarts=1)
    assert shared.objective < fit.objective - 50 and shared.estimate.n_parameters == 4 + 2 + 1 + 2


@pytest.mark.parametrize(("covariance", "size"), [("full", 2), ("diagonal", 2), ("shared", 1)])
def test_one_stream_has_no_correlations(covariance, size):
    data, _ = track(30, 2)
    density = GaussianHMM(2, "x", covariance).log_density(data)
    assert density.layout["sd"].shape[0] == size and density.size == 2 + size + 2


def test_partly_observed_normal_gradients_and_what_is_missing_has_no_effect():
    loc, raw = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, 3, requires_grad=True)
    seen = torch.tensor([[True, False, True], [False, False, False]])

    def log_prob(loc, raw, value):
        tril = raw.tril(-1) + torch.diag_embed(raw.diagonal(dim1=-2, dim2=-1).exp())
        return PartlyObservedNormal(loc, tril, seen, validate_args=False).log_prob(value)

    y = torch.randn(2, 3)
    assert gradcheck(lambda a, b: log_prob(a, b, y), [loc, raw])
    changed = torch.where(seen, y, 1e9)
    assert_close(log_prob(loc, raw, changed), log_prob(loc, raw, y), rtol=1e-13, atol=0)
    assert log_prob(loc, raw, y)[1] == 0
    assert_close(
        torch.func.vmap(lambda v: log_prob(loc, raw, v))(torch.stack([y, 2 * y]))[1], log_prob(loc, raw, 2 * y)
    )
    d = PartlyObservedNormal(torch.zeros(2), torch.eye(2) * 3, torch.ones(2, dtype=torch.bool)).expand((4,))
    assert d.sample((5,)).shape == (5, 4, 2) and d.variance.shape == d.mean.shape == (4, 2)


def test_refused():
    with pytest.raises(SpecError, match="no covariance 'round'"):
        GaussianHMM(2, "x", "round")
    with pytest.raises(DataError, match="of vectors"):
        GaussianHMM(2, "x").log_density(
            SequenceData.from_tensors({"x": torch.zeros(3, 2, 4)}, lengths=torch.tensor([3, 3]))
        )
