"""Simulation from fitted values: right shapes, right moments, and nothing left behind."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.simulate import simulate


def program(y):
    spread = pyro.param("spread", torch.tensor(2.0))
    loc = pyro.param("loc", torch.tensor([-3.0, 3.0]))
    with pyro.plate("animal", y.shape[-1]):
        shift = pyro.sample("shift", dist.Normal(0.0, spread))
        z = None
        for t in pyro.markov(range(len(y))):
            p = torch.tensor([0.5, 0.5]) if z is None else torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"y_{t}", dist.Normal(loc[z] + shift, 0.1), obs=y[t])


@pytest.fixture
def density():
    return symhmm.compile(program, torch.zeros(30, 4))


def test_states_and_data_belong_together(density):
    values = density.initial() | {"shift": torch.tensor([0.0, 1.0, 2.0, 3.0])}
    before = torch.get_rng_state()
    found = simulate(density, values, 5, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert not list(pyro.get_param_store().keys())
    y, z = found["y_{time}"], found["z_{time}"]
    assert y.dims == z.dims == ("draw", "time", "animal")
    assert y.values.shape == (5, 30, 4)
    expected = values["loc"][z.values] + values["shift"]
    assert (y.values - expected).abs().max() < 1.0
    moves = (z.values[:, 1:] != z.values[:, :-1]).double().mean()
    assert 0.05 < moves < 0.25
    again = simulate(density, values, 5, seed=1)
    assert torch.equal(again["y_{time}"].values, y.values)


def test_new_members_have_new_effects(density):
    values = density.initial() | {"shift": torch.full((4,), 100.0)}
    same = simulate(density, values, 3)["y_{time}"].values
    other = simulate(density, values, 3, new_members=True)["y_{time}"].values
    assert same.min() > 50
    assert other.abs().max() < 20


def test_a_factor_graph_cannot_be_simulated():
    with pytest.raises(GraphError, match="knows no distributions"):
        simulate(symhmm.compile(FactorGraph(())), {})
