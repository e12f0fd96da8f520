"""Plans carried out: which torch operators they end in."""

import funsor
import pytest
import torch
from funsor.domains import Bint
from torch.testing import assert_close

from symhmm.compiler.lower import lower
from symhmm.compiler.plan import plan
from symhmm.graph import Chain, ChainVariable, Factor, FactorGraph, Plate, Variable
from symhmm.recorder import record
from symhmm.semiring import LOG, MAX
from symhmm.testing.oracle import enumerate_joint

STATES, STEPS, MEMBERS = 2, 3, 2


def hmm(initial: tuple[str, ...] = ("z_0",), seen: tuple[str, ...] = ("individual",)) -> FactorGraph:
    """Chains with a discrete effect ``c`` of each member; the first state and what is seen depend on some names more."""
    sizes = {
        "c": 2,
        "d": 2,
        "individual": MEMBERS,
        "time": STEPS,
        "z_0": STATES,
        "z_{time-1}": STATES,
        "z_{time}": STATES,
    }

    def factor(name: str, names: tuple[str, ...], frames: tuple[str, ...], role: str) -> Factor:
        data = torch.randn([sizes[n] for n in names], dtype=torch.float64)
        return Factor(name, funsor.Tensor(data, {n: Bint[sizes[n]] for n in names}), role, frames)

    frames = ("individual", "time")
    return FactorGraph(
        factors=(
            factor("c", ("c",), frames[:1], "discrete latent"),
            factor("d", ("d",), frames[:1], "discrete latent"),
            factor("z_0", initial, frames[:1], "discrete latent"),
            factor("z_{time}", ("c", "z_{time-1}", "z_{time}"), frames, "discrete latent"),
            factor("y_{time}", ("time", *seen, "z_{time}"), frames, "observed"),
        ),
        variables={
            "c": Variable(2, ("individual",)),
            "d": Variable(2, ("individual",)),
            "z_0": Variable(STATES, ("individual",)),
            "z_{time-1}": Variable(STATES, frames),
            "z_{time}": Variable(STATES, frames),
        },
        plates={"individual": Plate(MEMBERS)},
        chains={
            "time": Chain(
                "time", STEPS, 1,
                (ChainVariable(("z_0",), ("z_{time-1}",), "z_{time}", tuple(f"z_{t + 1}" for t in range(STEPS))),),
            )
        },
    ).check()  # fmt: skip


def operators(graph, strategy="auto", semiring=LOG):
    """Names of our operators in a lowered graph, in order."""
    recipe = plan(graph, strategy=strategy)
    recorded = record(lambda v, d: [lower(graph, recipe, semiring)], [], [])
    names = [str(n.target) for n in recorded.graph.nodes]
    return [n.split(".")[1] for n in names if n.startswith("symhmm.")]


@pytest.mark.parametrize(
    "initial, seen, operator",
    [
        (("z_0",), ("individual",), "chain_evidence"),
        (("c", "z_0"), ("individual",), "chain_evidence"),
        (("individual", "z_0"), ("individual",), "chain_evidence"),
        (("d", "z_0"), ("individual",), "chain_evidence"),  # the effect of the first state is summed out before
        (("z_0",), (), "chain_evidence"),
        (("individual", "z_0"), (), "chain"),  # one chain for all, whose members begin differently
    ],
)
def test_a_chain_and_its_initial_terms_are_one_operator_where_nothing_else_meets_them(initial, seen, operator):
    graph = hmm(initial, seen)
    assert operators(graph) == [operator]
    for semiring in (LOG, MAX):
        assert_close(lower(graph, plan(graph), semiring), enumerate_joint(graph, semiring), rtol=1e-10, atol=1e-10)


def test_other_strategies_and_the_max_semiring_have_operators_of_their_own():
    assert operators(hmm(), "segments") == ["chain_in_segments"]
    assert operators(hmm(), "scan") == []
    assert operators(hmm(), semiring=MAX) == ["best"]
