"""Several chains that move together: no question about their states makes the dense matrix of the joint states."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from joint_tables import log_weight
from pyro.ops.indexing import Vindex
from torch.testing import assert_close

import symhmm
from symhmm.chains import filters, operator, staged_filters, stages
from symhmm.compiler.steps import ChainContract
from symhmm.posterior import prefix, traceback
from symhmm.posterior.decode import sample_states, viterbi
from symhmm.posterior.marginals import pairwise, smooth
from symhmm.posterior.prefix import filtered, step_log_likelihood
from symhmm.semiring import MAX
from symhmm.testing import enumerate_joint


@pytest.fixture(autouse=True)
def _in_double_precision(monkeypatch):
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def factorial(y, logits):
    """Three chains that are seen through their sum; the second looks at the first."""
    count = len(logits)
    with pyro.plate("animal", y.shape[1], dim=-1):
        z = [None] * count
        for t in pyro.markov(range(len(y))):
            for m in range(count):
                other = z[0] if m == 1 else torch.tensor(0)
                moves = logits[m, 0, 0] if z[m] is None else Vindex(logits)[m, other, z[m], :]
                z[m] = pyro.sample(f"z{m}_{t}", dist.Categorical(logits=moves))
            pyro.sample(f"y_{t}", dist.Normal(sum((m + 1.0) * x for m, x in enumerate(z)), 1.0), obs=y[t])


def data(steps, rows, states=2):
    generator = torch.Generator().manual_seed(1)
    return 3 * torch.rand(steps, rows, generator=generator), torch.randn(3, *[states] * 3, generator=generator)


def chain_of(density):
    return next(s for s in density.plan.steps if isinstance(s, ChainContract))


def test_questions_in_stages_equal_brute_force_and_the_dense_matrix():
    arguments = data(4, 2)
    staged, dense = (symhmm.compile(factorial, *arguments, strategy=s) for s in ("stages", "kernel"))
    assert chain_of(staged).stages and not chain_of(dense).stages
    graph = staged.graph_at({})
    best = viterbi(staged, {})
    assert_close(best.log_prob, enumerate_joint(graph, MAX), rtol=1e-10, atol=1e-10)
    chosen = traceback.choose(traceback.contract(graph, staged.plan, MAX))
    assert_close(log_weight(graph, chosen)[0], best.log_prob, rtol=1e-10, atol=1e-10)
    for question in (viterbi, smooth, pairwise, filtered):
        one, two = (question(d, {}) for d in (staged, dense))
        for site, x in one.items():
            assert_close(x.values, two[site].values, rtol=1e-10, atol=1e-10)
    assert_close(*(step_log_likelihood(d, {}).values for d in (staged, dense)), rtol=1e-10, atol=1e-10)
    drawn, wanted = sample_states(staged, {}, 4000), smooth(dense, {})
    for site, x in drawn.items():
        p = wanted[site].values
        seen = torch.stack([(x.values == k).double().mean(0) for k in range(2)], -1)
        assert float(((seen - p).abs() / (p * (1 - p) / 4000 + 1e-5).sqrt()).max()) < 5


def test_no_question_makes_the_dense_matrix(monkeypatch):
    density = symhmm.compile(factorial, *data(6, 3, 4))
    assert chain_of(density).stages  # the plan's own choice

    def refuse(*_, **__):
        raise AssertionError("a matrix of all joint states")

    for module in (operator, stages, staged_filters):
        monkeypatch.setattr(module, "dense", refuse)
    for module in (traceback, prefix):
        monkeypatch.setattr(module, "chain_tables", refuse)
    monkeypatch.setattr(operator, "chain", refuse)
    monkeypatch.setattr(filters, "prefix_weights", refuse)
    for question in (viterbi, smooth, pairwise, filtered, step_log_likelihood, sample_states):
        question(density, {})
    assert density.log_prob({}).isfinite()


def test_padding_ends_the_best_path_in_stages():
    y, _ = data(6, 3)
    mask = torch.arange(6)[:, None] < torch.tensor([6, 3, 1])

    def ragged(y, mask):
        with pyro.plate("animal", 3, dim=-1):
            z = [torch.tensor(0), torch.tensor(0)]
            for t in pyro.markov(range(6)):
                with pyro.poutine.mask(mask=mask[t]):
                    for m in range(2):
                        moves = torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.8, 0.1], [0.0, 0.5, 0.5]])
                        z[m] = pyro.sample(f"z{m}_{t}", dist.Categorical(moves[z[m]]))
                    pyro.sample(f"y_{t}", dist.Normal(z[0] - 2.0 * z[1], 1.0), obs=y[t])

    both = [viterbi(symhmm.compile(ragged, y, mask, strategy=s), {}) for s in ("stages", "kernel")]
    for site, x in both[0].items():
        assert torch.equal(x.values, both[1][site].values) and bool((x.values[~mask] == -1).all())
    assert_close(both[0].log_prob, both[1].log_prob, rtol=1e-10, atol=1e-10)


def test_messages_that_outgrow_the_memory_are_made_again_in_stages(monkeypatch):
    arguments = data(6, 3, 3)
    one = symhmm.compile(factorial, *arguments, strategy="stages")
    monkeypatch.setattr("symhmm.compiler.plan.KEPT", 1000)
    two = symhmm.compile(factorial, *arguments)
    assert [chain_of(d).strategy for d in (one, two)] == ["stages", "stages in segments"]
    assert "messages made twice" in chain_of(two).why
    assert_close(one.log_prob({}), two.log_prob({}), rtol=1e-12, atol=1e-12)
    assert_close(smooth(one, {})["z1_{time}"].values, smooth(two, {})["z1_{time}"].values, rtol=1e-10, atol=1e-10)
