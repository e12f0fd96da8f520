"""Formulas against the forward algorithm written out by hand: values and gradients, for every place a formula can stand."""

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import symhmm
from symhmm import MixedHMM
from symhmm.distributions import GammaMeanSd, VonMises, stationary_distribution, with_zero_diagonal
from symhmm.errors import DataError, FitError, SpecError
from symhmm.posterior.marginals import smooth
from symhmm.tables.data import Labels, SequenceData

T, N, S = 7, 5, 2
IDS = ("ann", "bo", "cy", "di", "eli")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def tensors(sessions=False, seed=0):
    """Ragged sequences with missing values, a covariate x, one w that is constant in time, a herd and a year."""
    g = torch.Generator().manual_seed(seed)
    shape = (T, S, N) if sessions else (T, N)
    step = torch.rand(shape, generator=g) * 3 + 0.1
    step[2, ..., 1] = math.nan
    lengths = torch.randint(3, T + 1, shape[1:], generator=g)
    lengths[..., 0] = T
    if sessions:
        lengths[1, 3] = 0
    angle, count = (torch.rand(shape, generator=g) - 0.5) * 6, torch.poisson(step.nan_to_num() + 1, generator=g)
    return SequenceData.from_tensors(
        {"step": step, "angle": angle, "n": count},
        lengths=lengths,
        covariates={
            "x": torch.randn(shape, generator=g),
            "w": torch.randn(shape[1:], generator=g).expand(shape).contiguous(),
            "year": torch.randint(0, 3, shape, generator=g),
        },
        groups={"herd": torch.tensor([0, 1, 1, 0, 2])},
        levels={"year": (2001, 2002, 2003), "herd": ("north", "south", "west")},
        labels=Labels(
            IDS, id="ID", session="trip" if sessions else "",
            sessions=np.array([["a"] * N, ["b"] * N], dtype=object) if sessions else None,
        ),
    )  # fmt: skip


def forward(initial, logits, emission, inside):
    """Log-likelihood of all sequences, one step after the other.

    Args:
        initial: shape (..., K), log-probabilities; logits: function of t, shape (..., K, K); emission: shape (T, ..., K).
    """
    alpha = initial + torch.where(inside[0][..., None], emission[0], 0.0)
    for t in range(1, len(emission)):
        moved = torch.logsumexp(alpha[..., None] + logits(t).log_softmax(-1), -2)
        alpha = torch.where(inside[t][..., None], moved + emission[t], alpha)
    return alpha.logsumexp(-1)


def emitted(data, stream, distribution):
    """Log-densities of a stream, 0 where nothing was observed; ``distribution`` has batch shape (T or 1, ..., K)."""
    log = distribution.log_prob(data.streams[stream][..., None])
    return torch.where(data.observed[stream][..., None], log, 0.0)


