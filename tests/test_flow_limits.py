"""Without hidden states, and without chains: mixtures, mixtures of regressions and mixed models through every driver."""

import csv

import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_em import crossing, lines, lumps, touching
from torch.distributions import constraints

import symhmm


def lumps_with_priors(y):
    """Two normal components whose locations and spreads have weak priors."""
    weights = pyro.param("weights", lambda: cf.real([0.5, 0.5]), constraint=constraints.simplex)
    loc = pyro.sample("loc", dist.Normal(cf.real([-1.0, 1.0]), 10.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(cf.real([0.0, 0.0]), 2.0).to_event(1))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def lines_with_priors(xy):
    """A mixture of two regressions whose coefficients have weak priors."""
    x, y = xy
    weights = pyro.param("weights", lambda: cf.real([0.5, 0.5]), constraint=constraints.simplex)
    line = pyro.sample("line", dist.Normal(torch.zeros(2, 2, dtype=cf.REAL), 5.0).to_event(2))
    scale = pyro.param("scale", lambda: cf.real([1.0, 1.0]), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(line[z, 0] + line[z, 1] * x, scale[z]), obs=y)


DRIVERS = [
    ("mle", {}),
    ("em", {}),
    ("map", {}),
    ("svi", {"steps": 1500}),
    ("laplace", {"over": ["loc", "scale"]}),
]


@pytest.mark.parametrize(("method", "options"), DRIVERS, ids=[m for m, _ in DRIVERS])
def test_mixture(method, options):
    program = lumps if method in ("mle", "em") else lumps_with_priors
    found = symhmm.fit(program, touching(), method=method, restarts=1, start={"loc": cf.real([-1.0, 1.0])}, **options)
    assert found.status.ok, found.status
    low, high = found.values["loc"].tolist()
    assert (low, high) == pytest.approx((-1.5, 1.5), abs=0.3)
    assert found.values["scale"].tolist() == pytest.approx([1.0, 1.0], abs=0.3)
    assert found.values["weights"].tolist() == pytest.approx([1 / 3, 2 / 3], abs=0.1)


LINES = [(m, {"over": ["line"]} if m == "laplace" else o) for m, o in DRIVERS]


@pytest.mark.parametrize(("method", "options"), LINES, ids=[m for m, _ in LINES])
def test_mixture_of_regressions(method, options):
    program = lines if method in ("mle", "em") else lines_with_priors
    start = {"line": torch.tensor([[0.5, 0.5], [-0.5, -0.5]], dtype=cf.REAL)}
    found = symhmm.fit(program, crossing(), method=method, restarts=1, start=start, **options)
    assert found.status.ok, found.status
    # Where the coefficients are integrated, the components may change places.
    line = found.values["line"][found.values["line"][:, 1].argsort()]
    torch.testing.assert_close(line, torch.tensor([[-1.0, -1.0], [1.0, 2.0]], dtype=cf.REAL), rtol=0, atol=0.3)
    assert found.values["scale"].tolist() == pytest.approx([0.3, 0.3], abs=0.12)


@pytest.fixture
def sleepstudy(data_file):
    """Reaction times, shape (18 subjects, 10 days), ms."""
    with open(data_file("sleepstudy.csv")) as file:
        rows = list(csv.DictReader(file))
    subjects = list(dict.fromkeys(r["Subject"] for r in rows))
    table = torch.tensor([[float(r["Reaction"]) for r in rows if r["Subject"] == s] for s in subjects], dtype=cf.REAL)
    days = [float(r["Days"]) for r in rows if r["Subject"] == subjects[0]]
    assert days == list(range(10))
    return table


def sleep(y):
    """Reaction ~ Days + (Days given Subject), effects of a subject correlated."""
    days = torch.arange(y.shape[1], dtype=cf.REAL)
    b = pyro.param("b", lambda: cf.real([250.0, 10.0]))
    sd = pyro.param("sd", lambda: cf.real([25.0, 6.0]), constraint=constraints.positive)
    rho = pyro.param("rho", lambda: cf.real(0.0), constraint=constraints.interval(-1.0, 1.0))
    noise = pyro.param("noise", lambda: cf.real(30.0), constraint=constraints.positive)
    return days, b, sd, rho, noise


def random_slopes(y):
    days, b, sd, rho, noise = sleep(y)
    with pyro.plate("subject", len(y), dim=-1):
        u = pyro.sample("u", dist.Normal(torch.zeros(2, dtype=cf.REAL), 1.0).to_event(1))
        intercept = b[0] + sd[0] * u[..., 0]
        slope = b[1] + sd[1] * (rho * u[..., 0] + (1 - rho**2).sqrt() * u[..., 1])
        mean = intercept[..., None] + slope[..., None] * days
        pyro.sample("y", dist.Normal(mean, noise).to_event(1), obs=y)


def integrated_slopes(y):
    """The same with the effects integrated by hand."""
    days, b, sd, rho, noise = sleep(y)
    root = torch.stack([torch.stack([sd[0], 0.0 * rho]), sd[1] * torch.stack([rho, (1 - rho**2).sqrt()])])
    design = torch.stack([torch.ones_like(days), days], 1) @ root
    covariance = design @ design.T + noise**2 * torch.eye(len(days), dtype=cf.REAL)
    with pyro.plate("subject", len(y), dim=-1):
        pyro.sample("y", dist.MultivariateNormal(b[0] + b[1] * days, covariance), obs=y)


@pytest.mark.parametrize(("program", "method"), [(integrated_slopes, "mle"), (random_slopes, "laplace")])
def test_sleepstudy(sleepstudy, program, method):
    found = symhmm.fit(program, sleepstudy, method=method, restarts=1)
    assert found.status.ok, found.status
    assert found.objective == pytest.approx(-875.9697, abs=1e-3)
    assert found.values["b"].tolist() == pytest.approx([251.405, 10.467], abs=0.01)
    assert found.values["sd"].tolist() == pytest.approx([23.78, 5.717], abs=0.02)
    assert found.values["noise"].item() == pytest.approx(25.59, abs=0.01)


def test_sleepstudy_by_em_of_what_is_left(sleepstudy):
    """EM without anything hidden is one M-step after another: here Newton's, since the covariance has no closed form."""
    found = symhmm.fit(integrated_slopes, sleepstudy, method="em", restarts=1)
    assert found.objective == pytest.approx(-875.9697, abs=1e-3)


def test_likelihood_of_the_mixture_by_hand():
    y = touching()
    found = symhmm.fit(lumps, y, method="em")
    v = found.values
    joint = v["weights"].log() + dist.Normal(v["loc"], v["scale"]).log_prob(y[:, None])
    assert found.objective == pytest.approx(joint.logsumexp(1).sum().item(), abs=1e-9)
