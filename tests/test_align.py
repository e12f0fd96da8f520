"""Order of states: what changes is their numbers, and nothing else."""

import pytest
import torch

from symhmm.errors import DataError, GraphError
from symhmm.posterior.align import match, order_by
from symhmm.tables.states import Answers, Labelled


def test_probabilities_and_numbers_are_reordered_alike():
    order = torch.tensor([2, 0, 1])
    p = torch.rand(5, 3, generator=torch.Generator().manual_seed(0))
    states = torch.cat([p.argmax(-1)[:4], torch.tensor([-1])])
    found = Answers("x", {"p": Labelled("p", p, ("time", "state")), "z": Labelled("z", states, ("time",))})
    moved = found.reordered("p", order).reordered("z", order)
    assert torch.equal(moved["p"].values[:, 0], p[:, 2])
    assert torch.equal(moved["z"].values[:4], moved["p"].values.argmax(-1)[:4])
    assert moved["z"].values[4] == -1
    pairs = Labelled("q", p[:, :, None] * p[:, None], ("time", "from", "to")).reordered(order)
    assert torch.equal(pairs.values.diagonal(dim1=1, dim2=2), moved["p"].values.square())


def test_orders_that_are_none_are_refused():
    x = Labelled("p", torch.ones(2, 3), ("time", "state"))
    with pytest.raises(DataError, match="no order of the states"):
        x.reordered(torch.tensor([0, 0, 1]))
    with pytest.raises(DataError, match="has 3 states, the order has 2"):
        x.reordered(torch.tensor([1, 0]))
    with pytest.raises(GraphError, match="one number per state"):
        order_by({"mean": torch.zeros(2), "a": torch.zeros(2, 2)}, "a")
    with pytest.raises(GraphError, match="cannot be matched"):
        match(torch.zeros(2, 1), torch.zeros(3, 1))


def test_matching_finds_a_permutation():
    reference = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    order = torch.tensor([3, 1, 4, 0, 2])
    found = torch.empty_like(reference)
    found[order] = reference + 0.01
    assert torch.equal(match(found, reference), order)
