"""Questions to programs: padding, tiers, forecasts, averages and errors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.testing import assert_close

import symhmm
from symhmm.capture.program import capture
from symhmm.datasets import simulate_mixed_hmm
from symhmm.errors import DataError, FitError, GraphError, ValuesError
from symhmm.graph import Recipe
from symhmm.posterior.decode import posterior_decode, sample_states, viterbi
from symhmm.posterior.forecast import predict
from symhmm.posterior.marginals import occupancy, pairwise, smooth, transition_counts
from symhmm.posterior.pointwise import log_likelihood_by
from symhmm.posterior.prefix import filtered

EXACT = {"rtol": 1e-10, "atol": 1e-10}
K = 3


def program(data, effect=False):
    logits = pyro.param("logits", lambda: -2.0 * (1 - torch.eye(K)))
    loc = pyro.param("loc", lambda: torch.arange(float(K)) * 2.0 - 2.0)
    with pyro.plate("animal", data.num_sequences):
        if effect:
            shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
            loc = loc + shift.unsqueeze(-1)
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        table = torch.stack([logits, 0.2 * logits]).softmax(-1)
        z = None
        for t in pyro.markov(range(data.num_steps)):
            p = torch.ones(K) / K if z is None else Vindex(table)[kind, z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            with pyro.poutine.mask(mask=data.mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[..., z], 1.0), obs=data.y[t])


@pytest.fixture(scope="module")
def data():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found, _ = simulate_mixed_hmm(4, 12, K, shortest=5, generator=torch.Generator().manual_seed(3))
    torch.set_default_dtype(before)
    return found


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def ask_all(density):
    v = density.initial()
    return {
        "smooth": smooth(density, v),
        "filter": filtered(density, v),
        "ahead": filtered(density, v, ahead=True),
        "pairs": pairwise(density, v),
        "occupancy": occupancy(density, v),
        "moves": transition_counts(density, v),
        "best": viterbi(density, v),
        "each": posterior_decode(density, v),
        "predict": predict(density, v, 3),
    }


def test_padded_equals_unpadded(data):
    together = ask_all(symhmm.compile(program, data))
    score = 0.0
    for n in range(data.num_sequences):
        for what, mine in ask_all(symhmm.compile(program, data.take([n]))).items():
            for site, x in mine.items():
                theirs = together[what][site].sel(animal=n)
                length = len(x.values) if x.dims[0] == "time" else None
                assert_close(theirs.values[:length] if length else theirs.values, x.values.select(
                    x.dims.index("animal"), 0), **EXACT)  # fmt: skip
                if length and what in ("best", "each"):
                    assert (theirs.values[length:] == -1).all()
                if length and theirs.valid is not None:
                    assert theirs.valid.sum() == length
            score += float(mine.log_prob) if what == "best" else 0.0
    assert score == pytest.approx(float(together["best"].log_prob), abs=1e-9)


@pytest.mark.parametrize("tier", ["stacked", "unrolled"])
@pytest.mark.filterwarnings("ignore::symhmm.errors.SymhmmWarning")
def test_the_tier_of_the_loop_makes_no_difference(data, tier):
    vector = symhmm.compile(program, data)
    other = symhmm.compile(capture(program, (data,), recipe=Recipe(tier, 1)))
    v = other.initial()
    for ask in (smooth, pairwise, viterbi, posterior_decode, occupancy, transition_counts):
        theirs = ask(other, v)
        for site, x in ask(vector, v).items():
            assert_close(theirs[site].values, x.values, **EXACT)
            assert theirs[site].dims == x.dims
    if tier == "unrolled":
        with pytest.raises(GraphError, match="left unrolled"):
            filtered(other, v)


def test_draws_agree_with_smoothing(data):
    density = symhmm.compile(program, data)
    v = density.initial()
    n = 4000
    drawn, p = sample_states(density, v, n, seed=1), smooth(density, v)
    again = sample_states(density, v, n, seed=1)
    for site, x in drawn.items():
        assert torch.equal(x.values, again[site].values)
        wanted = p[site].values
        seen = torch.stack([(x.values == k).double().mean(0) for k in range(wanted.shape[-1])], -1)
        ok = p[site].valid if p[site].valid is not None else torch.ones(wanted.shape[:-1], dtype=torch.bool)
        error = ((seen - wanted).abs() / (wanted * (1 - wanted) / n + 1e-6).sqrt())[ok]
        assert error.max() < 5


def test_terms_by_member_and_step_add_up(data):
    density = symhmm.compile(program, data)
    v = density.initial()
    members = log_likelihood_by(density, v, "animal")
    steps = log_likelihood_by(density, v, "time")
    both = log_likelihood_by(density, v, "animal", "time")
    assert_close(members.values.sum(), density.log_prob(v), **EXACT)
    assert_close(steps.values.sum(), density.log_prob(v), **EXACT)
    assert_close(both.values.sum(0), members.values, **EXACT)
    assert_close(both.values.sum(1), steps.values, **EXACT)
    assert_close(both.values[int(data.lengths[1]) :, 1].abs().max(), torch.tensor(0.0), **EXACT)
    with pytest.raises(GraphError, match="there is no plate or time axis 'whale'"):
        log_likelihood_by(density, v, "whale")


def test_a_fit_answers_with_labels(data):
    fit = symhmm.fit(program, data)
    ids = {"animal": ("ann", "bo", "cy", "di")}
    smoothed = fit.smooth().relabelled(ids)
    frame = smoothed["z_{time}"].to_frame()
    assert list(frame.columns) == ["time", "animal", "state 0", "state 1", "state 2"]
    assert len(frame) == int(data.lengths.sum())
    assert set(frame["animal"]) == set(ids["animal"])
    with pytest.raises(DataError, match="there is no animal 'eve'"):
        smoothed["kind"].sel(animal="eve")
    with pytest.raises(DataError, match="no answer has a dimension 'whale'"):
        fit.smooth().relabelled({"whale": (1, 2)})
    with pytest.raises(DataError, match="do not fit"):
        fit.smooth().relabelled({"animal": ("ann",)})
    assert fit.sample_states(5)["z_{time}"].values.shape == (5, 12, 4)
    other = data.take([1])
    direct = viterbi(symhmm.compile(program, other), fit.values)
    assert torch.equal(fit.on(other).viterbi()["z_{time}"].values, direct["z_{time}"].values)


def test_states_of_other_data_are_refused_where_effects_belong_to_members(data):
    fit = symhmm.fit(program, data, True, method="svi", steps=20, cooldown=10, restarts=1)
    other = data.take([1])
    with pytest.raises(FitError, match="'shift' belongs to the members of 'animal'"):
        fit.on(other, True)
    with pytest.raises(ValuesError, match="shift"):
        smooth(symhmm.compile(program, other, True), fit.values)
    averaged = fit.smooth(draws=3)
    assert_close(averaged["z_{time}"].values.sum(-1), torch.ones(12, 4), **EXACT)
    with pytest.raises(FitError, match="no posterior"):
        symhmm.fit(program, data).smooth(draws=3)


def test_refusals(data):
    def plain():
        loc = pyro.param("loc", torch.tensor(0.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=torch.tensor(1.0))

    def covariates(x):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            p = torch.stack([1 - x[t], x[t]])
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([p, p.flip(0)])[z]))

    with pytest.raises(GraphError, match="no discrete latents to ask about"):
        smooth(symhmm.compile(plain), {"loc": torch.tensor(0.0)})
    density = symhmm.compile(program, data)
    v = density.initial()
    with pytest.raises(GraphError, match="no discrete latent 'w'"):
        viterbi(density, v, "w")
    with pytest.raises(GraphError, match="stands in no time loop"):
        filtered(density, v, ["kind"])
    with pytest.raises(GraphError, match="change over time, and their future is not known"):
        predict(symhmm.compile(covariates, torch.tensor([0.1, 0.2, 0.3, 0.4])), {}, 2)
    with pytest.raises(GraphError, match="horizon of 0"):
        predict(density, v, 0)
    with pytest.raises(GraphError, match="nothing to draw"):
        sample_states(density, v, 0)


def test_impossible_data_are_named():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.factor("never", torch.where(z == z, -torch.inf, 0.0))

    density = symhmm.compile(model)
    for ask in (smooth, viterbi, sample_states):
        with pytest.raises(GraphError, match="no states can explain the data"):
            ask(density, {})


def test_replayed_factors_are_those_of_the_program(data):
    density = symhmm.compile(program, data, True)
    v = density.unpack(density.pack(density.initial()) + 0.3)
    for a, b in zip(density.factors_at(v).factors, density.graph_at(v).factors, strict=True):
        assert list(a.term.inputs.items()) == list(b.term.inputs.items())
        assert_close(a.term.data, b.term.data, **EXACT)


def test_likelihood_by_session_is_that_of_the_session_alone():
    moves = torch.tensor([[0.9, 0.1], [0.3, 0.7]])

    def model(y, mask):
        with pyro.plate("animal", y.shape[2], dim=-1), pyro.plate("session", y.shape[1], dim=-2):
            z = None
            for t in pyro.markov(range(len(y))):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else moves[z]))
                with pyro.poutine.mask(mask=mask[t]):
                    pyro.sample(f"y_{t}", dist.Normal(2.0 * z, 1.0), obs=y[t])

    y = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6)[:, None, None] < torch.tensor([[6, 4, 2], [3, 6, 5]])
    density = symhmm.compile(model, y, mask)
    found = log_likelihood_by(density, {}, "animal", "session")
    assert found.dims == ("animal", "session")
    for animal, session in ((0, 1), (2, 0)):
        alone = symhmm.compile(model, y[:, [session]][:, :, [animal]], mask[:, [session]][:, :, [animal]])
        assert_close(found.sel(animal=animal, session=session).values, alone.log_prob({}), **EXACT)
    assert_close(log_likelihood_by(density, {}, "session").values, found.values.sum(0), **EXACT)
    assert_close(log_likelihood_by(density, {}, "session", "time").values.sum(0), found.values.sum(0), **EXACT)


def subsampled(data, size=None):
    """The chains of `program`, of all animals or of a minibatch of them."""
    logits = pyro.param("logits", lambda: -2.0 * (1 - torch.eye(K)))
    loc = pyro.param("loc", lambda: torch.arange(float(K)) * 2.0 - 2.0)
    with pyro.plate("animal", data.num_sequences, subsample_size=size) as members:
        z = None
        for t in pyro.markov(range(data.num_steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(K) / K if z is None else logits.softmax(-1)[z]))
            with pyro.poutine.mask(mask=data.mask[t][members]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=data.y[t][members])


def test_members_of_a_minibatch_have_the_answers_that_they_have_among_all(data):
    pyro.set_rng_seed(4)
    part, whole = symhmm.compile(subsampled, data, 2), symhmm.compile(subsampled, data)
    values = whole.initial()
    members = part.graph.subsamples["animal"]
    for ask in (smooth, filtered, pairwise, viterbi, posterior_decode, occupancy, transition_counts):
        for site, x in ask(part, values).items():
            full = ask(whole, values)[site]
            at = full.dims.index("animal")
            assert x.values.shape[at] == 2
            steps = min(x.values.shape[0], full.values.shape[0])
            assert_close(x.values[:steps], full.values.index_select(at, members)[:steps], **EXACT)
    assert_close(
        log_likelihood_by(part, values, "animal").values, log_likelihood_by(whole, values, "animal").values[members]
    )
