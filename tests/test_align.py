"""Order of states: found by trying, kept by every answer, the same in all draws."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.testing import assert_close

import symhmm
from symhmm.errors import DataError, GraphError
from symhmm.posterior.align import Symmetry, aligned, match, order_by, symmetry
from symhmm.tables.states import Answers, Labelled


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def hmm(y, priors=False, reference=False, K=3):
    """K states in all of whose values the states could have other numbers, unless state 0 is a reference."""
    simplex = torch.distributions.constraints.simplex
    table = pyro.param("table", lambda: (3 * torch.eye(K)).softmax(-1), simplex)
    start = pyro.param("start", lambda: torch.ones(K) / K, simplex)
    if priors:
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0).expand([K]).to_event(1))
    else:
        loc = pyro.param("loc", lambda: torch.arange(float(K)))
    if reference:
        loc = torch.cat([torch.zeros(1), loc[1:]])
    weights = pyro.param("weights", lambda: torch.linspace(-1, 1, K))  # as many as states, but of something else
    with pyro.plate("animal", y.shape[1]):
        kind = pyro.sample("kind", dist.Categorical(logits=weights))
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0).expand([K]).to_event(1))
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else Vindex(table)[z, :]))
            mean = Vindex(loc)[z] + Vindex(shift)[..., z] + 0.3 * kind
            pyro.sample(f"y_{t}", dist.Normal(mean, 1.0), obs=y[t])


@pytest.fixture
def y():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0)) + torch.arange(3.0)


@pytest.mark.parametrize("priors", [False, True])
def test_the_dimensions_of_states_are_found_among_others_of_that_size(y, priors):
    density = symhmm.compile(hmm, y, priors)
    found = symmetry(density, "z_{time}")
    assert found.size == 3
    assert found.dims == {"table": (-2, -1), "start": (-1,), "loc": (-1,), "shift": (-1,)}
    generator = torch.Generator().manual_seed(3)
    values = density.unpack(torch.randn(density.size, generator=generator))
    order = torch.tensor([2, 0, 1])
    moved = found.moved(values, order)
    assert_close(density.log_prob(moved), density.log_prob(values), rtol=1e-12, atol=1e-10)
    assert_close(moved["table"][0, 1], values["table"][2, 0])
    assert torch.equal(moved["weights"], values["weights"])


def test_states_that_are_not_alike_are_refused(y):
    with pytest.raises(GraphError, match="cannot be moved without changing the density"):
        symmetry(symhmm.compile(hmm, y, False, True), "z_{time}")
    both = symhmm.compile(_two_chains, y)
    with pytest.raises(GraphError, match="2 discrete latents whose states could be aligned"):
        symmetry(both)
    assert symmetry(both, "b_{time}").dims == {"low": (-1,)}


def _two_chains(y):
    high = pyro.param("high", torch.tensor([1.0, 2.0]))
    low = pyro.param("low", torch.tensor([-1.0, 0.5]))
    for t in pyro.markov(range(len(y))):
        a = pyro.sample(f"a_{t}", dist.Categorical(torch.ones(2) / 2))
        b = pyro.sample(f"b_{t}", dist.Categorical(torch.ones(2) / 2))
        pyro.sample(f"y_{t}", dist.Normal(high[a] * low[b], 1.0), obs=y[t, 0])


def test_draws_that_switched_are_put_back(y):
    density = symhmm.compile(hmm, y)
    found = symmetry(density, "z_{time}")
    generator = torch.Generator().manual_seed(1)
    base = density.initial() | {"loc": torch.tensor([4.0, -2.0, 1.0])}
    draws = {n: x + 0.01 * torch.randn(40, *x.shape, generator=generator) for n, x in base.items()}
    orders = torch.stack([torch.randperm(3, generator=generator) for _ in range(40)])
    mixed = [found.moved({n: x[i] for n, x in draws.items()}, orders[i]) for i in range(40)]
    mixed = {n: torch.stack([m[n] for m in mixed]) for n in draws}
    back = aligned(mixed, found)
    first = found.moved(draws, orders[0])
    for n in draws:
        assert_close(back.draws[n], first[n])
    assert back.switched > 0
    sorted_ = aligned(mixed, found, by="loc")
    assert_close(sorted_.draws["loc"].mean(0), torch.tensor([-2.0, 1.0, 4.0]), rtol=0.0, atol=0.01)
    for i in (0, 7):
        one = {n: x[i] for n, x in sorted_.draws.items()}
        assert_close(found.moved({n: x[i] for n, x in mixed.items()}, sorted_.orders[i])["table"], one["table"])
    with pytest.raises(GraphError, match="one number per state"):
        aligned(mixed, found, by="table")


def test_a_switch_of_three_states_needs_more_than_sorting_one_value():
    """The means of two states cross; their spreads tell them apart."""
    found = Symmetry("z", 2, {"mean": (-1,), "sd": (-1,)})
    generator = torch.Generator().manual_seed(2)
    mean = 0.3 * torch.randn(200, 2, generator=generator)
    sd = torch.tensor([1.0, 5.0]) + 0.1 * torch.randn(200, 2, generator=generator)
    swap = torch.rand(200, generator=generator) < 0.5
    mixed = {n: torch.where(swap[:, None], x.flip(1), x) for n, x in {"mean": mean, "sd": sd}.items()}
    back = aligned(mixed, found, by="sd")
    assert_close(back.draws["sd"], sd)
    assert_close(back.draws["mean"], mean)


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
