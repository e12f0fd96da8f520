"""Other coordinates for random effects: against the formula, and back again."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.errors import FitError
from symhmm.infer.moving import log_density
from symhmm.infer.noncentred import Coordinates, noncentred, normal_effects
from symhmm.infer.target import target, value_and_gradient

Y = torch.tensor([[0.3, -1.2, 2.0], [1.1, 0.4, -0.6], [0.0, 2.2, 1.0]], dtype=torch.float64)


def nested(y):
    """Effects of a group, effects of its members around them, two each, and an effect that is not normal."""
    one = torch.ones((), dtype=y.dtype)
    mu = pyro.param("mu", 0.4 * torch.ones(2, dtype=y.dtype))
    tau = pyro.sample("tau", dist.HalfNormal(2 * one))
    sigma = pyro.param("sigma", one, torch.distributions.constraints.positive)
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 3, dim=-1)
    with rows:
        a = pyro.sample("a", dist.Normal(mu, tau).to_event(1))
        t = pyro.sample("t", dist.StudentT(4 * one, mu[0], tau))
    with rows, columns:
        b = pyro.sample("b", dist.Normal(a[..., 0], sigma))
        pyro.sample("y", dist.Normal(b + a[..., 1] + t, one), obs=y)


@pytest.fixture(scope="module")
def goal():
    return target(symhmm.compile(nested, Y), {}, "nuts")


def random_vector(goal, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(goal.start.shape, generator=generator, dtype=torch.float64)


def test_normal_effects_are_found_and_no_others(goal):
    assert normal_effects(goal) == ("a", "b")


@pytest.mark.parametrize("centredness", [0.0, 0.3, 1.0])
def test_forward_is_the_formula(goal, centredness):
    layout = goal.density.layout
    at = noncentred(goal)
    at = Coordinates(goal, at.names, torch.full_like(at.centred, centredness), torch.zeros_like(at.signed))
    w = random_vector(goal)
    u, volume = at.forward(w)

    def part(vector, name):
        e = layout[name]
        return vector[e.start : e.stop].reshape(e.shape)

    tau, sigma, mu = part(w, "tau").exp(), part(w, "sigma").exp(), part(w, "mu")
    c = centredness
    a = mu + tau ** (1 - c) * (part(w, "a") - c * mu)
    b = a[..., 0] + sigma ** (1 - c) * (part(w, "b") - c * a[..., 0])
    assert torch.allclose(part(u, "a"), a, rtol=1e-10)
    assert torch.allclose(part(u, "b"), b, rtol=1e-10)
    assert torch.allclose(volume, (1 - c) * (6 * tau.log() + 9 * sigma.log()), rtol=1e-10, atol=1e-10)
    assert all(torch.equal(part(u, n), part(w, n)) for n in ("mu", "tau", "sigma", "t"))


def test_the_volume_is_that_of_the_jacobian(goal):
    at = noncentred(goal)
    assert [i for i, _ in at.spreads] == [goal.density.layout[n].start for n in ("sigma", "tau")]
    w = random_vector(goal, 1)
    assert bool((w[at.signed] < 0).any())
    jacobian = torch.autograd.functional.jacobian(lambda w: at.forward(w)[0], w)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, at.forward(w)[1], rtol=1e-10)


@pytest.mark.parametrize("request_", [True, "a", ["b"], False])
def test_back_undoes_forward(goal, request_):
    at = noncentred(goal, request_)
    w = torch.where(at.signed, random_vector(goal, 2).abs(), random_vector(goal, 2))
    assert torch.allclose(at.back(at.forward(w)[0]), w, rtol=1e-10)


def test_density_and_gradient_in_the_new_coordinates(goal):
    """Against the density written out by hand, parameters with flat priors on their natural scale."""
    at = noncentred(goal)
    w = random_vector(goal, 3)

    def by_hand(w):
        layout = goal.density.layout
        x = {e.name: w[e.start : e.stop].reshape(e.shape) for e in layout.entries}
        tau, sigma = x["tau"].abs(), x["sigma"].abs()
        a = x["mu"] + tau * x["a"]
        b = a[..., 0] + sigma * x["b"]
        total = dist.HalfNormal(2.0).log_prob(tau) + dist.Normal(0.0, 1.0).log_prob(x["a"]).sum()
        total = total + dist.Normal(0.0, 1.0).log_prob(x["b"]).sum()
        total = total + dist.StudentT(4.0, x["mu"][0], tau).log_prob(x["t"]).sum()
        return total + dist.Normal(b + a[..., 1] + x["t"], 1.0).log_prob(Y).sum()

    value, gradient = value_and_gradient(lambda w: log_density(at, w), w)
    wanted, slope = value_and_gradient(by_hand, w)
    assert torch.allclose(value, wanted, rtol=1e-10)
    assert torch.allclose(gradient, slope, rtol=1e-8, atol=1e-9)


def test_informed_by_the_share_of_the_data(goal):
    """Of three parts of information from the data and one from the prior, c is three quarters."""
    at = noncentred(goal)
    a, b = (slice(e.start, e.stop) for e in map(goal.density.layout.__getitem__, ("a", "b")))
    tau, sigma = (goal.density.layout[n].start for n in ("tau", "sigma"))
    information, precision = torch.ones_like(at.centred), torch.ones(100, goal.start.numel(), dtype=torch.float64)
    information[a] = 3.0
    found = at.informed(information, precision)
    assert torch.equal(found.centred[a], torch.full((6,), 0.75, dtype=torch.float64))
    assert torch.equal(found.centred[b], torch.full((9,), 0.5, dtype=torch.float64))
    assert not found.signed.any()
    # The spread of b is sometimes so small that the data say nothing about b.
    precision[:10, b] = 100.0
    found = at.informed(information, precision)
    assert found.signed.nonzero().tolist() == [[sigma]]
    assert torch.equal(found.centred[b], torch.zeros(9, dtype=torch.float64))
    assert torch.equal(found.centred[a], torch.full((6,), 0.75, dtype=torch.float64))
    assert not found.signed[tau]


def test_what_has_no_such_form_is_named(goal):
    with pytest.raises(FitError, match=r"'t' has no non-centred form.*\n.*\n.*these are: a, b"):
        noncentred(goal, ["t"])


def test_correlated_effects_stay_as_they_are():
    def model(y):
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=y.dtype), 1.0))
        root = scale * torch.tensor([[1.0, 0.0], [0.5, 1.0]], dtype=y.dtype)
        with pyro.plate("n", len(y)):
            d = pyro.sample("d", dist.MultivariateNormal(torch.zeros(2, dtype=y.dtype), scale_tril=root))
            pyro.sample("y", dist.Normal(d.sum(-1), 1.0), obs=y)

    assert normal_effects(target(symhmm.compile(model, Y[0]), {}, "nuts")) == ()
