"""Forms are recognised from curvature, whatever the parameters are called, and their updates land at the maximum."""

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.infer.closed_forms import find
from symhmm.infer.expectation import expectation
from symhmm.infer.target import target


def real(n, seed=0):
    return torch.randn(n, generator=cf.generator(seed), dtype=cf.REAL)


def param(name, value, constraint=constraints.real):
    return pyro.param(name, lambda: torch.as_tensor(value, dtype=cf.REAL), constraint=constraint)


def lumps(y, emit):
    """A mixture of two with free weights; ``emit`` makes the distribution of a component."""
    weights = param("weights", [0.4, 0.6], constraints.simplex)
    fn = emit()
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", fn(z), obs=y)


def normal():
    loc, scale = param("loc", [-1.0, 1.5]), param("scale", [1.0, 2.0], constraints.positive)
    return lambda z: dist.Normal(loc[z], scale[z])


def normal_shared_scale():
    loc, scale = param("loc", [-1.0, 1.5]), param("scale", 1.3, constraints.positive)
    return lambda z: dist.Normal(loc[z], scale)


def normal_precision():
    loc, precision = param("loc", [-1.0, 1.5]), param("precision", [1.0, 2.0], constraints.positive)
    return lambda z: dist.Normal(loc[z], precision[z] ** -0.5)


def normal_known_scale():
    loc = param("loc", [-1.0, 1.5])
    return lambda z: dist.Normal(loc[z], 1.0)


def log_normal():
    loc, scale = param("loc", [-1.0, 0.5]), param("scale", [1.0, 0.7], constraints.positive)
    return lambda z: dist.LogNormal(loc[z], scale[z])


def poisson():
    rate = param("rate", [1.0, 4.0], constraints.positive)
    return lambda z: dist.Poisson(rate[z])


def poisson_log():
    rate = param("log rate", [0.2, 1.4])
    return lambda z: dist.Poisson(rate[z].exp())


def exponential():
    rate = param("rate", [1.0, 4.0], constraints.positive)
    return lambda z: dist.Exponential(rate[z])


def exponential_mean():
    mean = param("mean", [1.0, 4.0], constraints.positive)
    return lambda z: dist.Exponential(1 / mean[z])


def gamma_rate():
    rate = param("rate", [1.0, 4.0], constraints.positive)
    return lambda z: dist.Gamma(2.5, rate[z])


def weibull_scale():
    scale = param("scale", [1.0, 3.0], constraints.positive)
    return lambda z: dist.Weibull(scale[z], torch.tensor(1.7, dtype=cf.REAL))


def bernoulli():
    prob = param("prob", [0.2, 0.7], constraints.unit_interval)
    return lambda z: dist.Bernoulli(prob[z])


def bernoulli_logits():
    logits = param("logits", [-1.0, 0.7])
    return lambda z: dist.Bernoulli(logits=logits[z])


def binomial():
    prob = param("prob", [0.2, 0.7], constraints.unit_interval)
    return lambda z: dist.Binomial(5, prob[z])


def categorical():
    rows = param("rows", [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]], constraints.simplex)
    return lambda z: dist.Categorical(rows[z])


def categorical_reference():
    logits = param("logits", [[0.2, -0.3], [0.6, 0.3]])
    zero = torch.zeros(2, 1, dtype=cf.REAL)
    return lambda z: dist.Categorical(logits=torch.cat([logits, zero], 1)[z])


def gamma():
    shape, rate = param("shape", [1.0, 3.0], constraints.positive), param("rate", [1.0, 4.0], constraints.positive)
    return lambda z: dist.Gamma(shape[z], rate[z])


def beta():
    a, b = param("a", [1.5, 3.0], constraints.positive), param("b", [2.0, 4.0], constraints.positive)
    return lambda z: dist.Beta(a[z], b[z])


def von_mises():
    kappa = param("kappa", [0.5, 2.0], constraints.positive)
    return lambda z: dist.VonMises(torch.tensor(0.0, dtype=cf.REAL), kappa[z])


def softmax_without_reference():
    logits = param("logits", [[0.2, -0.3, 0.1], [0.6, 0.3, -0.2]])
    return lambda z: dist.Categorical(logits=logits[z])


COUNTS = torch.tensor([0.0, 1.0, 2.0, 4.0, 1.0, 7.0, 5.0, 3.0, 0.0, 2.0], dtype=cf.REAL)
BITS = (COUNTS > 1.5).to(cf.REAL)
THREE = COUNTS.clamp(max=2.0)

