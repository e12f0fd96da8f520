"""Steps run one by one and stacked over time give the same graph as all steps at once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from symhmm.capture.program import capture
from symhmm.graph import Recipe
from symhmm.testing import enumerate_joint

T2 = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
T3 = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.5, 0.5], [0.3, 0.7]]])
LOC = torch.tensor([-1.0, 1.0])


def first_order(y):
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(T2[z]))
        pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[t])


def second_order(y):
    a = b = torch.tensor(0)
    for t in pyro.markov(range(len(y)), history=2):
        a, b = b, pyro.sample(f"z_{t}", dist.Categorical(T3[a, b]))
        pyro.sample(f"y_{t}", dist.Normal(LOC[b], 1.0), obs=y[t])


def coupled(y):
    w = x = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        w = pyro.sample(f"w_{t}", dist.Categorical(T2[w]))
        x = pyro.sample(f"x_{t}", dist.Categorical(T3[w, x]))
        pyro.sample(f"y_{t}", dist.Normal(LOC[x], 1.0), obs=y[t])


def plate_per_step(y):
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(T2[z]))
        with pyro.plate(f"tones_{t}", 3):
            pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[t].expand(3))


@pytest.mark.parametrize("program", [first_order, second_order, coupled, plate_per_step])
def test_three_tiers_one_number(program) -> None:
    y = torch.randn(7, dtype=torch.float64)
    graphs = {tier: capture(program, (y,), recipe=Recipe(tier, 1)) for tier in ("vector", "stacked", "unrolled")}
    numbers = [enumerate_joint(g) for g in graphs.values()]
    assert_close(numbers[0], numbers[2], rtol=1e-6, atol=1e-6)
    assert_close(numbers[1], numbers[2], rtol=1e-6, atol=1e-6)
    assert not graphs["unrolled"].chains
    vector, stacked = (next(iter(graphs[t].chains.values())) for t in ("vector", "stacked"))
    assert vector.history == stacked.history
    for a, b in zip(vector.variables, stacked.variables, strict=True):
        assert (a.previous, a.current) == (b.previous, b.current)
        assert b.steps[-1] == a.steps[-1]
    assert stacked.first <= vector.first


def test_a_loop_whose_steps_differ_stays_unrolled() -> None:
    def program(y):
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(T2[z]))
            if t % 2:
                pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[t])

    graph = capture(program, (torch.randn(6),), recipe=Recipe("stacked"))
    assert not graph.chains
    assert graph.loops["time"].tier == "unrolled"


def test_looking_further_back_lengthens_the_history() -> None:
    def program(y):
        a = b = torch.tensor(0)
        for t in pyro.markov(range(len(y)), history=1):
            a, b = b, pyro.sample(f"z_{t}", dist.Categorical(T3[a, b]))

    graph = capture(program, (torch.randn(6),), recipe=Recipe("stacked"))
    assert graph.chains["time"].history == 2
    assert_close(enumerate_joint(graph), torch.zeros(()), atol=1e-6, rtol=0)
