"""Mixed models without hidden states, where Laplace's approximation is exact and other software has the numbers."""

import importlib.util
import sys
from pathlib import Path

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints

import symhmm
from symhmm.infer.laplace import laplace


def correlated(days, reaction):
    """Reaction ~ Days + (Days | Subject); shape of both (subjects, days)."""
    beta = pyro.param("beta", cf.real([250.0, 10.0]))
    tau = pyro.param("tau", cf.real([20.0, 5.0]), constraint=constraints.positive)
    root = pyro.param("root", torch.eye(2, dtype=cf.REAL), constraint=constraints.corr_cholesky)
    sd = pyro.param("sd", cf.real(25.0), constraint=constraints.positive)
    with pyro.plate("subject", len(days), dim=-1):
        b = pyro.sample("b", dist.MultivariateNormal(beta, scale_tril=tau[:, None] * root))
        with pyro.plate("day", days.shape[1], dim=-2):
            pyro.sample("reaction", dist.Normal(b[..., 0] + b[..., 1] * days.T, sd), obs=reaction.T)


def test_sleepstudy_with_correlated_effects(data_file):
    table = np.genfromtxt(data_file("sleepstudy.csv"), delimiter=",", skip_header=1)
    subjects = np.unique(table[:, 3])
    rows = np.stack([table[table[:, 3] == s][:, 1:3] for s in subjects])
    reaction, days = torch.from_numpy(rows[..., 0]), torch.from_numpy(rows[..., 1])
    fit = symhmm.fit(correlated, days, reaction, method="laplace", restarts=1)
    assert fit.status.ok
    assert fit.objective == pytest.approx(-875.9697, abs=1e-4)
    assert fit.estimate.marginal[0] == pytest.approx(fit.objective, abs=1e-6)
    # What lme4 reports for the same model by maximum likelihood.
    assert fit.values["beta"].tolist() == pytest.approx([251.405, 10.467], abs=1e-2)
    components = fit.variance_components()
    assert components["component"] == ("sd b[0]", "sd b[1]", "correlation b[0], b[1]")
    assert components["estimate"] == pytest.approx([23.781, 5.717, 0.081], abs=5e-3)
    errors = dict(zip(*(fit.fixed_effects()[c] for c in ("name", "se")), strict=True))
    assert [errors["beta[0]"], errors["beta[1]"]] == pytest.approx([6.632, 1.502], rel=1e-2)
    effects = fit.random_effects("subject")
    assert len(effects) == 36
    assert all(s > 0 for s in effects["sd"])


def crossed(y, row, column):
    """Effects of rows and of columns in a long table: (1 | row) + (1 | column)."""
    loc = pyro.param("loc", cf.real(0.5))
    tau = pyro.param("tau", cf.real([0.9, 0.6]), constraint=constraints.positive)
    with pyro.plate("row", int(row.max()) + 1):
        a = pyro.sample("a", dist.Normal(cf.real(0.0), tau[0]))
    with pyro.plate("column", int(column.max()) + 1):
        b = pyro.sample("b", dist.Normal(cf.real(0.0), tau[1]))
    with pyro.plate("entry", len(y)):
        pyro.sample("y", dist.Normal(loc + a[row] + b[column], 0.7), obs=y)


def test_crossed_effects_of_a_table_with_holes():
    generator = cf.generator(8)
    keep = torch.rand(5, 4, generator=generator) < 0.7
    row, column = keep.nonzero().unbind(1)
    row, column = torch.cat([row, torch.tensor([4])]), torch.cat([column, torch.tensor([3])])
    y = torch.randn(len(row), generator=generator, dtype=cf.REAL)

    def program(y):
        crossed(y, row, column)

    marginal = laplace(symhmm.compile(program, y))
    values = {"loc": cf.real(0.2), "tau": cf.real([1.1, 0.4])}
    same = [(k[:, None] == k).to(cf.REAL) for k in (row, column)]
    covariance = 1.1**2 * same[0] + 0.4**2 * same[1] + 0.49 * torch.eye(len(y), dtype=cf.REAL)
    wanted = MultivariateNormal(torch.full_like(y, 0.2), covariance).log_prob(y)
    assert marginal.log_prob(values).item() == pytest.approx(wanted.item(), abs=1e-7)
    modes = marginal.modes(values)
    # Conditional covariance of all nine effects, from the precision of a normal linear model.
    design = torch.cat([torch.nn.functional.one_hot(row, 5), torch.nn.functional.one_hot(column, 4)], 1).to(cf.REAL)
    precision = design.T @ design / 0.49 + torch.diag(torch.cat([torch.full((5,), 1.1), torch.full((4,), 0.4)]) ** -2.0)
    torch.testing.assert_close(modes.root[0] @ modes.root[0].T, torch.linalg.inv(precision), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_pilot_whales_with_random_intercepts(data_file, monkeypatch):
    """Twelve intercepts for each of fifteen whales, among them some whose spread is zero; other software ends at -18459.68."""
    path = Path(__file__).resolve().parents[1] / "examples" / "pilot_whales.py"
    spec = importlib.util.spec_from_file_location("pilot_whales", path)
    example = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pilot_whales", example)
    spec.loader.exec_module(example)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        fit = example.main(str(data_file("pilot_whales.csv")), 4, 1, 2, 0, intercepts=True)
    finally:
        torch.set_default_dtype(before)
    assert fit.status.ok
    assert fit.objective >= -18459.68
    assert fit.objective < -18459.0
    corrected, error = fit.estimate.marginal
    assert error < 0.2
    assert 0 < corrected - fit.objective < 2
    assert "at zero" in fit.variance_components()["remark"]
