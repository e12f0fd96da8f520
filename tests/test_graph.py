"""Factor graphs: checked before use, printed as a table, made by hand without Pyro."""

import sys
import types

import funsor
import pytest
import torch
from funsor.domains import Bint, Real

import symhmm
from symhmm.errors import GraphError
from symhmm.graph import Factor, FactorGraph, Param, Plate, Variable


def term(**sizes):
    return funsor.Tensor(torch.zeros(tuple(sizes.values())), {n: Bint[s] for n, s in sizes.items()})


def graph(*factors, variables=None, plates=None):
    return FactorGraph(tuple(factors), variables or {}, plates or {})


@pytest.mark.parametrize(
    "bad, words",
    [
        (graph(Factor("y", term(z=2), "observed")), "reads the unknown name 'z'"),
        (graph(Factor("y", term(z=2), "observed"), variables={"z": Variable(3)}), "z: seen 2, wanted 3"),
        (graph(Factor("y", term(), "observed", ("row",))), "unknown plate 'row'"),
        (graph(Factor("y", term(), "observed"), Factor("y", term(), "observed")), "'y' is used for two things"),
        (graph(Factor("y", term(row=3), "observed"), plates={"row": Plate(3)}), "reads 'row' outside of its plate"),
        (
            graph(
                Factor("w", term(z=2), "observed"), variables={"z": Variable(2, ("row",))}, plates={"row": Plate(40)}
            ),
            "one value for each of the 40 members",
        ),
    ],
)
def test_inconsistent_graphs_are_refused(bad, words):
    with pytest.raises(GraphError) as error:
        bad.check()
    assert words in str(error.value)


def test_prints_as_a_table():
    text = repr(
        graph(
            Factor("y", term(z=2, row=3), "observed", ("row",)),
            variables={"z": Variable(2)},
            plates={"row": Plate(3, 2.0)},
        )
    )
    assert "y     observed  z:2 row:3  row" in text
    assert "plate row: 3 members, scale 2" in text


def test_hand_made_graph_with_a_real_input_compiles_and_differentiates():
    # A mixture of two normals: z ~ Bernoulli(1/2), y = 0.3 ~ Normal(mu z, 1), written with funsors alone.
    mu = funsor.Variable("mu", Real)
    z = funsor.Tensor(torch.tensor([0.0, 1.0], dtype=torch.float64), {"z": Bint[2]})
    log_half = funsor.Tensor(torch.full((2,), 0.5, dtype=torch.float64).log(), {"z": Bint[2]})
    mixture = FactorGraph(
        (Factor("z", log_half, "discrete latent"), Factor("y", (mu * z - 0.3) ** 2 * -0.5, "observed")),
        {"z": Variable(2)},
        params={"mu": Param(torch.tensor(1.0, dtype=torch.float64))},
    )
    density = symhmm.compile(mixture)
    assert density.plan.steps
    value, gradient = density.value_and_grad(torch.tensor([2.0], dtype=torch.float64))
    terms = (
        torch.tensor([-0.5 * 0.3**2, -0.5 * 1.7**2], dtype=torch.float64) - torch.tensor(2.0, dtype=torch.float64).log()
    )
    torch.testing.assert_close(value, terms.logsumexp(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient[0], terms.softmax(0)[1] * -1.7, rtol=1e-12, atol=0)


def test_jax_in_the_same_process_does_no_harm(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", types.ModuleType("jax"))
    assert term(z=2)(z=1).data == 0
