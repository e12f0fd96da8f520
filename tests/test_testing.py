"""The oracle against sums written out by hand, and the random graphs against what they promise."""

import itertools
from random import Random

import funsor
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.testing import assert_close

from symhmm.errors import GraphError, IntractableError
from symhmm.graph import Chain, ChainVariable, Factor, FactorGraph, Plate, Variable
from symhmm.semiring import LOG, MAX
from symhmm.testing import enumerate_joint, expand_factor, largest_joint, random_graph, random_graphs


def table(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def term(data: Tensor, *names: str) -> funsor.Tensor:
    return funsor.Tensor(data, {name: funsor.Bint[size] for name, size in zip(names, data.shape, strict=True)})


def chain_graph(data_first: Tensor, data_step: Tensor, varying: bool = True) -> FactorGraph:
    states, length = len(data_first), 3
    names = ("time", "z_{time-1}", "z_{time}") if varying else ("z_{time-1}", "z_{time}")
    return FactorGraph(
        (
            Factor("z_0", term(data_first, "z_0"), "discrete latent"),
            Factor("z_{time}", term(data_step, *names), "discrete latent", ("time",)),
        ),
        {
            "z_0": Variable(states),
            "z_{time-1}": Variable(states, ("time",)),
            "z_{time}": Variable(states, ("time",)),
        },
        chains={
            "time": Chain(
                "time",
                length,
                1,
                (ChainVariable(("z_0",), ("z_{time-1}",), "z_{time}", ("z_1", "z_2", "z_3")),),
            )
        },
    ).check()


@pytest.mark.parametrize("varying", [True, False])
def test_chain_is_the_sum_over_paths(varying: bool) -> None:
    first, step = table(2), table(3, 2, 2, seed=1) if varying else table(2, 2, seed=1)
    graph = chain_graph(first, step, varying)
    paths = torch.stack(
        [
            first[path[0]] + sum((step[k] if varying else step)[path[k], path[k + 1]] for k in range(3))
            for path in itertools.product(range(2), repeat=4)
        ]
    )
    assert_close(enumerate_joint(graph, LOG), paths.logsumexp(0))
    assert_close(enumerate_joint(graph, MAX), paths.max())


def test_plate_of_a_variable_is_one_variable_per_member() -> None:
    prior, shared, own = table(2), table(3), table(3, 2, seed=2)
    graph = FactorGraph(
        (
            Factor("g", term(shared, "g"), "discrete latent"),
            Factor("z", term(prior, "z"), "discrete latent", ("animal",)),
            Factor("y", term(own, "g", "z"), "observed", ("animal",)),
        ),
        {"g": Variable(3), "z": Variable(2, ("animal",))},
        {"animal": Plate(4)},
    ).check()
    one = (prior + own).logsumexp(1)
    assert_close(enumerate_joint(graph), (shared + 4 * one).logsumexp(0))
    assert largest_joint(graph) == 3 * 2**4


def test_scale_of_a_plate_multiplies_what_leaves_it() -> None:
    prior, shared, own = table(2), table(3), table(3, 2, seed=2)
    graph = FactorGraph(
        (
            Factor("g", term(shared, "g"), "discrete latent"),
            Factor("z", term(prior, "z"), "discrete latent", ("animal",)),
            Factor("y", term(own, "g", "z"), "observed", ("animal",)),
        ),
        {"g": Variable(3), "z": Variable(2, ("animal",))},
        {"animal": Plate(2, scale=2.5)},
    ).check()
    one = (prior + own).logsumexp(1)
    assert_close(enumerate_joint(graph), (shared + 2.5 * 2 * one).logsumexp(0))


def test_scale_of_a_site_multiplies_its_summed_component() -> None:
    first, step = table(2), table(2, 2, seed=1)
    graph = chain_graph(first, step, varying=False)
    scaled = FactorGraph(
        (
            *(Factor(f.name, f.term, f.role, f.frames, 0.3) for f in graph.factors),
            Factor("free", funsor.Number(-2.0), "factor", ("animal",), 4.0),
        ),
        graph.variables,
        {"animal": Plate(3)},
        graph.chains,
    )
    assert_close(enumerate_joint(scaled), 0.3 * enumerate_joint(graph) - 4.0 * 2.0 * 3)


def test_scales_must_agree_within_a_component() -> None:
    graph = chain_graph(table(2), table(2, 2), varying=False)
    first, step = graph.factors
    wrong = FactorGraph(
        (first, Factor(step.name, step.term, step.role, step.frames, 2.0)), graph.variables, {}, graph.chains
    )
    with pytest.raises(GraphError, match="different scales"):
        enumerate_joint(wrong)


def test_impossible_joint_is_minus_infinity_with_zero_gradient() -> None:
    first = torch.full((2,), -torch.inf, dtype=torch.float64, requires_grad=True)
    total = enumerate_joint(chain_graph(first, table(2, 2), varying=False))
    total.backward()
    assert total == -torch.inf and (first.grad == 0).all()


def test_too_many_states_are_refused_by_name() -> None:
    graph = chain_graph(table(9), table(9, 9), varying=False)
    with pytest.raises(IntractableError, match=r"4 variables .* 6561 states"):
        enumerate_joint(graph, max_states=1000)


def test_variable_outside_of_its_plate_is_refused() -> None:
    factor = Factor("y", term(table(2), "z"), "observed")
    graph = FactorGraph((factor,), {"z": Variable(2, ("animal",))}, {"animal": Plate(3)})
    with pytest.raises(GraphError, match="'z' outside of its plate 'animal'"):
        enumerate_joint(graph)
    with pytest.raises(GraphError, match="unknown name 'z'"):
        list(expand_factor(factor, FactorGraph((factor,))))


@settings(max_examples=60, deadline=None)
@given(graph=random_graphs(max_joint=400))
def test_random_graphs_are_consistent_and_small(graph: FactorGraph) -> None:
    assert graph.check() is graph
    assert largest_joint(graph) <= 400
    assert enumerate_joint(graph, MAX) <= enumerate_joint(graph, LOG) + 1e-12 or any(
        plate.scale != 1 for plate in graph.plates.values()
    )


def test_random_graphs_cover_the_features() -> None:
    graphs = [random_graph(Random(seed)) for seed in range(150)]
    chains = [chain for graph in graphs for chain in graph.chains.values()]
    assert {chain.history for chain in chains} == {1, 2}
    assert {len(chain.variables) for chain in chains} == {1, 2}
    assert any(len(graph.chains) == 2 for graph in graphs)
    assert any(plate.scale != 1 for graph in graphs for plate in graph.plates.values())
    assert any("time" in f.frames and len(f.frames) > 2 for graph in graphs for f in graph.factors)
    assert any(f.frames and set(f.frames).isdisjoint(f.inputs) for graph in graphs for f in graph.factors)
    assert any(f.term.data.isinf().any() for graph in graphs for f in graph.factors)
