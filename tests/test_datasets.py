"""Shipped and simulated data: equal to their source, and to the truth they claim."""

import csv

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch.testing import assert_close

from symhmm.datasets import earthquakes, simulate_mixed_hmm
from symhmm.errors import DataError


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_earthquakes_are_the_published_counts(data_file):
    with data_file("earthquakes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert earthquakes().tolist() == [float(row["count"]) for row in rows]
    assert (rows[0]["year"], rows[-1]["year"]) == ("1900", "2006")


def test_earthquakes_have_the_likelihood_of_one_poisson():
    counts = earthquakes().double()
    # Zucchini, MacDonald and Langrock 2016: one state.
    assert_close(dist.Poisson(counts.mean()).log_prob(counts).sum().item(), -391.9189, rtol=0, atol=5e-5)


def test_same_seed_same_data():
    first, second, third = (simulate_mixed_hmm(3, 20, generator=seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first[0].y, second[0].y) and torch.equal(first[1].states, second[1].states)
    assert not torch.equal(first[0].y, third[0].y)


@pytest.mark.parametrize("emission", ["gaussian", "poisson"])
def test_shapes_lengths_and_missing_values(emission):
    data, truth = simulate_mixed_hmm(
        30, 80, 2, emission=emission, shortest=10, missing=0.2, spread=1.0, generator=seeded()
    )
    assert (data.num_steps, data.num_sequences) == (80, 30) == data.y.shape == data.mask.shape
    assert data.lengths.max() == 80 and data.lengths.min() >= 10 and len(data.lengths.unique()) > 5
    inside = torch.arange(80).unsqueeze(-1) < data.lengths
    assert torch.equal(inside, truth.states >= 0)
    assert not (data.mask & ~inside).any()
    assert_close(data.mask[inside].double().mean().item(), 0.8, rtol=0, atol=0.03)
    assert data.y.isfinite().all()
    assert str(data).startswith(f"SequenceData: 30 individuals, {data.lengths.min()}-80 steps, ")


def test_statistics_approach_the_truth():
    spread = torch.tensor([[0.0, 0.9, 0.2], [0.5, 0.0, 0.5], [0.0, 0.4, 0.0]])
    logits = torch.tensor([[1.0, -1.0, -2.0], [-1.0, 0.0, -1.5], [-1.0, -2.0, 0.0]])
    data, truth = simulate_mixed_hmm(400, 300, spread=spread, logits=logits, generator=seeded())
    assert_close(truth.logits.softmax(-1), logits.softmax(-1))
    assert_close(truth.effects.std(0), spread, rtol=0.12, atol=1e-6)
    assert_close(truth.effects.diagonal(dim1=1, dim2=2), torch.zeros(400, 3))
    for state in range(3):
        seen = data.y[truth.states == state]
        assert_close((seen.mean(), seen.std()), (truth.loc[state], truth.scale[state]), rtol=0.03, atol=0.03)
        stay = (truth.states[1:] == state) & (truth.states[:-1] == state)
        share = stay.sum() / (truth.states[:-1] == state).sum()
        own = truth.transitions[:, state, state]
        weight = (truth.states[:-1] == state).sum(0)
        assert_close(share, (own * weight).sum() / weight.sum(), rtol=0, atol=0.01)


def test_poisson_counts_have_their_rates():
    data, truth = simulate_mixed_hmm(50, 400, 3, emission="poisson", spread=0.0, generator=seeded())
    for state in range(3):
        seen = data.y[truth.states == state]
        assert_close(seen.mean(), truth.loc[state], rtol=0.03, atol=0)
        assert_close(seen.std(), truth.scale[state], rtol=0.05, atol=0)
    assert (truth.effects == 0).all()


def test_data_fit_a_plain_pyro_loop():
    data, truth = simulate_mixed_hmm(3, 4, 2, shortest=2, missing=0.3, generator=seeded())

    @config_enumerate
    def model(data):
        with pyro.plate("individual", data.num_sequences, dim=-1):
            z = torch.zeros(1, dtype=torch.long)
            for t in pyro.markov(range(data.num_steps)):
                with pyro.poutine.mask(mask=data.mask[t]):
                    rows = torch.arange(data.num_sequences)
                    z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(truth.transitions)[rows, z, :]))
                    pyro.sample(f"y_{t}", dist.Normal(truth.loc[z], truth.scale[z]), obs=data.y[t])

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda data: None, data)
    assert torch.tensor(loss).isfinite()


def test_all_numbers_have_the_dtype_asked_for():
    data, truth = simulate_mixed_hmm(2, 5, dtype=torch.float64, generator=seeded())
    numbers = [data.y, truth.logits, truth.spread, truth.effects, truth.loc, truth.scale, truth.transitions]
    assert {x.dtype for x in numbers} == {torch.float64}


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ((0,), {}, "nothing to simulate"),
        ((2, 5), {"shortest": 6}, "6 to 5 steps"),
        ((2, 5), {"missing": 1.0}, "not a probability"),
        ((2, 5), {"emission": "beta"}, "unknown emission 'beta'"),
        ((2, 5), {"spread": -1.0}, "wanted >= 0"),
    ],
)
def test_impossible_simulations_are_refused(arguments, options, words):
    with pytest.raises(DataError, match=words):
        simulate_mixed_hmm(*arguments, **options)
