"""The E-step: weights against the joint table, Fisher's identity, and zero times minus infinity."""

import closed_forms as cf
import pyro
import pyro.distributions as dist
import torch

from symhmm.compiler.density import compile
from symhmm.compiler.expected import e_step, expected_log_density
from symhmm.posterior.marginals import pairwise, smooth


def left_to_right(y):
    """A chain with moves that are impossible, in a plate."""
    loc = pyro.param("loc", cf.real([-1.0, 1.0]))
    rows = cf.real([[0.7, 0.3], [0.0, 1.0]]).log()
    with pyro.plate("n", y.shape[1], dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def data():
    return torch.randn(5, 3, generator=cf.generator(0), dtype=cf.REAL)


def test_weights_are_the_posterior_of_states_and_pairs():
    density = compile(left_to_right, data())
    values = density.initial()
    found = dict(zip((f.name for f in density.graph.factors), e_step(density, values).weights, strict=True))
    names = {f.name: list(f.inputs) for f in density.graph.factors}
    states = smooth(density, values)["z_{time}"].values  # (time, n, state)
    where = [names["y_{time}"].index(n) for n in ("time", "n", "z_{time}")]
    torch.testing.assert_close(found["y_{time}"].permute(where), states[1:], rtol=1e-10, atol=1e-12)
    # The moves are shared by all steps and sequences: their weights are expected counts.
    pairs = pairwise(density, values)["z_{time}"].values.sum((0, 1))
    where = [names["z_{time}"].index(n) for n in ("z_{time-1}", "z_{time}")]
    torch.testing.assert_close(found["z_{time}"].permute(where), pairs, rtol=1e-10, atol=1e-12)


def test_gradient_of_the_expected_is_that_of_the_log_density():
    density = compile(left_to_right, data())
    vector = density.pack({"loc": cf.real([0.3, 0.9])})
    value, gradient = density.value_and_grad(vector)
    free = vector.clone().requires_grad_()
    found = e_step(density, density.unpack(free))
    (slope,) = torch.autograd.grad(found.value, free)
    torch.testing.assert_close(found.log_density, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(slope, gradient, rtol=1e-10, atol=1e-10)


def test_what_is_impossible_counts_for_nothing():
    density = compile(left_to_right, data())
    found = e_step(density, density.initial())
    assert any(bool((f.term.data == -torch.inf).any()) for f in density.graph.factors)
    assert bool(found.value.isfinite())
    same = expected_log_density(density, density.initial(), found.weights)
    assert same.item() == found.value.item()


def test_expected_log_density_is_below_by_the_entropy_and_touches():
    # log p(y | theta) - Q(theta) - entropy is a divergence: zero at the point of the E-step, positive elsewhere.
    density = compile(left_to_right, data())
    here = e_step(density, density.initial())
    gap = here.log_density - here.value
    for shift in (-0.5, 0.2, 1.0):
        there = {"loc": density.initial()["loc"] + shift}
        rise = density.log_prob(there) - expected_log_density(density, there, here.weights)
        assert rise > gap
