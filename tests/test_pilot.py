"""The pilot: coordinates in which a posterior that can be written down is round, and where chains may start."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.infer.moving import Moving
from symhmm.infer.noncentred import noncentred
from symhmm.infer.pilot import effects, pilot, starting_point
from symhmm.infer.target import target
from symhmm.infer.whiten import Whitening

pytest.importorskip("nutpie")
NOISE = 0.5
Y = torch.tensor([[1.0, 1.4, 0.8], [-0.3, 0.1, 0.4], [2.0, 2.2, 2.9], [0.5, 0.7, -0.2]], dtype=torch.float64)


def groups(y):
    """Groups of three around a common mean with an unknown spread; of the fourth nothing was seen."""
    one = torch.ones((), dtype=y.dtype)
    mu = pyro.sample("mu", dist.Normal(0 * one, 2 * one))
    sd = pyro.sample("sd", dist.HalfNormal(one))
    seen = torch.tensor([True, True, True, False])[:, None]
    with pyro.plate("group", 4, dim=-2):
        d = pyro.sample("d", dist.Normal(mu, sd))
        with pyro.plate("unit", 3, dim=-1), pyro.poutine.mask(mask=seen):
            pyro.sample("y", dist.Normal(d, NOISE * one), obs=y)


@pytest.fixture(scope="module")
def goal():
    return target(symhmm.compile(groups, Y), {}, "nuts")


def found(goal, request):
    options = {"seed": 1, "restarts": 1, "target_accept": 0.7, "max_depth": 8, "native": False}
    return pilot(goal, request, tick=lambda: None, **options)


def test_what_the_data_say_of_effects_is_found(goal):
    """A normal likelihood of three values: precision 3 / noise^2 around their mean; nothing of the group not seen."""
    ground = found(goal, "auto")
    e = goal.density.layout["d"]
    information, peak = (x[e.start : e.stop] for x in (ground.coordinates.information, ground.coordinates.peak))
    assert torch.allclose(information[:3], torch.full((3,), 3 / NOISE**2, dtype=torch.float64), rtol=1e-5)
    assert torch.allclose(peak[:3], Y[:3].mean(1), rtol=1e-5)
    assert information[3] == peak[3] == 0


def test_effects_are_standard_normal_given_the_rest(goal):
    """Before any whitening: their slope is minus themselves, wherever mean and spread are."""
    ground = found(goal, "auto")
    e = goal.density.layout["d"]
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=goal.size)
        assert np.allclose(ground.evaluate(x)[1][e.start : e.stop], -x[e.start : e.stop], rtol=1e-4, atol=1e-4)


def test_on_request_nothing_is_asked_of_the_data(goal):
    ground = found(goal, True)
    assert ground.coordinates.names == ("d",)
    assert not ground.coordinates.information.any()


def test_positions_of_effects_among_what_moves(goal):
    start = goal.density.layout["d"].start
    assert [b.tolist() for b in effects(goal)] == [[[start + i] for i in range(4)]]
    held = target(goal.density, {"mu": 0.0}, "nuts")
    assert [b.tolist() for b in effects(held)] == [[[start - 1 + i] for i in range(4)]]


def test_a_start_is_drawn_nearer_where_the_density_is_not_finite(goal):
    evaluate = Moving(goal, noncentred(goal), native=False)
    where = Whitening(np.zeros(goal.size), np.ones(goal.size))

    def nowhere(x):
        return -np.inf, np.zeros_like(x)

    def near(x):
        return evaluate(x) if np.abs(x).max() < 0.1 else nowhere(x)

    assert np.abs(starting_point(near, where, np.random.default_rng(0), 1.5)).max() < 0.1
    assert starting_point(nowhere, where, np.random.default_rng(0), 1.5) is None
