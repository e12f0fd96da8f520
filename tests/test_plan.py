"""Plans: decided from names alone, printed before anything runs, refused before anything runs."""

import funsor
import pytest
import torch
from funsor.domains import Bint

from symhmm.compiler.plan import choose_strategy, plan
from symhmm.compiler.steps import ChainContract, Contract, PlateProduct
from symhmm.errors import GraphError, IntractableError
from symhmm.graph import Chain, ChainVariable, Factor, FactorGraph, Plate, Variable


def term(**sizes):
    return funsor.Tensor(torch.zeros(tuple(sizes.values())), {n: Bint[s] for n, s in sizes.items()})


def hmm(states=3, length=50, individuals=4, shared=True):
    """A hidden Markov model in a plate with a discrete random effect ``c``, captured from step 1."""
    frames = ("individual", "time")
    z = {"z_{time-1}": states, "z_{time}": states}
    steps = tuple(f"z_{t + 1}" for t in range(length))
    transition = term(c=2, **z) if shared else term(c=2, time=length, **z)
    return FactorGraph(
        factors=(
            Factor("c", term(c=2), "discrete latent", ("individual",)),
            Factor("z_0", term(z_0=states), "discrete latent", ("individual",)),
            Factor("z_{time}", transition, "discrete latent", frames),
            Factor("y_{time}", term(**{"time": length, "individual": individuals, "z_{time}": states}), "observed", frames),
        ),
        variables={
            "c": Variable(2, ("individual",)),
            "z_0": Variable(states, ("individual",)),
            "z_{time-1}": Variable(states, frames),
            "z_{time}": Variable(states, frames),
        },
        plates={"individual": Plate(individuals)},
        chains={"time": Chain("time", length, 1, (ChainVariable(("z_0",), ("z_{time-1}",), "z_{time}", steps),))},
    ).check()  # fmt: skip


def test_a_chain_is_one_step_and_keeps_what_is_shared_shared():
    chosen = plan(hmm())
    chain = next(s for s in chosen.steps if isinstance(s, ChainContract))
    assert chain.batch == ("c", "individual")
    assert (chain.length, chain.history, chain.current) == (50, 1, ("z_{time}",))
    assert chain.result.inputs == {"c": 2, "individual": 4, "z_0": 3}
    assert chain.flops == 2 * 4 * 50 * 9
    # Messages of 8 rows, and two constant transition matrices: nothing is expanded over time or individuals.
    assert chain.elements == 8 * 50 * 3 + 2 * 9
    kinds = [type(s) for s in chosen.steps]
    assert kinds.index(ChainContract) < kinds.index(Contract) < kinds.index(PlateProduct)


def test_the_plan_reads_no_tensor():
    graph = hmm()
    poisoned = [Factor(f.name, _Untouchable(f), f.role, f.frames) for f in graph.factors]
    again = plan(FactorGraph(tuple(poisoned), graph.variables, graph.plates, graph.chains))
    assert again == plan(graph)


class _Untouchable:
    """Has the inputs of a funsor and nothing else."""

    def __init__(self, factor):
        self.inputs = factor.term.inputs


def test_printed_plan_says_what_and_why():
    text = repr(plan(hmm()))
    assert "z_{time} along time (kernel)" in text and "8 rows x 50 steps x 3 states" in text and "KiB" in text


def test_forced_strategy_and_unknown_strategy():
    assert "asked for" in repr(plan(hmm(), strategy="scan"))
    with pytest.raises(GraphError, match="unknown chain strategy 'magic'"):
        plan(hmm(), strategy="magic")


def test_memory_limit_is_checked_before_any_work():
    with pytest.raises(IntractableError) as error:
        plan(hmm(states=200, length=10_000, shared=False), memory_limit=1e6)
    assert "z_{time} along time" in str(error.value) and "the limit is" in str(error.value)


def test_crossed_plates_are_refused_with_the_number_of_states():
    graph = FactorGraph(
        (
            Factor("a", term(a=2), "discrete latent", ("row",)),
            Factor("b", term(b=3), "discrete latent", ("column",)),
            Factor("y", term(a=2, b=3, row=5, column=4), "observed", ("row", "column")),
        ),
        {"a": Variable(2, ("row",)), "b": Variable(3, ("column",))},
        {"row": Plate(5), "column": Plate(4)},
    ).check()
    with pytest.raises(IntractableError) as error:
        plan(graph)
    for words in ("cannot sum", "[site 'y']", "joint states", "Try:", "'row'", "'column'"):
        assert words in str(error.value)


def test_a_chain_shared_by_a_plate_of_chains_is_refused():
    frames, shared = ("time", "individual"), ("time",)
    z = {"z_{time-1}": 2, "z_{time}": 2}
    names = tuple(f"z_{t}" for t in range(1, 9))
    graph = FactorGraph(
        (
            Factor("w_{time}", term(**{"w_{time-1}": 2, "w_{time}": 2}), "discrete latent", shared),
            Factor("z_{time}", term(**z, **{"w_{time}": 2}), "discrete latent", frames),
        ),
        {n: Variable(2, frames) for n in z} | {n: Variable(2, shared) for n in ("w_{time-1}", "w_{time}")}
        | {"z_0": Variable(2, ("individual",)), "w_0": Variable(2)},
        {"individual": Plate(3)},
        {"time": Chain("time", 8, 1, (ChainVariable(("z_0",), ("z_{time-1}",), "z_{time}", names),
                                      ChainVariable(("w_0",), ("w_{time-1}",), "w_{time}", names)))},
    ).check()  # fmt: skip
    with pytest.raises(IntractableError, match=r"cannot sum .z_\{time\}."):
        plan(graph)


def test_kept_plate_needs_independent_members():
    graph = FactorGraph(
        (
            Factor("w", term(w=2), "discrete latent"),
            Factor("y", term(w=2, row=5), "observed", ("row",)),
        ),
        {"w": Variable(2)},
        {"row": Plate(5)},
    ).check()
    assert plan(graph).outputs
    with pytest.raises(IntractableError, match="'w'"):
        plan(graph, keep=["row"])
    with pytest.raises(GraphError, match="there is no plate 'rwo'"):
        plan(graph, keep=["rwo"])


def test_different_scales_of_connected_sites_are_refused():
    graph = FactorGraph(
        (Factor("w", term(w=2), "discrete latent"), Factor("y", term(w=2), "observed", scale=0.5)), {"w": Variable(2)}
    ).check()
    with pytest.raises(GraphError, match="different poutine"):
        plan(graph)


def test_chains_whose_messages_outgrow_memory_make_them_again():
    strategy, why, kept = choose_strategy("auto", 50, 1_000_000, 8, 1)
    assert strategy == "segments" and "2.98 GiB" in why and kept < 50 * 1_000_000 * 8
    assert choose_strategy("auto", 50, 1_000, 8, 1)[0] == "kernel"
    assert choose_strategy("kernel", 50, 1_000_000, 8, 1)[0] == "kernel"
    few = "a list of the possible moves if they are few"
    assert few in choose_strategy("auto", 4, 100, 60, 1)[1] and few not in choose_strategy("auto", 4, 100, 8, 1)[1]
