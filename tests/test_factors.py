"""Records written down as a graph: names, frames, chains and what holds for each step."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.testing import assert_close

from symhmm.capture.factors import factor_graph
from symhmm.capture.loops import Loop
from symhmm.capture.names import Names
from symhmm.capture.program import capture
from symhmm.capture.records import Record, Result
from symhmm.capture.time_index import NotVectorisable
from symhmm.graph import Recipe

MOVES = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


def program(y):
    pyro.deterministic("twice", 2 * pyro.param("loc", torch.tensor(1.0)))
    with pyro.plate("animal", 3, dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(MOVES)[z]))
            with pyro.poutine.scale(scale=2.0):
                pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])


def test_tokens_become_templates_and_steps_are_listed():
    graph = capture(program, (torch.zeros(6, 3),))
    assert [f.name for f in graph.factors] == ["z_0", "y_0", "z_{time}", "y_{time}"]
    (v,) = graph.chains["time"].variables
    assert (v.initial, v.previous, v.current) == (("z_0",), ("z_{time-1}",), "z_{time}")
    assert v.steps == tuple(f"z_{t}" for t in range(1, 6))
    assert (graph.chains["time"].length, graph.chains["time"].first) == (5, 1)
    assert graph.variables["z_{time-1}"].site == "z_{time}" and graph.variables["z_{time}"].support.tolist() == [0, 1]
    assert set(graph.observed["y_{time}"].frames) == {"animal", "time"}
    assert graph.loops["time"].tier == "vector" and set(graph.plates) == {"animal"}
    assert float(graph.deterministic["twice"]) == 2.0


def test_factors_keep_their_scale_and_the_inputs_they_depend_on():
    y = torch.arange(18.0).reshape(6, 3)
    factors = {f.name: f for f in capture(program, (y,)).factors}
    emission, moves = factors["y_{time}"], factors["z_{time}"]
    assert emission.scale == 2.0 and moves.scale == 1.0
    # The same for all steps and members: stored once.
    assert set(moves.term.inputs) == {"z_{time-1}", "z_{time}"} and set(moves.frames) == {"animal", "time"}
    at = [list(emission.term.inputs).index(n) for n in ("time", "z_{time}", "animal")]
    each = dist.Normal(torch.tensor([[0.0], [1.0]]), 1.0).log_prob(y[1:].unsqueeze(1))
    assert_close(emission.term.data.permute(at), each)


def record(name, steps, size=2):
    support = torch.arange(size)
    return Record(name, "discrete latent", torch.zeros(size), (name,), (), ("loop",), steps, support=support)


@pytest.mark.parametrize(
    ("before", "sizes", "fits"), [(True, (2, 2), True), (True, (2, 3), False), (False, (2, 2), False)]
)
def test_latents_that_differ_between_steps_are_no_chain(before, sizes, fits):
    """Records by hand: each state must be there, with one size, at all steps."""
    names = Names()
    now, last = names.text("loop", ("1", "2"), 0), names.text("loop", ("0", "1"), -1)
    rows = [record("z_0", (("loop", "init", 0),), sizes[0])]
    rows += [record(f"z_{last}", (("loop", "prev", 1),))] if before else []
    rows += [record(f"z_{now}", (("loop", "curr", 0),), sizes[1])]
    loop = Loop("loop", "here:1", 3, 1, 1, (), True)
    result = Result(names, {"loop": loop}, {r.name: r for r in rows})
    if fits:
        assert factor_graph(result, Recipe("vector")).chains["time"].variables[0].steps == ("z_1", "z_2")
    else:
        with pytest.raises(NotVectorisable, match="differ between its steps"):
            factor_graph(result, Recipe("vector"))
