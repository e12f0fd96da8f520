"""States of a fit in another order and under names: the density, the posterior and every answer follow."""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

import symhmm
from symhmm.errors import FitError, GraphError
from symhmm.infer.draws import Draws
from symhmm.reorder import Moved, reordered
from symhmm.tables.results import Normal, Optima, Posterior

EXACT = {"rtol": 1e-10, "atol": 1e-10}
K = 3
Z = "z_{time}"


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def program(y, priors=False, reference=False, start=(4.0, -3.0, 0.0)):
    """K states, with values of all kinds that number them: rows and columns of a simplex, positive numbers, effects."""
    eye = torch.eye(K)
    if priors:
        table = pyro.sample("table", dist.Dirichlet(1 + 5 * eye).to_event(1))
        loc = pyro.sample("loc", dist.Normal(0.0, 5.0).expand([K]).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3).expand([K]).to_event(1))
    else:
        table = pyro.param("table", lambda: (2 * eye).softmax(-1), constraints.simplex)
        loc = pyro.param("loc", lambda: torch.tensor(start))
        scale = pyro.param("scale", lambda: torch.tensor([0.5, 1.0, 1.5]), constraints.positive)
    if reference:
        loc = torch.cat([torch.zeros(1), loc[1:]])
    z = None
    with pyro.plate("animal", y.shape[1]):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(K) / K))
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(K) / K if z is None else table[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z] + 0.1 * kind, scale[z]), obs=y[t])


@pytest.fixture(scope="module")
def y():
    generator = torch.Generator().manual_seed(1)
    states = torch.randint(K, (8, 4), generator=generator).repeat_interleave(5, 0)
    noise = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    return torch.tensor([4.0, -3.0, 0.0], dtype=torch.float64)[states] + noise


@pytest.fixture(scope="module")
def fit(y):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found = symhmm.fit(program, y, restarts=1)
    torch.set_default_dtype(before)
    return found


def test_every_answer_follows_the_order(fit):
    moved = fit.ordered(by="loc")
    order = fit.values["loc"].argsort()
    assert order.tolist() != [0, 1, 2]
    assert_close(moved.values["loc"], fit.values["loc"][order])
    assert_close(moved.values["table"], fit.values["table"][order][:, order])
    assert_close(moved.density.log_prob(moved.values), fit.density.log_prob(fit.values), **EXACT)
    assert_close(moved.estimate.vector, moved.density.pack(moved.values))
    for ask in ("smooth", "filter", "pairwise", "occupancy", "transition_counts", "viterbi", "posterior_decode"):
        before, after = getattr(fit, ask)(), getattr(moved, ask)()
        assert_close(after[Z].values, before[Z].reordered(order).values, rtol=1e-8, atol=1e-8)
        if "kind" in after:
            assert_close(after["kind"].values, before["kind"].values, rtol=1e-8, atol=1e-8)
    assert moved.ordered(by="loc").estimate is moved.estimate
    backwards = moved.ordered(by="scale").ordered(by="loc")
    assert_close(backwards.values["table"], moved.values["table"])


def test_standard_errors_follow_the_order(fit):
    moved = fit.ordered(by="loc")
    order = fit.values["loc"].argsort()
    assert_close(moved.standard_errors["loc"], fit.standard_errors["loc"][order], rtol=1e-4, atol=1e-6)


def test_states_have_names_which_stay_with_them(fit):
    named = fit.with_states("high", "low", "middle")
    assert named.smooth()[Z].labels["state"] == ("high", "low", "middle")
    assert named.smooth()["kind"].labels["state"] == (0, 1, 2)
    assert named.pairwise()[Z].labels["from"] == ("high", "low", "middle")
    moved = named.ordered(by="loc")
    assert moved.states_of(Z) == ("low", "middle", "high")
    assert_close(
        moved.smooth()[Z].sel(state="low").values, named.smooth()[Z].sel(state="low").values, rtol=1e-8, atol=1e-8
    )
    assert "state middle" in named.smooth()[Z].to_frame().columns
    both = named.with_states("a", "b", "c", site="kind")
    assert both.smooth()["kind"].labels["state"] == ("a", "b", "c")
    assert both.smooth()[Z].labels["state"] == ("high", "low", "middle")
    with pytest.raises(FitError, match="has 3 states, and needs a name of its own for each"):
        fit.with_states("one", "two")
    with pytest.raises(FitError, match="a name of its own"):
        fit.with_states("one", "two", "one")
    with pytest.raises(GraphError, match="no discrete latent 'w'"):
        fit.with_states("one", site="w")


