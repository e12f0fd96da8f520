"""Answers of Dynamax and hmmlearn to the same questions, computed once by ``peers/make_reference.py``."""

import json
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import symhmm
from symhmm.posterior.decode import posterior_decode, viterbi
from symhmm.posterior.marginals import occupancy, pairwise, smooth, transition_counts
from symhmm.posterior.pointwise import log_likelihood_by
from symhmm.posterior.prefix import filtered

REFERENCE = json.loads((Path(__file__).parent / "peers" / "reference.json").read_text())
CASES = [n for n in REFERENCE if n != "made_with"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SITE = "z_{time}"


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def program(case):
    initial, transition, y = (torch.tensor(case[n]) for n in ("initial", "transition", "y"))
    z = None
    for t in pyro.markov(range(len(y))):
        if z is None:
            p = initial
        else:
            p = transition[z] if transition.dim() == 2 else transition[t - 1][z]
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        if "mean" in case:
            observed = dist.Normal(torch.tensor(case["mean"])[z], torch.tensor(case["sd"])[z])
        else:
            observed = dist.Categorical(torch.tensor(case["emission"])[z])
        pyro.sample(f"y_{t}", observed, obs=y[t])


@pytest.fixture(params=CASES, scope="module")
def asked(request):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    case = REFERENCE[request.param]
    density = symhmm.compile(lambda: program(case))
    torch.set_default_dtype(before)
    return case, density


def test_filter_and_predictions(asked):
    case, density = asked
    assert_close(filtered(density, {})[SITE].values, torch.tensor(case["dynamax"]["filtered"]), **EXACT)
    assert_close(filtered(density, {}, ahead=True)[SITE].values, torch.tensor(case["dynamax"]["predicted"]), **EXACT)


def test_smoothing_and_pairs(asked):
    case, density = asked
    for peer in ("dynamax", "hmmlearn"):
        if peer in case:
            smoothed = torch.tensor(case[peer]["smoothed"])
            assert_close(smooth(density, {})[SITE].values, smoothed, **EXACT)
            assert torch.equal(posterior_decode(density, {})[SITE].values, smoothed.argmax(-1))
            assert_close(occupancy(density, {})[SITE].values, smoothed.sum(0), **EXACT)
    pairs = torch.tensor(case["dynamax"]["pairs"])
    assert_close(pairwise(density, {})[SITE].values, pairs, **EXACT)
    assert_close(transition_counts(density, {})[SITE].values, pairs.sum(0), **EXACT)


def test_log_likelihood_and_best_path(asked):
    case, density = asked
    best = viterbi(density, {})
    for peer in ("dynamax", "hmmlearn"):
        if peer in case:
            assert density.log_prob({}).item() == pytest.approx(case[peer]["log_likelihood"], abs=1e-9)
            assert best[SITE].values.tolist() == case[peer]["best"]
    if "hmmlearn" in case:
        assert best.log_prob.item() == pytest.approx(case["hmmlearn"]["best_score"], abs=1e-9)
    steps = log_likelihood_by(density, {}, "time").values
    assert steps.sum().item() == pytest.approx(case["dynamax"]["log_likelihood"], abs=1e-9)
