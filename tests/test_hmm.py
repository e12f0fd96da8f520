"""Hidden Markov models of counts, and with kinds of individuals: the same as programs written by hand, and published fits."""

import json

import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import symhmm
from symhmm.datasets import earthquakes
from symhmm.distributions import GammaMeanSd, VonMises, stationary_distribution, with_zero_diagonal
from symhmm.errors import DataError, SpecError
from symhmm.models.hmm import MixtureHMM, PoissonHMM, grouped
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def quakes():
    return SequenceData.from_tensors({"count": earthquakes().double()[:, None]})


@pytest.mark.parametrize(
    ("initial", "states", "wanted"),
    [
        ("stationary", 1, -391.9189),
        ("stationary", 2, -342.3183),
        ("stationary", 3, -329.4603),
        ("free", 2, -341.8787),
        ("free", 3, -328.5275),
    ],
)
def test_earthquakes_reach_the_published_likelihood(quakes, initial, states, wanted):
    """Zucchini, MacDonald and Langrock 2016, from the model's own start alone."""
    fit = PoissonHMM(states, "count", initial=initial).fit(quakes, restarts=1)
    assert fit.objective == pytest.approx(wanted, abs=1e-4)
    assert fit.status.ok


def steps(seed=0, sessions=False):
    generator = torch.Generator().manual_seed(seed)
    shape = (7, 3, 5) if sessions else (7, 5)
    step = torch.rand(shape, generator=generator) + 0.1
    step[torch.rand(shape, generator=generator) < 0.2] = torch.nan
    angle = torch.rand(shape, generator=generator) * 6 - 3
    lengths = torch.randint(3, 8, shape[1:], generator=generator)
    return SequenceData.from_tensors({"step": step, "angle": angle}, lengths=lengths)


@pytest.mark.parametrize(
    ("initial", "sessions"), [("stationary", True), ("uniform", False), ("free", True), ((0.2, 0.3, 0.5), False)]
)
def test_kinds_of_individuals_are_those_of_a_program_by_hand(initial, sessions):
    data = steps(sessions=sessions)
    model = MixtureHMM(3, 2, {"step": "gamma", "angle": "vonmises"}, initial=initial)
    density = model.log_density(data)

    def by_hand(data):
        mean = pyro.param("step.mean", torch.ones(3), dist.constraints.positive)
        sd = pyro.param("step.sd", torch.ones(3), dist.constraints.positive)
        kappa = pyro.param("angle.kappa", torch.ones(3), dist.constraints.positive)
        weights = pyro.param("weights", torch.ones(2) / 2, dist.constraints.simplex)
        transition = with_zero_diagonal(pyro.param("logits", torch.zeros(2, 3, 2))).softmax(-1)
        first = {
            "stationary": lambda: stationary_distribution(transition),
            "uniform": lambda: torch.ones(2, 3) / 3,
            "free": lambda: pyro.param("initial", torch.ones(2, 3) / 3, dist.constraints.simplex),
        }.get(initial, lambda: torch.tensor(initial).expand(2, 3))()
        total = 0.0
        # One individual and session at a time, both kinds and all paths by a forward recursion.
        for n in range(data.num_sequences):
            kinds = weights.log()
            for s in range(data.num_sessions):
                where = (slice(None), s, n) if sessions else (slice(None), n)
                x, a, seen, inside = (v[where] for v in (data.step, data.angle, data.observed["step"], data.inside))
                alpha = first.clone()
                for t in range(len(x)):
                    if t:
                        alpha = (alpha[:, None] @ transition)[:, 0]
                    if seen[t]:
                        alpha = alpha * GammaMeanSd(mean, sd).log_prob(x[t]).exp()
                    if inside[t]:
                        alpha = alpha * VonMises(0.0, kappa).log_prob(a[t]).exp()
                kinds = kinds + alpha.sum(-1).log()
            total = total + kinds.logsumexp(0)
        pyro.factor("total", total)

    wanted = symhmm.compile(by_hand, data)
    values = {n: v.detach() for n, v in density.unpack(0.3 * torch.randn(density.size)).items()}
    found, reference = (
        d.value_and_grad(d.pack({e.name: values[e.name] for e in d.layout.entries})) for d in (density, wanted)
    )
    assert_close(found[0], reference[0], rtol=1e-11, atol=1e-11)
    # The two programs may number their free values differently.
    order = [i for e in density.layout.entries for i in range(wanted.layout[e.name].start, wanted.layout[e.name].stop)]
    assert_close(found[1], reference[1][order], rtol=1e-9, atol=1e-10)


def test_the_printed_program_is_the_one_that_runs():
    data = steps()
    for model in (MixtureHMM(2, 2, {"step": "gamma"}), PoissonHMM(2, ["step"])):
        if isinstance(model, PoissonHMM):
            data = SequenceData.from_tensors({"step": data.step.round()})
        space = {}
        exec(model.program_source(), space)
        start = model.start(data)
        copied = symhmm.compile(space["program"], data, start)
        density = model.log_density(data)
        assert_close(copied.log_prob(copied.initial()), density.log_prob(density.initial()), rtol=1e-13, atol=0)
        assert model.program is model.program


