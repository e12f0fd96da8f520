"""Densities of streams: single values are no part of the curves, and both together are the whole distribution."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import symhmm
from symhmm.densities import emission_curves, shares_of, the_chain, the_data
from symhmm.distributions import ZeroInflated, ZeroOneInflated
from symhmm.errors import FitError
from symhmm.tables.data import SequenceData

STAY = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
ZERO, EDGE = (torch.tensor(x, dtype=torch.float64) for x in ([0.5, 0.1], [0.2, 0.6]))


def program(data):
    rate = pyro.param("rate", torch.tensor([2.0, 0.5], dtype=torch.float64), constraints.positive)
    with pyro.plate("animal", data.num_sequences, dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(data.num_steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(STAY)[z]))
            with pyro.poutine.mask(mask=data.mask[t]):
                pyro.sample(f"step_{t}", ZeroInflated(dist.Exponential(rate[z]), ZERO[z]), obs=data["step"][t])
                own = ZeroOneInflated(dist.Beta(torch.full_like(rate, 2.0)[z], 2.0), EDGE[z], 0.25)
                pyro.sample(f"part_{t}", own, obs=data["part"][t])


@pytest.fixture(scope="module")
def fit():
    generator = torch.Generator().manual_seed(0)
    step, part = (torch.rand(40, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    step = torch.where(step < 0.3, 0.0, 4 * step)
    part = torch.where(part < 0.2, 0.0, torch.where(part > 0.9, 1.0, part))
    both = torch.stack([step, part], -1)
    data = SequenceData.from_tensors({"step": step, "part": part, "both": both}, lengths=[40, 30, 20])
    return symhmm.fit(program, data, restarts=1, max_evaluations=5)


def spent(fit):
    """Share of the time in each state, of the steps on the time axis."""
    p, seen = fit.smooth()["z_{time}"].values[1:], fit.data.mask[1:]
    weight = (p * seen[..., None]).sum((0, 1))
    return (weight / weight.sum()).numpy()


def test_single_values_have_the_probabilities_of_the_states_weighted_by_time(fit):
    weight = spent(fit)
    curves = emission_curves(fit, "step")
    assert curves.atoms.tolist() == [0.0] and not curves.discrete
    np.testing.assert_allclose(curves.shares, [weight * ZERO.numpy()], rtol=1e-10)
    both = emission_curves(fit, "part")
    assert both.atoms.tolist() == [0.0, 1.0]
    np.testing.assert_allclose(both.shares, [weight * EDGE.numpy() * 0.75, weight * EDGE.numpy() * 0.25], rtol=1e-10)


def test_curves_are_the_rest(fit):
    weight = spent(fit)
    curves = emission_curves(fit, "step")
    rate = fit.values["rate"].numpy()
    wanted = weight * (1 - ZERO.numpy()) * rate * np.exp(-rate * curves.at[:, None])
    np.testing.assert_allclose(curves.density, wanted, rtol=1e-10)
    both = emission_curves(fit, "part")
    inside = np.trapezoid(both.density.sum(1), both.at)
    assert inside + both.shares.sum() == pytest.approx(1.0, abs=0.01)


def test_what_has_no_curve_is_said(fit):
    assert the_chain(fit) == "z_{time}" and list(the_data(fit).streams) == ["step", "part", "both"]
    with pytest.raises(FitError, match="'both' is of vectors"):
        emission_curves(fit, "both")
    with pytest.raises(FitError, match="'other' is no argument"):
        emission_curves(fit, "other")


def test_shares_count_exact_values():
    assert shares_of(torch.tensor([1.0, 1.0, 0.999, 0.0]), np.array([1.0, 0.0, 3.0])).tolist() == [0.5, 0.25, 0.0]
