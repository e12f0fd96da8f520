"""Parameters, latents and subsamples get their values: the caller's, the program's own, and one per step in a loop."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

from symhmm.capture.giving import Giver
from symhmm.capture.inputs import Inputs
from symhmm.capture.program import capture
from symhmm.capture.records import Result
from symhmm.capture.time_index import Level, NotVectorisable, TimeIndex
from symhmm.capture.tracking import Position, Tracker
from symhmm.errors import ProgramError


def giver(values=None):
    position = Position()
    result = Result(position.names, {})
    return Giver(position, Tracker(position, fresh=False), Inputs(values, None), result), position, result


def asked(name, *init, **kwargs):
    return {"name": name, "args": (name, *init), "kwargs": kwargs, "cond_indep_stack": ()}


def test_a_parameter_has_the_value_given_or_its_own():
    give, _, result = giver({"a": torch.tensor(3.0)})
    for name, wanted in (("a", 3.0), ("b", 2.0)):
        msg = asked(name, torch.tensor(2.0), constraint=constraints.positive)
        give.param(msg)
        assert msg["done"] and msg["value"] == wanted
    assert {n: (float(p.value), p.constraint) for n, p in result.params.items()} == {
        "a": (3.0, constraints.positive),
        "b": (2.0, constraints.positive),
    }
    with pytest.raises(ProgramError, match="'c' has no initial value"):
        give.param(asked("c"))


def test_initial_values_that_are_functions_run_once():
    give, calls = giver()[0], []
    for _ in range(2):
        give.param(asked("a", lambda: calls.append(1) or torch.tensor(1.5)))
    assert calls == [1]


def test_names_stand_for_one_site_per_step_of_the_innermost_loop():
    give, position, result = giver()
    level = Level("loop", 3, 1, position.names, position.run)
    level.lag = 0
    with level.active():
        position.levels.append(level)
        t = TimeIndex(level, (1, 2, 3), (1, 2, 3))
        assert give.step_names("a") == ["a"]
        assert give.step_names(f"a_{t}") == ["a_1", "a_2", "a_3"]
        other = position.names.text("outer", ("7", "8"), 0)
        with pytest.raises(NotVectorisable, match="depends on several loops"):
            give.step_names(f"a_{t}_{other}")
        msg = asked(f"a_{t}", torch.tensor([1.0, 2.0]))
        give.param(msg)
        assert level.unbatch(msg["value"]).tolist() == [[1.0, 2.0]] * 3
        position.levels.remove(level)
    assert sorted(result.params) == ["a_1", "a_2", "a_3"]


def test_latents_of_a_loop_are_given_step_by_step():
    def program(y):
        scale = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
        for t in pyro.markov(range(5)):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.5))
            x = pyro.sample(f"x_{t}", dist.Normal(10 * scale[t], 1.0))
            pyro.sample(f"y_{t}", dist.Normal(x + z, 1.0), obs=y[t])

    graph = capture(program, (torch.zeros(5),))
    assert {n: float(x.value) for n, x in graph.latents.items()} == {f"x_{t}": 10.0 * (t + 1) for t in range(5)}
    given = {f"x_{t}": torch.tensor(float(t)) for t in range(5)}
    factors = {f.name: f.term for f in capture(program, (torch.zeros(5),), values=given).factors}
    x, wanted = factors["x_{time}"].data, dist.Normal(10.0 * torch.arange(2.0, 6), 1.0).log_prob(torch.arange(1.0, 5))
    assert_close(x.reshape(-1), wanted)


def test_latents_of_a_subsampled_plate_are_those_of_all_members():
    def program():
        with pyro.plate("animal", 6, subsample_size=2) as i:
            own = pyro.sample("own", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(own, 1.0), obs=10.0 * i)

    chosen = torch.tensor([4, 1])
    given = {"own": torch.arange(6.0)}
    graph = capture(program, (), values=given, subsamples={"animal": chosen})
    assert torch.equal(graph.subsamples["animal"], chosen) and graph.latents["own"].value.shape == (6,)
    factors = {f.name: f.term.data for f in graph.factors}
    assert_close(factors["own"].reshape(-1), dist.Normal(0.0, 1.0).log_prob(torch.tensor([4.0, 1.0])))
    assert_close(
        factors["y"].reshape(-1), dist.Normal(torch.tensor([4.0, 1.0]), 1.0).log_prob(torch.tensor([40.0, 10.0]))
    )


def test_networks_use_the_values_that_are_given():
    network = torch.nn.Linear(1, 1)

    def program(x):
        pyro.module("network", network)
        pyro.sample("y", dist.Normal(network(x), 1.0), obs=torch.zeros(1))

    given = {"network$$$weight": torch.tensor([[2.0]]), "network$$$bias": torch.tensor([1.0])}
    graph = capture(program, (torch.tensor([3.0]),), values=given)
    (factor,) = graph.factors
    assert_close(factor.term.data.reshape(()), dist.Normal(7.0, 1.0).log_prob(torch.tensor(0.0)))
    assert set(graph.params) == set(given)