def test_kinds_are_found_again_from_own_starts():
    generator = torch.Generator().manual_seed(3)
    y, rare = [], torch.tensor([0.03] * 6 + [0.4] * 6)
    z = torch.zeros(12, dtype=torch.long)
    for _ in range(120):
        z = torch.where(torch.rand(12, generator=generator) < rare, 1 - z, z)
        y.append(4.0 * z + torch.randn(12, generator=generator))
    data = SequenceData.from_tensors({"y": torch.stack(y)})
    fit = MixtureHMM(2, 2, {"y": "gaussian"}, initial="uniform").fit(data, restarts=3)
    kind = fit.viterbi(["kind"])["kind"].values
    assert len(set(kind[:6].tolist())) == len(set(kind[6:].tolist())) == 1 and kind[0] != kind[6]
    stay = with_zero_diagonal(fit.values["logits"]).softmax(-1).diagonal(dim1=-2, dim2=-1).mean(-1)
    assert_close(stay.sort().values, torch.tensor([0.6, 0.97]), rtol=0, atol=0.06)
    assert len(fit.optima.objectives) >= 3 and fit.objective == max(fit.optima.objectives)


WHALES = {
    "dive.dur": "weibull",
    "dive.depth": "gamma",
    "GR.speed2": "gamma",
    "dive.pitchvar2": "beta",
    "breath.headchange": "vonmises",
    "GR.size": "poisson",
    **dict.fromkeys(["GR.tight", "dive.CS.pres", "dive.SS.pres", "presurf", "postsurf"], "bernoulli"),
}


@pytest.fixture
def whales(data_file):
    return SequenceData.from_frame(pd.read_csv(data_file("pilot_whales.csv")), id="ID", streams=list(WHALES))


@pytest.mark.parametrize("components", [1, 3])
def test_pilot_whales_at_the_reference_parameters(data_file, whales, components):
    reference = json.loads(data_file("pilot_whales_reference.json").read_text())[f"fitmix{components}"]
    obs = {s: torch.tensor(rows) for s, rows in reference["obs"].items()}
    names = {s: ["alpha", "beta"] if f == "beta" else ["shape", "scale"] if f == "weibull" else ["mean", "sd"]
             for s, f in WHALES.items()}  # fmt: skip
    names |= {"breath.headchange": ["", "kappa"], "GR.size": ["rate"]}
    names |= {s: ["prob"] for s, f in WHALES.items() if f == "bernoulli"}
    values = {f"{s}.{n}": obs[s][i] for s in WHALES for i, n in enumerate(names[s]) if n}
    values["weights"] = torch.tensor(reference["pi"])
    values["logits"] = torch.tensor(reference["beta"]).reshape(components, 4, 3)
    density = MixtureHMM(4, components, WHALES).log_density(whales)
    assert density.size == reference["npar"]
    assert density.log_prob(values).item() == pytest.approx(reference["loglik"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("components", "wanted"), [(1, -18510.4012), (2, -18481.2920), (3, -18445.1438)])
def test_pilot_whales_from_own_starts(whales, components, wanted):
    fit = MixtureHMM(4, components, WHALES).fit(whales)
    assert fit.objective > wanted - 0.01


def test_what_a_model_cannot_be_is_said_before_any_work(quakes):
    for make, words in [
        (lambda: PoissonHMM(0, "count"), "states=0"),
        (lambda: PoissonHMM(2, "count", initial="stationery"), "initial state cannot be 'stationery'"),
        (lambda: MixtureHMM(2, 2, {"step": "gamma"}, initial=(0.5, 0.6)), "sum to 1"),
        (lambda: MixtureHMM(2, 2, {"step": "gama"}), "no emission family 'gama'"),
        (lambda: MixtureHMM(2, 1.5, {"step": "gamma"}), "components=1.5"),
        (lambda: MixtureHMM(2, 2, {}), "no emissions"),
        (lambda: PoissonHMM(2, "count").fit(torch.ones(3)), "Tensor is not sequence data"),
    ]:
        with pytest.raises(SpecError, match=words):
            make()
    with pytest.raises(DataError, match="no stream 'cuont'"):
        PoissonHMM(2, "cuont").log_density(quakes)
    with pytest.raises(DataError, match="missing everywhere"):
        PoissonHMM(2, "y").log_density(SequenceData.from_tensors({"y": torch.full((3, 2), torch.nan)}))


def test_individuals_are_grouped_by_their_moves():
    """EM on the moves against the likelihood of a mixture of Markov chains, and as many starts as were wanted."""
    matrices = torch.tensor([[[0.9, 0.1], [0.1, 0.9]], [[0.2, 0.8], [0.7, 0.3]]])
    counts = torch.stack([(40 * matrices[i % 2]).round() + i for i in range(6)])

    def reached(weights, transition):
        each = torch.einsum("nij,cij->nc", counts, transition.log()) + weights.log()
        return each.logsumexp(-1).sum().item(), each.softmax(-1)

    found = grouped(counts, 2, 4, seed=0)
    assert len(found) == 4
    best, belongs = reached(*found[0])
    assert best == max(reached(*x)[0] for x in found)
    kind = belongs.argmax(-1)
    assert kind[0] == kind[2] == kind[4] != kind[1] == kind[3] == kind[5]
    assert_close(found[0][0], torch.tensor([0.5, 0.5]), rtol=0, atol=1e-6)
    mine = counts[::2].sum(0) + 0.25
    assert_close(found[0][1][kind[0]], mine / mine.sum(-1, keepdim=True), rtol=0, atol=1e-5)
    # More kinds than individuals are possible, and no more than unlikely.
    assert all(x[1].isfinite().all() for x in grouped(counts[:2], 3, 2, seed=0))
