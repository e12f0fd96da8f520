"""Semi-Markov models: the same as explicit durations written out, and dwell times found again."""

import itertools
import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from symhmm.distributions import dwell_chain, with_zero_diagonal
from symhmm.errors import SpecError
from symhmm.models.hmm import PoissonHMM
from symhmm.models.semi_markov import SemiMarkovHMM
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def by_segments(dwell, moves, begin, emission):
    """Sum over all ways to cut T steps into segments and to give them states; the last one may be cut off by the end.

    Args: dwell (K, R) probabilities, moves (K, K), begin (K,), emission (T, K) likelihoods.
    """
    steps, k = emission.shape
    total = 0.0
    for number in range(1, steps + 1):
        for cuts in itertools.combinations(range(1, steps), number - 1):
            edges = [0, *cuts, steps]
            for states in itertools.product(range(k), repeat=number):
                p = begin[states[0]]
                for i, s in enumerate(states):
                    r = edges[i + 1] - edges[i]
                    p = p * (moves[states[i - 1], s] if i else 1)
                    if r > dwell.shape[1]:
                        p = 0.0 * p
                    else:
                        p = p * (dwell[s, r - 1] if i < number - 1 else dwell[s, r - 1 :].sum())
                    p = p * emission[edges[i] : edges[i + 1], s].prod()
                total = total + p
    return total


@pytest.mark.parametrize("dwell", ["geometric", "poisson", "negative_binomial", "free"])
@pytest.mark.parametrize("states", [2, 3])
def test_likelihood_is_that_of_all_segmentations(dwell, states):
    g = torch.Generator().manual_seed(0)
    y = torch.randn(6, 1, generator=g)
    data = SequenceData.from_tensors({"y": y})
    model = SemiMarkovHMM(
        states, {"y": "gaussian"}, dwell, longest=4, initial=[0.25, 0.75, 0][:states] if states == 2 else "free"
    )
    density = model.log_density(data)
    values = density.unpack(density.pack(density.initial()) + 0.3 * torch.randn(density.size))
    p = model.dwell_times(values)
    moves = 1 - torch.eye(2) if states == 2 else with_zero_diagonal(values["moves"])
    begin = torch.tensor([0.25, 0.75]) if states == 2 else values["initial"]
    emission = torch.distributions.Normal(values["y.mean"], values["y.sd"]).log_prob(data.y).exp()
    wanted = by_segments(p, moves, begin, emission).log()
    # A probability of 0 is 2e-16 to torch's Categorical.
    assert_close(density.log_prob(values), wanted, rtol=0, atol=1e-12)


def test_rows_sum_to_one_and_gradients_are_finite_where_nothing_is_possible():
    dwell = torch.randn(3, 5, requires_grad=True)
    raw = torch.randn(3, 2, requires_grad=True)

    def chain(dwell, raw):
        return dwell_chain(with_zero_diagonal(raw.softmax(-1)), dwell).exp()

    p = chain(dwell, raw)
    assert_close(p.sum(-1), torch.ones(15), rtol=1e-13, atol=0)
    assert gradcheck(chain, [dwell, raw])
    assert ((p > 0).sum(-1) <= 3).all()


def test_geometric_dwell_times_are_an_ordinary_chain():
    """With stages enough, up to what is cut off."""
    y = torch.tensor([1.0, 2, 1, 7, 9, 8, 2, 1, 6, 9])[:, None]
    data = SequenceData.from_tensors({"y": y})
    model = SemiMarkovHMM(2, {"y": "poisson"}, "geometric", longest=40, initial="uniform")
    start = model.start(data) | {"dwell.prob": torch.tensor([0.5, 0.6])}
    plain = PoissonHMM(2, "y", initial="uniform").log_density(data)
    values = {"y.rate": start["y.rate"], "transition": torch.tensor([[0.5, 0.5], [0.6, 0.4]])}
    density = model.log_density(data, start=start)
    assert_close(density.log_prob(density.initial()), plain.log_prob(values), rtol=0, atol=1e-10)


def test_dwell_times_and_states_are_found_again():
    g = torch.Generator().manual_seed(2)
    states, rates = [], (3.0, 8.0)
    k = 0
    while len(states) < 900:
        states += [k] * (1 + int(torch.poisson(torch.tensor(rates[k]), generator=g)))
        k = 1 - k
    z = torch.tensor(states[:900]).reshape(3, 300).T
    data = SequenceData.from_tensors({"y": torch.tensor([-1.5, 1.5])[z] + torch.randn(z.shape, generator=g)})
    model = SemiMarkovHMM(2, {"y": "gaussian"}, "poisson", longest=20)
    fit = model.fit(data, restarts=1)
    assert_close(fit.values["dwell.rate"], torch.tensor(rates), rtol=0.15, atol=0)
    assert (model.viterbi(fit) == z).double().mean() > 0.93
    smooth = model.smooth(fit)
    assert smooth.shape == (300, 3, 2)
    assert_close(smooth.sum(-1), torch.ones(300, 3))
    geometric = SemiMarkovHMM(2, {"y": "gaussian"}, "geometric", longest=20).fit(data, restarts=1)
    assert fit.objective > geometric.objective + 20 and math.isfinite(geometric.objective)


def test_refused():
    for make, words in [
        (lambda: SemiMarkovHMM(1, {"y": "gaussian"}), "states=1"),
        (lambda: SemiMarkovHMM(2, {"y": "gaussian"}, "gamma"), "no dwell time distribution 'gamma'"),
        (lambda: SemiMarkovHMM(2, {"y": "gaussian"}, longest=1), "longest=1"),
    ]:
        with pytest.raises(SpecError, match=words):
            make()