def test_what_cannot_be_ordered_is_refused(fit, y):
    with pytest.raises(GraphError, match="'table' does not have one number per state"):
        fit.ordered(by="table")
    with pytest.raises(GraphError, match="'lok' does not have one number per state"):
        fit.ordered(by="lok")
    reference = symhmm.fit(program, y, False, True, restarts=1, max_evaluations=5)
    with pytest.raises(GraphError, match=r"(?s)cannot be moved without changing the density.*loc"):
        reference.ordered(by="loc")
    tied = symhmm.fit(program, y, restarts=1, max_evaluations=5, tie=[["scale[0]", "scale[1]"]])
    with pytest.raises(FitError, match="'scale' was fitted with tie="):
        tied.ordered(by="loc")


def posteriors(density, fit):
    """A normal posterior of all latents, and draws of it."""
    generator = torch.Generator().manual_seed(2)
    start = density.pack(fit.values)
    block = Normal((), torch.arange(density.size)[None], start[None], 0.05 * torch.eye(density.size)[None])
    normal = Posterior(start, (block,))
    chains = normal.sample(40).reshape(2, 20, -1) + 0.01 * torch.randn(2, 20, 1, generator=generator)
    return normal, Draws(chains, density.layout.entries, (0, 0), (0.1, 0.1), 3.0)


def test_draws_move_with_the_states(fit, y):
    density = symhmm.compile(program, y, True)
    order = torch.tensor([1, 2, 0])
    moves = {
        "loc": lambda x: x[order],
        "scale": lambda x: x[order],
        "table": lambda x: x.index_select(0, order).index_select(1, order),
    }
    normal, draws = posteriors(density, fit)
    for posterior in (normal, draws):
        estimate = replace(fit.estimate, posterior=posterior)
        after = reordered(estimate, density, moves)
        assert isinstance(after.posterior, Moved if posterior is normal else Draws)
        for x, moved in zip(posterior.sample(10, seed=3), after.posterior.sample(10, seed=3), strict=True):
            old, new = density.unpack(x), density.unpack(moved)
            for n, move in moves.items():
                assert_close(new[n], move(old[n]), **EXACT)
    sd = after.posterior.sd
    entry = density.layout["loc"]
    assert_close(sd[entry.start : entry.stop], draws.sd[entry.start : entry.stop][order])


def test_normal_posteriors_stay_normal_where_coordinates_are_exchanged(fit):
    normal, _ = posteriors(fit.density, fit)
    scale = fit.density.layout["scale"]
    order = torch.tensor([2, 0, 1])
    estimate = replace(fit.estimate, posterior=normal)
    after = reordered(estimate, fit.density, {"scale": lambda x: x[order]}).posterior
    assert isinstance(after, Posterior)
    assert_close(after.vector[scale.start : scale.stop], normal.vector[scale.start : scale.stop][order])
    old, new = (fit.density.unpack(p.sample(1, seed=1)[0]) for p in (normal, after))
    assert_close(new["scale"], old["scale"][order], **EXACT)
    assert_close(new["table"], old["table"], **EXACT)


def test_starts_that_differ_by_the_order_of_states_found_one_optimum(y):
    """Restarts that end at the same states in other orders have one objective, and count as one optimum."""
    fits = [symhmm.fit(program, y, False, False, start, restarts=1) for start in ((4.0, -3.0, 0.0), (0.0, 4.0, -3.0))]
    assert fits[0].values["loc"].argsort().tolist() != fits[1].values["loc"].argsort().tolist()
    optima = Optima(tuple(f.objective for f in fits), (True, True))
    assert optima.table["found"] == (2,)
    a, b = (f.ordered(by="loc").values for f in fits)
    for n in a:
        assert_close(a[n], b[n], rtol=1e-3, atol=1e-3)


def test_arviz_knows_the_names_of_states(y):
    """Values that number states, rows and columns alike, are found by the names of the states."""
    pytest.importorskip("arviz")
    fit = symhmm.fit(program, y, True, method="nuts", draws=20, tune=60, chains=1, progress=False)
    named = fit.ordered(by="loc").with_states("low", "middle", "high")
    found = named.to_arviz().posterior
    middle = named.drawn_chains(20)["table"][0, :, 1, 2]
    assert_close(torch.tensor(found["table"].sel(from_state="middle", to_state="high").values).flatten(), middle)
    loc = [float(found["loc"].sel(state=s).median()) for s in ("low", "middle", "high")]
    assert loc == sorted(loc)
