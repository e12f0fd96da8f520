"""Other coordinates for random effects: against the formula, and back again."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.errors import FitError
from symhmm.infer.moving import log_density
from symhmm.infer.noncentred import noncentred, normal_effects
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


def known(at, seed=4):
    """The coordinates with a little, something and much known of the effects."""
    generator = torch.Generator().manual_seed(seed)
    information = torch.exp(3 * torch.randn(at.peak.shape, generator=generator, dtype=torch.float64))
    return at.informed(information, torch.randn(at.peak.shape, generator=generator, dtype=torch.float64))


@pytest.mark.parametrize("information", [0.0, 0.7, 50.0])
def test_forward_is_the_formula(goal, information):
    layout = goal.density.layout
    at = noncentred(goal)
    peak = random_vector(goal, 7)
    at = replace(at.informed(torch.full_like(peak, information), peak), signed=torch.zeros_like(at.signed))
    w = random_vector(goal)
    u, volume = at.forward(w)

    def part(vector, name):
        e = layout[name]
        return vector[e.start : e.stop].reshape(e.shape)

    tau, sigma, mu, h = part(w, "tau").exp(), part(w, "sigma").exp(), part(w, "mu"), information

    def effect(name, loc, scale):
        """Mean of the posterior that a normal prior and a normal likelihood have, and w of its standard deviations."""
        share = h * scale**2 / (1 + h * scale**2)
        return (1 - share) * loc + share * part(peak, name) + scale * (1 - share) ** 0.5 * part(w, name)

    a = effect("a", mu, tau)
    b = effect("b", a[..., 0], sigma)
    assert torch.allclose(part(u, "a"), a, rtol=1e-10)
    assert torch.allclose(part(u, "b"), b, rtol=1e-10)
    wanted = -3 * (tau**-2 + h).log() - 4.5 * (sigma**-2 + h).log()
    assert torch.allclose(volume, wanted, rtol=1e-10, atol=1e-10)
    assert all(torch.equal(part(u, n), part(w, n)) for n in ("mu", "tau", "sigma", "t"))


def test_where_prior_and_data_are_normal_nothing_is_left_but_a_standard_normal(goal):
    """The effects of y = b + noise of variance one, given the rest: information 1 around y."""
    e = goal.density.layout["b"]
    information, peak = torch.zeros_like(goal.start), torch.zeros_like(goal.start)
    w = random_vector(goal, 5)
    w[goal.density.layout["t"].start : goal.density.layout["t"].stop] = 0.0
    for name in ("a", "mu"):
        w[goal.density.layout[name].start : goal.density.layout[name].stop] = 0.0
    information[e.start : e.stop], peak[e.start : e.stop] = 1.0, Y.reshape(-1)
    at = noncentred(goal, ["b"]).informed(information, peak)
    _, gradient = value_and_gradient(lambda w: log_density(at, w), w)
    assert torch.allclose(gradient[e.start : e.stop], -w[e.start : e.stop], rtol=1e-8, atol=1e-9)


def test_the_volume_is_that_of_the_jacobian(goal):
    at = known(noncentred(goal))
    assert [i for i, _ in at.spreads] == [goal.density.layout[n].start for n in ("sigma", "tau")]
    w = random_vector(goal, 1)
    assert bool((w[at.signed] < 0).any())
    jacobian = torch.autograd.functional.jacobian(lambda w: at.forward(w)[0], w)
    assert torch.allclose(torch.linalg.slogdet(jacobian).logabsdet, at.forward(w)[1], rtol=1e-10)


@pytest.mark.parametrize("request_", [True, "a", ["b"], False])
def test_back_undoes_forward(goal, request_):
    at = known(noncentred(goal, request_))
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


def test_what_is_known_of_other_values_is_left_out(goal):
    at = noncentred(goal, ["b"]).informed(torch.ones_like(goal.start), torch.ones_like(goal.start))
    e = goal.density.layout["b"]
    assert torch.equal(at.information.nonzero()[:, 0], torch.arange(e.start, e.stop))
    assert torch.equal(at.peak, at.information)


def test_signs_for_spreads_that_come_near_zero(goal):
    a, b = (slice(e.start, e.stop) for e in map(goal.density.layout.__getitem__, ("a", "b")))
    tau, sigma = (goal.density.layout[n].start for n in ("tau", "sigma"))
    at = noncentred(goal).informed(torch.ones_like(goal.start), torch.zeros_like(goal.start))
    assert sorted(at.signed.nonzero()[:, 0].tolist()) == sorted([sigma, tau])
    precision = torch.ones(100, goal.start.numel(), dtype=torch.float64)
    assert not at.with_signs(precision).signed.any()
    # The spread of b is sometimes so small that the data say nothing about b.
    precision[:10, b] = 100.0
    assert at.with_signs(precision).signed.nonzero().tolist() == [[sigma]]
    precision[:10, a] = 100.0
    assert bool(at.with_signs(precision).signed[tau])


def test_a_spread_that_is_ordered_or_tied_has_no_sign():
    def model(y):
        one = torch.ones(2, dtype=y.dtype)
        sd = pyro.param("sd", one, torch.distributions.constraints.positive)
        with pyro.plate("n", len(y)):
            d = pyro.sample("d", dist.Normal(0 * one, sd).to_event(1))
            pyro.sample("y", dist.Normal(d.sum(-1), 1.0), obs=y)

    density = symhmm.compile(model, Y[0])
    assert noncentred(target(density, {}, "nuts")).signed[:2].all()
    assert not noncentred(target(density, {}, "nuts", order="sd")).signed.any()
    assert not noncentred(target(density, {}, "nuts", tie=[("sd[0]", "sd[1]")])).signed.any()


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