# emission, data, what is found besides the weights
CLOSED = [
    (normal, real(30), "2 scale"),
    (normal_shared_scale, real(30), "1 scale"),
    (normal_precision, real(30), "2 scale"),
    (normal_known_scale, real(30), "2 quadratic"),
    (log_normal, real(30).exp(), "2 scale"),
    (poisson, COUNTS, "2 scale"),
    (poisson_log, COUNTS, "2 scale"),
    (exponential, real(30).exp(), "2 scale"),
    (exponential_mean, real(30).exp(), "2 scale"),
    (gamma_rate, real(30).exp(), "2 scale"),
    (weibull_scale, real(30).exp(), "2 scale"),
    (bernoulli, BITS, "2 probabilities"),
    (bernoulli_logits, BITS, "2 probabilities"),
    (binomial, COUNTS.clamp(max=5.0), "2 probabilities"),
    (categorical, THREE, "4 probabilities"),
    (categorical_reference, THREE, "2 probabilities"),
]
OPEN = [
    (gamma, real(30).exp(), "2 newton"),
    (beta, real(30).sigmoid(), "2 newton"),
    (von_mises, real(30), "2 newton"),
    (softmax_without_reference, THREE, "2 newton"),
]


def looked_at(emit, y):
    goal = target(compile(lumps, y, emit), {}, "em")
    noise = np.random.default_rng(1).standard_normal(goal.size)
    at = expectation(goal, goal.x + 0.1 * noise)
    return at, find(lambda u: ((there := at.moved(u)).gradient, there.along), at.u)


def total(text):
    """The printed forms with the block of the weights counted."""
    number, kind = text.split()
    return {"1 probabilities"} | {text} if kind != "probabilities" else {f"{int(number) + 1} probabilities"}


@pytest.mark.parametrize(("emit", "y", "wanted"), CLOSED + OPEN, ids=lambda x: getattr(x, "__name__", None))
def test_recognised(emit, y, wanted):
    _, forms = looked_at(emit, y)
    assert set(repr(forms).split(", ")) == total(wanted)


@pytest.mark.parametrize(("emit", "y", "wanted"), CLOSED, ids=lambda x: getattr(x, "__name__", None))
def test_closed_update_is_the_maximum_of_the_expected(emit, y, wanted):
    at, forms = looked_at(emit, y)
    new, _ = forms.update(at.u, at.gradient, at.curvature(forms.directions()))
    there = at.moved(new)
    assert there.expected.value > at.expected.value
    assert np.abs(there.gradient).max() < 1e-9 * np.abs(at.gradient).max()


@pytest.mark.parametrize(("emit", "y", "wanted"), OPEN, ids=lambda x: getattr(x, "__name__", None))
def test_newton_steps_end_at_the_maximum_of_the_expected(emit, y, wanted):
    at, forms = looked_at(emit, y)
    first = np.abs(at.gradient).max()
    for _ in range(12):
        new, _ = forms.update(at.u, at.gradient, at.curvature(forms.directions()))
        at = at.moved(new)
    assert np.abs(at.gradient).max() < 1e-8 * first


def test_normal_update_is_the_weighted_mean_and_standard_deviation():
    y = real(30)
    at, forms = looked_at(normal, y)
    goal = at.goal
    new, _ = forms.update(at.u, at.gradient, at.curvature(forms.directions()))
    values = goal.values(goal.embed(torch.from_numpy(new)))
    here = goal.values(goal.embed(torch.from_numpy(at.u)))
    joint = here["weights"].log() + dist.Normal(here["loc"], here["scale"]).log_prob(y[:, None])
    w = joint.softmax(-1)
    mean = (w * y[:, None]).sum(0) / w.sum(0)
    sd = ((w * (y[:, None] - mean) ** 2).sum(0) / w.sum(0)).sqrt()
    torch.testing.assert_close(values["loc"], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values["scale"], sd, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(values["weights"], w.mean(0), rtol=1e-10, atol=1e-10)


def test_regression_with_its_own_spread_is_weighted_least_squares():
    x, y = torch.linspace(-1.0, 1.0, 40, dtype=cf.REAL), real(40) + torch.linspace(-2.0, 2.0, 40, dtype=cf.REAL)

    def model():
        line = param("line", [[0.1, 1.0], [-0.3, 0.5]])
        scale = param("scale", [1.0, 2.0], constraints.positive)
        with pyro.plate("n", 40):
            z = pyro.sample("z", dist.Categorical(cf.real([0.5, 0.5])))
            pyro.sample("y", dist.Normal(line[z, 0] + line[z, 1] * x, scale[z]), obs=y)

    goal = target(compile(model), {}, "em")
    at = expectation(goal, goal.x + 0.05)
    forms = find(lambda u: ((there := at.moved(u)).gradient, there.along), at.u)
    assert repr(forms) == "2 scale"
    new, _ = forms.update(at.u, at.gradient, at.curvature(forms.directions()))
    here, values = (goal.values(goal.embed(torch.from_numpy(u))) for u in (at.u, new))
    design = torch.stack([torch.ones_like(x), x], 1)
    w = dist.Normal(design @ here["line"].T, here["scale"]).log_prob(y[:, None]).softmax(-1)
    for k in range(2):
        wanted = torch.linalg.solve(design.T @ (w[:, k, None] * design), design.T @ (w[:, k] * y))
        torch.testing.assert_close(values["line"][k], wanted, rtol=1e-9, atol=1e-9)
        spread = (w[:, k] * (y - design @ wanted) ** 2).sum() / w[:, k].sum()
        assert values["scale"][k].item() == pytest.approx(spread.sqrt().item(), rel=1e-9)
