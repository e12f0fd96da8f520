"""Simulated data: the same for the same seed, with the statistics of their truth, holes as asked for, and found again by fits."""

import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from symhmm.distributions import GammaMeanSd, Hurdle, VonMises, stationary_distribution
from symhmm.errors import DataError
from symhmm.models import (
    ContinuousTimeHMM,
    CormackJollySeber,
    GaussianHMM,
    HierarchicalRegression,
    LatentClass,
    MixtureHMM,
    MixtureOfRegressions,
    SemiMarkovHMM,
)
from symhmm.simulators import (
    Holes,
    simulate_captures,
    simulate_continuous_time,
    simulate_hmm,
    simulate_mixture,
    simulate_regression,
    simulate_semi_markov,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


STICKY = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)


def two(low=0.0, high=4.0):
    return dist.Normal(torch.tensor([low, high]), torch.ones(2))


SIMULATORS = {
    "chains": lambda seed: simulate_hmm(
        5, 40, STICKY, {"y": two()}, slope=torch.eye(2), spread=0.4, holes=Holes(10, 0.1, 0.05), seed=seed
    ),
    "sessions": lambda seed: simulate_hmm(5, 40, STICKY, {"y": two()}, sessions=3, holes=Holes(10), seed=seed),
    "kinds": lambda seed: simulate_hmm(
        5, 40, torch.stack([STICKY, STICKY.flip(0, 1)]), {"y": two()}, weights=torch.ones(2) / 2, seed=seed
    ),
    "mixture": lambda seed: simulate_mixture(50, torch.tensor([0.3, 0.7]), {"y": two()}, rows=3, seed=seed),
    "semi-Markov": lambda seed: simulate_semi_markov(3, 40, torch.ones(2, 5) / 5, {"y": two()}, seed=seed),
    "continuous": lambda seed: simulate_continuous_time(3, 40, torch.tensor([[0.3], [0.1]]), {"y": two()}, seed=seed),
    "captures": lambda seed: simulate_captures(30, 6, 0.8, 0.5, seed=seed),
}


