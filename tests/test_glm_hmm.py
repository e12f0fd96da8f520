"""GLM-HMMs: the likelihood by hand for each family, recovery of weights, and what is refused."""

import pyro.distributions as dist
import pytest
import torch

from symhmm.errors import SpecError
from symhmm.models.glm_hmm import GLMHMM, REGRESSED, weights
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def simulated(sessions=15, trials=80, seed=0):
    """A rat that looks at the stimulus in one state, and repeats itself in the other."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(trials, sessions, generator=g)
    w = torch.tensor([[0.0, 0.2], [0.5, 4.0]])
    z, y = torch.zeros(sessions, dtype=torch.long), []
    for t in range(trials):
        z = torch.where(torch.rand(sessions, generator=g) < 0.05, 1 - z, z)
        p = (w[z, 0] + w[z, 1] * x[t]).sigmoid()
        y.append((torch.rand(sessions, generator=g) < p).double())
    return SequenceData.from_tensors({"y": torch.stack(y)}, covariates={"x": x})


@pytest.mark.parametrize("family", [f for f in REGRESSED if f != "categorical"])
def test_one_state_is_a_regression(family):
    data = simulated(3, 12)
    density = GLMHMM(1, "y", "~ x", family=family).log_density(data)
    values = density.unpack(density.pack(density.initial()) + 0.2)
    b = values[f"y.{REGRESSED[family]}"][0]
    eta = b[0] + b[1] * data.covariates["x"]
    made = {
        "bernoulli": lambda: dist.Bernoulli(logits=eta),
        "gaussian": lambda: dist.Normal(eta, values["y.sd"]),
        "poisson": lambda: dist.Poisson(eta.exp()),
        "negative_binomial": lambda: dist.NegativeBinomial(
            1 / values["y.dispersion"], logits=eta + values["y.dispersion"].log()
        ),
    }[family]()
    torch.testing.assert_close(density.log_prob(values), made.log_prob(data.streams["y"]).sum(), rtol=1e-10, atol=1e-10)


def test_weights_are_recovered():
    fit = GLMHMM(["bored", "busy"], "y", "~ x").fit(simulated(), restarts=2)
    table = weights(fit)
    assert table.columns == ("state", "Intercept", "x") and table["state"] == ("bored", "busy")
    assert sorted(table["x"]) == pytest.approx([0.2, 4.0], abs=0.8)


def test_what_is_no_glm_hmm():
    with pytest.raises(SpecError, match=r"'gamma'(.|\n)*MixedHMM"):
        GLMHMM(2, "y", "~ x", family="gamma")
    with pytest.raises(SpecError, match="GLMHMM"):
        from symhmm import MixedHMM

        weights(MixedHMM(2, {"y": "bernoulli"}).fit(simulated(2, 10), restarts=1))
