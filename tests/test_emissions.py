"""Emission families: each one in a program is the distribution by hand, and starting values come near the truth."""

import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch

from symhmm import MixedHMM
from symhmm.distributions import Beta, GammaMeanSd, Hurdle, NegativeBinomialMean, VonMises, WrappedCauchy, ZeroInflated
from symhmm.errors import SpecError
from symhmm.models.emissions import FAMILIES, family
from symhmm.tables.data import SequenceData
from symhmm.tables.support import SUPPORTS

# Each family by hand, in the order of its parameters, and true values.
BY_HAND = {
    "gaussian": (lambda mean, sd: dist.Normal(mean, sd), (3.0, 0.5)),
    "gamma": (lambda mean, sd: GammaMeanSd(mean, sd), (3.0, 1.0)),
    "zero_inflated_gamma": (lambda zero, mean, sd: Hurdle(GammaMeanSd(mean, sd), zero), (0.3, 3.0, 1.0)),
    "weibull": (lambda shape, scale: dist.Weibull(scale, shape), (2.0, 3.0)),
    "zero_inflated_weibull": (lambda zero, shape, scale: Hurdle(dist.Weibull(scale, shape), zero), (0.3, 2.0, 3.0)),
    "lognormal": (lambda mean, sd: dist.LogNormal(mean, sd), (1.0, 0.5)),
    "zero_inflated_lognormal": (lambda zero, mean, sd: Hurdle(dist.LogNormal(mean, sd), zero), (0.3, 1.0, 0.5)),
    "exponential": (lambda mean: dist.Exponential(1 / mean), (3.0,)),
    "beta": (lambda alpha, beta: Beta(alpha, beta), (2.0, 5.0)),
    "zero_inflated_beta": (lambda zero, alpha, beta: Hurdle(Beta(alpha, beta), zero), (0.3, 2.0, 5.0)),
    "vonmises": (lambda mean, kappa: VonMises(mean, kappa), (0.4, 3.0)),
    "wrapped_cauchy": (lambda mean, rho: WrappedCauchy(mean, rho), (0.4, 0.6)),
    "poisson": (lambda rate: dist.Poisson(rate), (3.0,)),
    "zero_inflated_poisson": (lambda zero, rate: ZeroInflated(dist.Poisson(rate), zero), (0.3, 4.0)),
    "negative_binomial": (lambda mean, d: NegativeBinomialMean(mean, d), (3.0, 0.5)),
    "zero_inflated_negative_binomial": (
        lambda zero, mean, d: ZeroInflated(NegativeBinomialMean(mean, d), zero),
        (0.3, 4.0, 0.3),
    ),
    "bernoulli": (lambda prob: dist.Bernoulli(prob), (0.3,)),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def sample(name, n=4000):
    make, true = BY_HAND[name]
    torch.manual_seed(0)
    return make(*map(torch.tensor, true)).sample((n,))


def test_every_family_is_in_the_table_here_and_has_a_support():
    assert set(BY_HAND) | {"categorical"} == set(FAMILIES)
    assert set(FAMILIES) <= set(SUPPORTS)


@pytest.mark.parametrize("name", BY_HAND)
def test_a_family_in_a_program(name):
    """One state, no chain: the density of the model is the sum of the distribution's, at other values than the start."""
    y = sample(name, 20).reshape(10, 2)
    free = {f"y.{p.name}": "~ 1" for p in family(name, "y").parameters if p.fixed is not None}
    density = MixedHMM(1, {"y": name}, formulas=free).log_density(SequenceData.from_tensors({"y": y}))
    values = density.unpack(density.pack(density.initial()) + 0.1)
    arguments = [values[f"y.{p.name}"] for p in family(name, "y").parameters]
    torch.testing.assert_close(density.log_prob(values), BY_HAND[name][0](*arguments).log_prob(y).sum())


@pytest.mark.parametrize("name", BY_HAND)
def test_starting_values_are_near_the_truth(name):
    found = family(name, "y").start(sample(name).numpy())
    assert len(found) == len(family(name, "y").parameters)
    # Half of the zeros of zero-inflated counts go to the count itself.
    loose = {"zero_inflated_poisson": 0.6, "zero_inflated_negative_binomial": 2.5, "vonmises": 0.2, "beta": 0.15}
    for seen, wanted in zip(found, BY_HAND[name][1], strict=True):
        assert seen == pytest.approx(wanted, rel=loose.get(name, 0.15), abs=0.5 if "poisson" in name else 0.1)


@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("y", [np.array([]), np.array([0.0]), np.array([0.5, 0.5, 0.5, 0.5])])
def test_starting_values_are_inside_for_any_sample(name, y):
    """A cluster may be empty, or all alike: links of starting values are finite."""
    for p, value in zip(family(name, "y").parameters, family(name, "y").start(y), strict=True):
        assert math.isfinite(value)
        assert p.link != "log" or value > 0
        assert p.link != "logit" or 0 < value < 1


def test_names_that_come_close():
    with pytest.raises(SpecError, match=r"'gama'(.|\n)*stream 'step'(.|\n)*Try: 'gamma'"):
        family("gama", "step")
    with pytest.raises(SpecError, match=r"no parameter 'scale'(.|\n)*step.mean, step.sd"):
        family("gamma", "step").parameter("scale", "step")
    assert family("normal", "y") is family("gaussian", "y")