@pytest.mark.parametrize("name", SIMULATORS)
def test_same_seed_same_data_and_no_trace_in_the_global_generator(name):
    before = torch.random.get_rng_state()
    (a, truth), (b, _), (c, _) = (SIMULATORS[name](seed) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    first = next(iter(a.streams))
    assert torch.equal(a[first], b[first]) and not torch.equal(a[first], c[first])
    assert a.dtype == torch.float64
    if truth.states is not None:
        assert truth.states.shape == a.mask.shape
    if truth.states is not None and name != "captures":
        assert torch.equal(truth.states >= 0, a.inside)


def test_table_of_regressions_repeats():
    first, second = (simulate_regression(4, 3, torch.tensor([1.0, 2.0]), seed=5)[0] for _ in range(2))
    assert first.equals(second)


def test_holes_are_as_many_as_asked_for():
    data, _ = simulate_hmm(
        300, 100, STICKY, {"y": two(), "w": two()}, holes=Holes(20, missing=0.1, gap=0.02, length=4), seed=0
    )
    assert data.lengths.min() < 25 and data.lengths.max() == 100
    kept = 0.98**4 * 0.9
    share = data.observed["y"][data.inside].double().mean()
    assert share.item() == pytest.approx(kept, abs=0.01)
    both = (data.observed["y"] & data.observed["w"])[data.inside].double().mean()
    assert both.item() == pytest.approx(0.98**4 * 0.81, abs=0.01)
    # A step without any stream is followed by another one more often than by chance.
    none = ~(data.observed["y"] | data.observed["w"]) & data.inside
    assert (none[1:] & none[:-1]).sum() > 3 * none.double().mean() * none.sum()


def test_chains_have_the_statistics_of_their_truth():
    emissions = {"step": Hurdle(GammaMeanSd(torch.tensor([1.0, 5.0]), 1.0), torch.tensor([0.2, 0.0])), ("u", "v"): (
        dist.MultivariateNormal(torch.zeros(2, 2), torch.tensor([[[1.0, 0.9], [0.9, 1.0]], [[1.0, -0.9], [-0.9, 1.0]]]))),
        "angle": VonMises(torch.zeros(2), torch.tensor([0.0, 8.0]))}  # fmt: skip
    data, truth = simulate_hmm(50, 400, STICKY, emissions, seed=1)
    z = truth.states
    assert_close(
        torch.bincount(z.flatten()) / z.numel(), stationary_distribution(STICKY), rtol=0, atol=0.02, check_dtype=False
    )
    stay = (z[1:] == z[:-1])[z[:-1] == 0].double().mean()
    assert stay.item() == pytest.approx(0.9, abs=0.01)
    assert (data.step[z == 0] == 0).double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert data.step[z == 1].min() > 0
    for k, sign in ((0, 0.9), (1, -0.9)):
        pair = torch.stack([data.u[z == k], data.v[z == k]])
        assert torch.corrcoef(pair)[0, 1].item() == pytest.approx(sign, abs=0.03)


def test_a_covariate_moves_the_transitions():
    slope = torch.tensor([[0.0, 1.5], [0.0, 0.0]])
    data, truth = simulate_hmm(40, 500, STICKY, {"y": two()}, slope=slope, seed=2)
    z = truth.states
    leave = (z[1:] == 1)[z[:-1] == 0].double()
    x = data.x[1:][z[:-1] == 0]
    for low, high in ((-2.0, -1.0), (1.0, 2.0)):
        some = (x > low) & (x < high)
        wanted = torch.sigmoid(torch.tensor(0.1 / 0.9).log() + 1.5 * x[some]).mean()
        assert leave[some].mean().item() == pytest.approx(wanted.item(), abs=0.03)


def test_captures_and_dwell_times_have_their_probabilities():
    data, truth = simulate_captures(4000, 5, 0.7, torch.tensor([0.2, 0.9, 0.5, 0.5]), seed=0)
    alive = truth.states
    assert (alive[1:][alive[:-1] == 1] == 1).double().mean().item() == pytest.approx(0.7, abs=0.02)
    at_two = (alive[2] == 1) & (alive[1] == 1)
    assert data.seen[2][at_two].mean().item() == pytest.approx(0.9, abs=0.02)
    dwell = torch.tensor([[0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
    _, truth = simulate_semi_markov(1, 20000, dwell, {"y": two()}, seed=0)
    runs, length = torch.unique_consecutive(truth.states[:, 0], return_counts=True)
    for k in range(2):
        counts = torch.bincount(length[1:-1][runs[1:-1] == k], minlength=4)[1:]
        assert_close(counts / counts.sum(), dwell[k], rtol=0, atol=0.02, check_dtype=False)


def test_impossible_simulations_are_refused():
    for make, words in [
        (lambda: simulate_hmm(0, 5, STICKY, {"y": two()}), "nothing to simulate"),
        (lambda: simulate_hmm(2, 5, STICKY, {"y": two()}, holes=Holes(shortest=6)), "6 to 5 steps"),
        (lambda: Holes(missing=1.0), "probabilities below 1"),
        (lambda: simulate_hmm(2, 5, STICKY, {"y": dist.Normal(torch.zeros(3), 1.0)}), r"wanted \(2,\)"),
        (lambda: simulate_regression(0, 5, torch.ones(2)), "nothing to simulate"),
    ]:
        with pytest.raises(DataError, match=words):
            make()


def covers(fit, name, truth, within=4.0):
    """Estimates differ from the truth by few standard errors."""
    off = (fit.values[name] - torch.as_tensor(truth)).abs()
    assert (off < within * fit.standard_errors[name]).all(), (off, fit.standard_errors[name])


def test_gaussian_chains_with_holes_are_found_again():
    emission = dist.MultivariateNormal(
        torch.tensor([[0.0, 0.0], [2.0, 1.0]]), torch.tensor([[[1.0, 0.5], [0.5, 1.0]], [[2.0, -0.6], [-0.6, 1.0]]])
    )
    data, truth = simulate_hmm(6, 300, STICKY, {("u", "v"): emission}, holes=Holes(200, 0.1, 0.02), seed=0)
    fit = GaussianHMM(2, ["u", "v"]).fit(data, restarts=1)
    covers(fit, "mean", emission.loc)
    covers(fit, "transition", STICKY)
    assert_close(fit.values["sd"][..., None] * fit.values["corr"], emission.scale_tril, rtol=0, atol=0.15)
    found = fit.viterbi()["z_{time}"].values
    assert (found == truth.states)[data.inside].double().mean() > 0.85


def test_survival_and_detection_are_found_again():
    data, _ = simulate_captures(400, 7, 0.8, 0.6, seed=3)
    fit = CormackJollySeber().fit(data, restarts=1)
    covers(fit, "phi", 0.8)
    covers(fit, "p", 0.6)


def test_latent_classes_are_found_again():
    p = torch.tensor([[0.1, 0.8], [0.2, 0.9], [0.7, 0.1], [0.5, 0.9]])
    data, _ = simulate_mixture(
        2000,
        torch.tensor([0.35, 0.65]),
        {f"d{i}": dist.Bernoulli(row) for i, row in enumerate(p)},
        holes=Holes(missing=0.1),
        seed=0,
    )
    fit = LatentClass(2, [f"d{i}" for i in range(4)]).fit(data, restarts=1)
    order = fit.values["d0.prob"].argsort()
    for i, row in enumerate(p):
        assert_close(fit.values[f"d{i}.prob"][order], row, rtol=0, atol=0.08)
    assert_close(fit.values["weights"][order], torch.tensor([0.35, 0.65]), rtol=0, atol=0.06)


def test_regressions_are_found_again():
    fixed, spread = torch.tensor([1.0, -0.5]), torch.tensor([0.8, 0.4])
    table, _ = simulate_regression(80, 12, fixed, spread=spread, seed=1)
    fit = HierarchicalRegression("y ~ x1 + (x1 | id)").fit(table, restarts=1)
    covers(fit, "fixed", fixed)
    assert_close(fit.values["spread"], spread, rtol=0.25, atol=0)
    kinds = torch.tensor([[1.0, 2.0], [0.0, -2.0]])
    table, truth = simulate_regression(60, 5, kinds, weights=torch.tensor([0.4, 0.6]), seed=1)
    fit = MixtureOfRegressions(2, "y ~ x1", by="id").fit(table, restarts=1)
    order = fit.values["coefficients"][:, 1].argsort(descending=True)
    assert_close(fit.values["coefficients"][order], kinds, rtol=0, atol=0.35)
    assert (order.argsort()[fit.viterbi()["component"].values] == truth.kinds).double().mean() > 0.95


@pytest.mark.slow
def test_semi_markov_continuous_time_and_kinds_are_found_again():
    shifted = torch.arange(25.0)
    rates = torch.tensor([2.0, 9.0])
    dwell = dist.Poisson(rates[:, None]).log_prob(shifted).softmax(-1)
    data, _ = simulate_semi_markov(8, 400, dwell, {"y": two(0.0, 2.5)}, holes=Holes(300, 0.1), seed=0)
    covers(SemiMarkovHMM(2, {"y": "gaussian"}, "poisson", longest=25).fit(data, restarts=1), "dwell.rate", rates)

    rates = torch.tensor([[0.2, 0.05], [0.1, 0.1], [0.02, 0.3]])
    three = dist.Normal(torch.tensor([0.0, 3.0, 6.0]), torch.ones(3))
    data, _ = simulate_continuous_time(20, 300, rates, {"y": three}, holes=Holes(missing=0.1), seed=0)
    covers(ContinuousTimeHMM(3, {"y": "gaussian"}, time="time").fit(data, restarts=1), "rates", rates)

    both = torch.stack([torch.tensor([[0.97, 0.03], [0.05, 0.95]]), torch.tensor([[0.6, 0.4], [0.5, 0.5]])])
    data, truth = simulate_hmm(
        60, 150, both, {"y": two()}, weights=torch.tensor([0.3, 0.7]), holes=Holes(80, 0.1), seed=0
    )
    fit = MixtureHMM(2, 2, {"y": "gaussian"}).fit(data)
    kind = fit.viterbi(["kind"])["kind"].values
    assert max((kind == truth.kinds).double().mean(), (kind != truth.kinds).double().mean()) > 0.95