def compare(model, data, oracle, seed=0):
    """The model's density and an oracle at random values, and both gradients."""
    density = model.log_density(data)
    assert density.compiled.mode == "captured"
    assert {note.tier for note in density.graph.loops.values()} == {"vector"}
    noise = torch.randn(density.size, generator=torch.Generator().manual_seed(seed))
    values = {
        n: v.detach().requires_grad_() for n, v in density.unpack(density.pack(density.initial()) + 0.4 * noise).items()
    }
    seen, wanted = density.log_prob(values), oracle(values)
    torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-10)
    for one, other in zip(*(torch.autograd.grad(v, list(values.values())) for v in (seen, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    return density


def normal(u, sd):
    return dist.Normal(0.0, sd).log_prob(u).sum()


def stationary(logits):
    return stationary_distribution(logits.softmax(-1)).log()


@pytest.mark.parametrize("timing", ["to", "from"])
def test_transitions_with_a_covariate_and_an_intercept_of_each_subject(timing):
    data = tensors()
    model = MixedHMM(
        3,
        {"step": "gamma", "angle": "vonmises"},
        transitions="~ x + (1 | ID)",
        formulas={"angle.mean": "~ 1"},
        timing=timing,
    )

    def oracle(v):
        b, u = v["transitions"], v["transitions|ID"]
        x = data.covariates["x"]

        def logits(t):
            return with_zero_diagonal(b[..., 0] + b[..., 1] * x[t, :, None, None] + u)

        e = emitted(data, "step", GammaMeanSd(v["step.mean"], v["step.sd"]))
        e = e + emitted(data, "angle", VonMises(v["angle.mean"], v["angle.kappa"]))
        shift = 0 if timing == "to" else 1
        total = forward(stationary(logits(0)), lambda t: logits(t - shift), e, data.inside).sum()
        return total + normal(u, v["transitions|ID.sd"])

    density = compare(model, data, oracle)
    assert density.layout["transitions|ID"].plates == {"ID": -1}
    assert density.layout["transitions"].shape == (3, 2, 2)


def test_correlated_effects_on_an_emission():
    data = tensors()
    model = MixedHMM(
        2, {"step": "lognormal"}, initial="uniform", formulas={"step.mean": "~ x + (x | ID)", "step.sd": "~ w"}
    )

    def oracle(v):
        x, w = data.covariates["x"][..., None], data.covariates["w"][..., None]
        b, u = v["step.mean"], v["step.mean|ID"]
        mean = b[:, 0] + u[..., 0] + (b[:, 1] + u[..., 1]) * x
        sd = (v["step.sd"][:, 0] + v["step.sd"][:, 1] * w).exp()
        e = emitted(data, "step", dist.LogNormal(mean, sd))
        logits = with_zero_diagonal(v["transitions"])
        total = forward(torch.full((2,), 0.5).log(), lambda t: logits, e, data.inside).sum()
        tril = v["step.mean|ID.sd"][..., None] * v["step.mean|ID.corr"].tril()
        covariance = tril @ tril.mT
        # Two correlated normal numbers, written out.
        for k in range(2):
            (a, c), (_, d) = covariance[k]
            first, second = u[:, k, 0], u[:, k, 1]
            total = total + normal(first, a.sqrt())
            total = total + dist.Normal(c / a * first, (d - c * c / a).sqrt()).log_prob(second).sum()
        return total

    density = compare(model, data, oracle)
    assert density.layout["step.mean|ID.corr"].shape == (2, 2, 2)


def test_effects_that_are_not_correlated():
    data = tensors()
    model = MixedHMM(2, {"step": "gamma"}, initial="uniform", formulas={"step.mean": "~ 0 + (x || ID)"})

    def oracle(v):
        u, x = v["step.mean|ID"], data.covariates["x"][..., None]
        e = emitted(data, "step", GammaMeanSd((u[..., 0] + u[..., 1] * x).exp(), v["step.sd"]))
        logits = with_zero_diagonal(v["transitions"])
        total = forward(torch.full((2,), 0.5).log(), lambda t: logits, e, data.inside).sum()
        return total + normal(u, v["step.mean|ID.sd"])

    assert "step.mean" not in [e.name for e in compare(model, data, oracle).layout.entries]


def test_sessions_within_subjects():
    """Sessions start the chain again; a subject's effect is one for all its sessions, a session's its own."""
    data = tensors(sessions=True)
    model = MixedHMM(2, {"n": "poisson"}, transitions="~ 1 + (1 | ID/trip)", formulas={"n.rate": "~ w + (1 | ID)"})

    def oracle(v):
        subject, trip = v["transitions|ID"], v["transitions|ID:trip"]
        assert subject.shape == (N, 2, 1) and trip.shape == (S, N, 2, 1)
        logits = with_zero_diagonal(v["transitions"] + subject + trip)
        w = data.covariates["w"][..., None]
        rate = (v["n.rate"][:, 0] + v["n.rate"][:, 1] * w + v["n.rate|ID"]).exp()
        total = forward(stationary(logits), lambda t: logits, emitted(data, "n", dist.Poisson(rate)), data.inside).sum()
        for name in ("transitions|ID", "transitions|ID:trip", "n.rate|ID"):
            total = total + normal(v[name], v[f"{name}.sd"])
        return total

    density = compare(model, data, oracle)
    assert density.layout["transitions|ID:trip"].plates == {"ID": -1, "trip": -2}


def test_sessions_with_names_of_their_own_and_in_common():
    """``(1 | trip)`` where trips have names of their own is one effect per trip, and where subjects share them, one for all."""
    data = tensors(sessions=True)
    model = MixedHMM(2, {"n": "poisson"}, initial="uniform", transitions="~ (1 | trip)")

    def oracle(v, own):
        u = v["transitions|trip"]
        logits = with_zero_diagonal(v["transitions"] + (u if own else u[:, None]))
        e = emitted(data, "n", dist.Poisson(v["n.rate"]))
        total = forward(torch.full((2,), 0.5).log(), lambda t: logits.expand(S, N, 2, 2), e, data.inside).sum()
        return total + normal(u, v["transitions|trip.sd"])

    compare(model, data, lambda v: oracle(v, own=False))
    names = np.array([[f"{i}{k}" for i in IDS] for k in "ab"], dtype=object)
    data = replace(data, labels=data.labels.but(sessions=names))
    density = compare(model, data, lambda v: oracle(v, own=True))
    assert density.layout["transitions|trip"].shape == (S, N, 2, 1)


def test_groups_above_and_across_subjects():
    data = tensors()
    model = MixedHMM(
        2, {"n": "negative_binomial"}, transitions="~ (1 | herd)", formulas={"n.mean": "~ (1 | year) + (0 + x | herd)"}
    )

    def oracle(v):
        herd, year = data.groups["herd"], data.covariates["year"]
        logits = with_zero_diagonal(v["transitions"] + v["transitions|herd"][herd])
        # Groups are numbered in the order in which they come in the table.
        frame = model.bind(data).blocks["n.mean"][0].design.groups[0]
        place = torch.tensor([frame.levels.index(y) for y in data.levels["year"]])
        slope = v["n.mean|herd"][herd][..., 0] * data.covariates["x"][..., None]
        mean = (v["n.mean"] + v["n.mean|year"][place[year]] + slope).exp()
        distribution = symhmm.distributions.NegativeBinomialMean(mean, v["n.dispersion"])
        total = forward(stationary(logits), lambda t: logits, emitted(data, "n", distribution), data.inside).sum()
        for name in ("transitions|herd", "n.mean|year", "n.mean|herd"):
            total = total + normal(v[name], v[f"{name}.sd"])
        return total

    density = compare(model, data, oracle)
    assert density.layout["n.mean|year"].plates == {"year": -1}


def test_single_moves_and_single_states_with_formulas_of_their_own():
    data = tensors()
    model = MixedHMM(
        ["rest", "walk", "run"],
        {"step": "gamma"},
        transitions={"rest>run": "~ x", "2>0": "~ (1 | ID)"},
        formulas={"step.mean": {"walk": "~ x"}},
        fixed={"step.sd": [0.5, 1.0, 1.5]},
        initial=[0.2, 0.3, 0.5],
    )

    def oracle(v):
        x = data.covariates["x"]
        one = torch.ones(N)

        def logits(t):
            rest_run = v["transitions[rest>run]"][0] + v["transitions[rest>run]"][1] * x[t]
            run_rest = v["transitions[run>rest]"] + v["transitions[run>rest]|ID"]
            rows = [
                [0 * one, v["transitions[rest>walk]"] * one, rest_run],
                [v["transitions[walk>rest]"] * one, 0 * one, v["transitions[walk>run]"] * one],
                [run_rest, v["transitions[run>walk]"] * one, 0 * one],
            ]
            return torch.stack([torch.stack(r, -1) for r in rows], -2)

        walk = v["step.mean[walk]"][0] + v["step.mean[walk]"][1] * x
        mean = torch.stack([v["step.mean[rest]"].expand(T, N), walk, v["step.mean[run]"].expand(T, N)], -1).exp()
        e = emitted(data, "step", GammaMeanSd(mean, torch.tensor([0.5, 1.0, 1.5])))
        total = forward(torch.tensor([0.2, 0.3, 0.5]).log(), logits, e, data.inside).sum()
        return total + normal(v["transitions[run>rest]|ID"], v["transitions[run>rest]|ID.sd"])

    compare(model, data, oracle)


def test_a_start_by_formula_and_known_states():
    data = tensors()
    states = torch.full((T, N), -1)
    states[1, 0], states[3, 0], states[0, 2] = 1, 0, 1
    data = SequenceData.from_tensors(
        data.streams,
        observed=data.observed,
        lengths=data.lengths,
        covariates=data.covariates,
        states=states,
        labels=data.labels,
    )
    model = MixedHMM(2, {"step": "weibull"}, initial="~ w")

    def oracle(v):
        b = v["initial"]
        start = torch.stack([torch.zeros(N), b[0, 0] + b[0, 1] * data.covariates["w"][0]], -1).log_softmax(-1)
        e = emitted(data, "step", dist.Weibull(v["step.scale"], v["step.shape"]))
        known = torch.where((states[..., None] < 0) | (states[..., None] == torch.arange(2)), 0.0, -torch.inf)
        logits = with_zero_diagonal(v["transitions"])
        return forward(start, lambda t: logits, e + known, data.inside).sum()

    density = compare(model, data, oracle)
    probs = smooth(density, density.initial(), ["z_{time}"]).only
    assert probs.dims == ("time", "ID", "state")
    torch.testing.assert_close(probs.values[[1, 3, 0], [0, 0, 2], [1, 0, 1]], torch.ones(3))


@pytest.mark.parametrize("linked", [False, True])
def test_categorical_streams(linked):
    g = torch.Generator().manual_seed(3)
    data = SequenceData.from_tensors(
        {"food": torch.randint(0, 3, (T, N), generator=g).double()},
        covariates={"x": torch.randn(T, N, generator=g)},
        levels={"food": ("none", "fish", "squid")},
    )
    model = MixedHMM(2, {"food": "categorical"}, initial="free", formulas={"food.prob": "~ x"} if linked else None)

    def oracle(v):
        if linked:
            x, b = data.covariates["x"][..., None, None], v["food.prob"]
            eta = torch.cat([torch.zeros(T, N, 2, 1), b[..., 0] + b[..., 1] * x], -1)
        else:
            eta = v["food.prob"].log()
        e = eta.log_softmax(-1).expand(T, N, 2, 3)
        e = e.gather(-1, data.streams["food"].long()[..., None, None].expand(T, N, 2, 1)).squeeze(-1)
        logits = with_zero_diagonal(v["transitions"])
        return forward((v["initial"] / v["initial"].sum()).log(), lambda t: logits, e, data.inside).sum()

    density = compare(model, data, oracle)
    assert density.layout["food.prob"].shape == ((2, 2, 2) if linked else (2, 3))


def test_equal_to_a_program_written_by_hand():
    data = tensors()

    def by_hand(data, x):
        b = pyro.param("transitions", torch.zeros(2, 1, 2))
        mean = pyro.param("step.mean", torch.ones(2), constraints.positive)
        sd = pyro.param("step.sd", torch.ones(2), constraints.positive)
        spread = pyro.param("transitions|ID.sd", torch.ones(2, 1), constraints.positive)
        with pyro.plate("ID", N, dim=-1):
            own = pyro.sample("transitions|ID", dist.Normal(torch.zeros(2, 1), spread).to_event(2))
            for t in pyro.markov(range(T)):
                logits = with_zero_diagonal(b[..., 0] + b[..., 1] * x[t][..., None, None] + own)
                if t == 0:
                    z = pyro.sample("z_0", dist.Categorical(torch.ones(2)))
                else:
                    z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[..., z, :]))
                with pyro.poutine.mask(mask=data.observed["step"][t]):
                    pyro.sample(f"step_{t}", GammaMeanSd(mean[z], sd[z]), obs=data.streams["step"][t])

    model = MixedHMM(2, {"step": "gamma"}, transitions="~ scale(x) + (1 | ID)", initial="uniform")
    x = data.covariates["x"]
    rows = data.gather(x)
    x = (x - rows.mean()) / rows.std(correction=0)
    one, other = model.log_density(data), symhmm.compile(by_hand, data, x)
    values = one.unpack(0.3 * torch.randn(one.size, generator=torch.Generator().manual_seed(1)))
    torch.testing.assert_close(one.log_prob(values), other.log_prob(values), rtol=1e-12, atol=1e-10)
    gradients = [d.value_and_grad(d.pack(values))[1] for d in (one, other)]
    names = [e.name for e in one.layout.entries]
    for name in names:
        a, b = one.layout[name], other.layout[name]
        torch.testing.assert_close(
            gradients[0][a.start : a.stop], gradients[1][b.start : b.stop], rtol=1e-10, atol=1e-10
        )


def test_one_state_and_subjects_of_their_own():
    """One state is a mixed model without hidden states, and every subject by itself adds up to all."""
    data = tensors()
    model = MixedHMM(1, {"step": "gamma"}, formulas={"step.mean": "~ x"})
    density = model.log_density(data)
    total = sum(model.log_density(data.take([i])).log_prob(density.initial()) for i in IDS)
    torch.testing.assert_close(density.log_prob(density.initial()), total)


@pytest.mark.parametrize(
    "arguments, says",
    [
        ({"emissions": {"step": "gama"}}, ["'gama'", "'step'", "'gamma'"]),
        ({"emissions": {}}, ["no emissions"]),
        ({"emissions": {"z": "gamma"}}, ["'z'", "rename"]),
        ({"formulas": {"step.men": "~ x"}}, ["'men'", "'step.mean'"]),
        ({"formulas": {"stop.mean": "~ x"}}, ["'stop.mean'", "'step.mean'"]),
        ({"formulas": {"step.mean": "~ x +"}}, ["formula of step.mean", "empty term"]),
        ({"formulas": {"step.mean": {"9": "~ x"}}}, ["'9'", "cells: 0, 1"]),
        ({"transitions": {"0>7": "~ x"}}, ["'0>7'", "0>1, 1>0"]),
        ({"initial": "stationery"}, ["'stationery'", "'stationary'"]),
        ({"initial": [0.5, 0.6]}, ["sum 1"]),
        ({"timing": "into"}, ["'into'", "'to'"]),
        ({"fixed": {"step.sd": [1.0, 2.0, 3.0]}}, ["seen 3, wanted 1 or 2"]),
        ({"fixed": {"step.sd": 1.0}, "formulas": {"step.sd": "~ x"}}, ["'step.sd'", "held fixed"]),
        ({"order_by": "stap"}, ["'stap'", "'step'"]),
        ({"states": 0}, ["states"]),
        ({"states": ["a", "a"]}, ["states"]),
    ],
)
def test_what_cannot_be_is_refused_before_there_are_data(arguments, says):
    with pytest.raises(SpecError) as error:
        MixedHMM(**{"states": 2, "emissions": {"step": "gamma"}, **arguments})
    for part in says:
        assert part in str(error.value)


@pytest.mark.parametrize(
    "arguments, kind, says",
    [
        ({"emissions": {"stap": "gamma"}}, SpecError, ["'stap'", "step, angle, n", "'step'"]),
        ({"transitions": "~ tmep"}, SpecError, ["transitions", "'tmep'", "x, w, year, herd"]),
        ({"transitions": "~ (1 | Id)"}, SpecError, ["'Id'", "'ID'"]),
        ({"formulas": {"step.mean": "~ x + I(2 * x)"}}, SpecError, ["step.mean", "'I(2 * x)'", "combination of 'x'"]),
        ({"emissions": {"step": "beta"}}, DataError, ["'step'", "beta", "row"]),
        ({"priors": {"step.men": dist.Normal(0.0, 1.0)}}, SpecError, ["'step.men'", "'step.mean'"]),
    ],
)
def test_what_the_data_have_not_got_is_refused_before_any_work(arguments, kind, says):
    model = MixedHMM(**{"states": 2, "emissions": {"step": "gamma"}, **arguments})
    with pytest.raises(kind) as error:
        model.fit(tensors())
    for part in says:
        assert part in str(error.value)


def test_unknown_methods_and_starts():
    model = MixedHMM(2, {"step": "gamma"})
    with pytest.raises(FitError, match="'mel'"):
        model.fit(tensors(), method="mel")
    with pytest.raises(SpecError, match=r"'step.mena'(.|\n)*'step.mean'"):
        model.fit(tensors(), start={"step.mena": 1.0})


def test_priors_can_be_replaced():
    data = tensors()
    model = MixedHMM(2, {"step": "gamma"}, initial="free", priors={"step.mean": dist.LogNormal(0.3, 0.7)})
    density = model.log_density(data)
    values = density.initial()
    plain = MixedHMM(2, {"step": "gamma"}, initial="free").log_density(data).log_prob(values)
    arguments = {n: a for n, a in zip(("transitions", "step.sd"), ((-2.0, 2.0), None), strict=True) if a}
    gone = density.log_prob(values) - plain - dist.LogNormal(0.3, 0.7).log_prob(values["step.mean"]).sum()
    gone = gone - dist.Normal(*arguments["transitions"]).log_prob(values["transitions"]).sum()
    gone = gone - dist.Dirichlet(torch.ones(2)).log_prob(values["initial"])
    y = data.streams["step"][data.observed["step"]]
    spread = dist.LogNormal(y.std(correction=0).log(), 1.5).log_prob(values["step.sd"]).sum()
    torch.testing.assert_close(gone, spread)
    assert 'pyro.sample("step.mean", prior["step.mean"].expand' in model.program_source(data, priors=True)


def test_default_priors_by_hand():
    """Slopes in units of their covariate, intercepts around the whole sample, half-normal spreads, and LKJ(2) correlations."""
    data = tensors()
    model = MixedHMM(
        2, {"step": "gamma"}, initial="uniform", transitions="~ x + (x | ID)", formulas={"step.mean": "~ 1 + (1 | ID)"}
    )
    plain, full = model.log_density(data), model.log_density(data, priors=True)
    noise = torch.randn(plain.size, generator=torch.Generator().manual_seed(2))
    values = plain.unpack(plain.pack(plain.initial()) + 0.3 * noise)
    seen = full.log_prob(values) - plain.log_prob(values)
    y = data.streams["step"][data.observed["step"]]
    b = values["transitions"]
    wanted = dist.Normal(-2.0, 2.0).log_prob(b[..., 0]).sum()
    wanted = wanted + dist.Normal(0.0, 2 / data.gather(data.covariates["x"]).std()).log_prob(b[..., 1]).sum()
    wanted = wanted + dist.Normal(y.mean().log(), 2.0).log_prob(values["step.mean"]).sum()
    wanted = wanted + dist.LogNormal(y.std(correction=0).log(), 1.5).log_prob(values["step.sd"]).sum()
    for name in ("transitions|ID.sd", "step.mean|ID.sd"):
        wanted = wanted + dist.HalfNormal(1.0).log_prob(values[name]).sum()
    # Two effects: the density of their correlation r is 3/4 (1 - r^2).
    r = values["transitions|ID.corr"][..., 1, 0]
    wanted = wanted + (0.75 * (1 - r * r)).log().sum()
    torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=1e-9)


def test_starts_tell_states_apart_and_survive_ties():
    g = torch.Generator().manual_seed(0)
    y = torch.cat([torch.randn(30, 2, generator=g) - 3, torch.randn(30, 2, generator=g) + 3])
    y[5, 0] = math.nan
    two = (torch.rand(60, 2, generator=g) < 0.5).double()
    data = SequenceData.from_tensors({"y": y, "b": two, "same": torch.ones(60, 2)})
    start = MixedHMM(2, {"y": "gaussian", "b": "bernoulli"}).log_density(data).initial()
    torch.testing.assert_close(start["y.mean"], torch.tensor([-3.0, 3.0]), atol=0.5, rtol=0)
    start = MixedHMM(4, {"b": "bernoulli", "same": "gaussian"}).log_density(data).initial()
    assert all(bool(v.isfinite().all()) for v in start.values())
    again = MixedHMM(4, {"b": "bernoulli", "same": "gaussian"}).log_density(data).initial()
    torch.testing.assert_close(start, again, rtol=0, atol=0)
