"""Regressions: published likelihoods, closed forms, sums over components, and what is refused by name."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from symhmm.errors import DataError, SpecError
from symhmm.models.regression import HierarchicalRegression, MixtureOfRegressions


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def test_sleep_study_has_the_likelihood_of_lme4(data_file):
    """Bates et al. 2015: maximum likelihood of Reaction ~ Days + (Days | Subject)."""
    frame = pd.read_csv(data_file("sleepstudy.csv"))
    fit = HierarchicalRegression("Reaction ~ Days + (Days | Subject)").fit(frame)
    assert fit.objective == pytest.approx(-875.9697, abs=1e-4) and fit.status.ok
    assert fit.values["fixed"].tolist() == pytest.approx([251.405, 10.467], abs=1e-3)
    assert fit.values["spread"].tolist() == pytest.approx([23.7806, 5.7168], abs=2e-2)
    assert fit.estimate.n_parameters == 6 and fit.aic == pytest.approx(1763.9393, abs=1e-3)
    tril = fit.values["spread"][:, None] * fit.values["corr"]
    covariance = tril @ tril.mT
    effects = fit.random_effects("Subject")
    assert effects["name"][:3] == ("308 Intercept", "308 Days", "309 Intercept") and len(effects) == 36
    # The best linear unbiased prediction for the first subject, in closed form.
    own = frame[frame.Subject == 308]
    x = torch.tensor(np.c_[np.ones(len(own)), own.Days])
    marginal = x @ covariance @ x.mT + fit.values["sd"] ** 2 * torch.eye(len(own))
    residual = torch.tensor(own.Reaction.to_numpy()) - x @ fit.values["fixed"]
    wanted = covariance @ x.mT @ torch.linalg.solve(marginal, residual)
    assert fit.values["own"][0].tolist() == pytest.approx(wanted.tolist(), abs=1e-3)
    assert fit.fixed_effects()["name"][:2] == ("Intercept", "Days") and "\nDays " in str(fit.summary())


def simulated(groups=8, rows=6, seed=0):
    g = np.random.default_rng(seed)
    own = g.normal(size=groups)
    frame = pd.DataFrame({"id": np.repeat([f"a{i}" for i in range(groups)], rows), "x": g.normal(size=groups * rows)})
    frame["y"] = 1 + 0.5 * frame.x + np.repeat(own, rows) + 0.4 * g.normal(size=groups * rows)
    return frame.sample(frac=1, random_state=1).iloc[3:]


@pytest.mark.parametrize("part", ["1 + x | id", "1 + x || id", "0 + x | id", "1 | id"])
def test_gaussian_marginal_is_that_of_scipy(part):
    frame = simulated()
    model = HierarchicalRegression(f"y ~ x + ({part})")
    fit = model.fit(frame, restarts=1)
    v, total = fit.values, 0.0
    tril = v["spread"][:, None] * v["corr"] if "corr" in v else v["spread"].diag()
    assert ("corr" in v) == (part == "1 + x | id")
    for _, own in frame.groupby("id"):
        x = torch.tensor(np.c_[np.ones(len(own)), own.x])
        z = x @ tril if len(tril) == 2 else x[:, [int("x" in part)]] * tril
        covariance = z @ z.mT + v["sd"] ** 2 * torch.eye(len(own))
        total += stats.multivariate_normal(x @ v["fixed"], covariance).logpdf(own.y)
    assert fit.objective == pytest.approx(total, abs=1e-7)


def test_poisson_effects_are_integrated(data_file):
    frame = pd.read_csv(data_file("epil.csv"))
    fit = HierarchicalRegression("y ~ trt + (1 | subject)", "poisson").fit(frame)
    assert fit.status.ok and math.isfinite(fit.objective) and 0.3 < fit.values["spread"].item() < 2


def test_kinds_of_regression_are_found_again():
    g = np.random.default_rng(0)
    x, z = g.normal(size=300), g.integers(2, size=300)
    frame = pd.DataFrame({"x": x, "y": np.where(z == 0, 1 + 2 * x, -1 - 1.5 * x) + 0.3 * g.normal(size=300)})
    model = MixtureOfRegressions(2, "y ~ x")
    fit = model.fit(frame, restarts=2)
    found = fit.values["coefficients"][fit.values["coefficients"][:, 1].argsort()]
    assert np.allclose(found, [[-1, -1.5], [1, 2]], atol=0.15)
    v, total = fit.values, torch.zeros(300)
    eta = torch.tensor(np.c_[np.ones(300), x]) @ v["coefficients"].mT
    total = torch.distributions.Normal(eta, v["sd"]).log_prob(torch.tensor(frame.y.to_numpy())[:, None])
    wanted = (total + v["weights"].log()).logsumexp(-1).sum().item()
    assert fit.objective == pytest.approx(wanted, abs=1e-9)


def test_groups_follow_one_kind():
    g = np.random.default_rng(0)
    x, z = g.normal(size=200), np.repeat(g.integers(2, size=40), 5)
    rate = np.exp(np.where(z == 0, 0.5 + 0.8 * x, 1.0 - 0.8 * x))
    frame = pd.DataFrame({"id": np.repeat(np.arange(40), 5), "x": x, "y": g.poisson(rate)})
    fit = MixtureOfRegressions(2, "y ~ x", "poisson", by="id").fit(frame, restarts=1)
    kind = fit.viterbi()["component"].values.numpy()
    right = (kind == z[::5]).mean()
    assert max(right, 1 - right) > 0.95


def test_what_is_refused_names_columns_and_rows():
    frame = simulated()
    bad = frame.assign(y=np.where(np.arange(len(frame)) == 4, np.inf, frame.y))
    for make, error, words in [
        (lambda: HierarchicalRegression("y ~ x"), SpecError, "has 0"),
        (lambda: HierarchicalRegression("~ x + (1 | id)"), SpecError, "no response"),
        (lambda: HierarchicalRegression("y ~ x + (1 | id)", "gausian"), SpecError, "'gaussian'"),
        (lambda: MixtureOfRegressions(2, "y ~ x + (1 | id)"), SpecError, "no random parts"),
        (lambda: HierarchicalRegression("z ~ x + (1 | id)").fit(frame), SpecError, "no column 'z'"),
        (lambda: HierarchicalRegression("y ~ w + (1 | id)").fit(frame), SpecError, "'w'"),
        (lambda: HierarchicalRegression("y ~ x + (1 | id)", "poisson").fit(frame), DataError, "rows .* more"),
        (lambda: HierarchicalRegression("y ~ x + (1 | id)").fit(bad), DataError, f"rows {bad.index[4]}"),
        (lambda: MixtureOfRegressions(2, "y ~ x").fit(3), SpecError, "int is not a table"),
    ]:
        with pytest.raises(error, match=words):
            make()


def test_tables_have_correlations_and_not_their_factors():
    fit = HierarchicalRegression("y ~ x + (1 + x | id)").fit(simulated(), restarts=1)
    assert fit.fixed_effects()["name"] == ("Intercept", "x", "sd", "sd of Intercept", "sd of x")
    components = fit.variance_components()
    assert components["component"] == ("sd Intercept", "sd x", "correlation Intercept, x")
    assert components["estimate"][2] == pytest.approx(float(fit.values["corr"][1, 0]), abs=1e-6)
    text = str(fit.summary())
    assert "corr[" not in text and "own[" not in text and repr(components) in text
