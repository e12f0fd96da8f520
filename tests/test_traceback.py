"""Traceback against the joint table: the best states score the maximum, and draws have the exact probabilities."""

import random

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from joint_tables import groups, keys_of, log_weight, state_of, table
from scipy import stats
from torch.testing import assert_close

from symhmm.compiler.plan import plan
from symhmm.graph import FactorGraph
from symhmm.posterior.traceback import choose, contract
from symhmm.semiring import LOG, MAX
from symhmm.testing import enumerate_joint, random_graph, random_graphs


@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(graph=random_graphs(scales=False))
def test_best_states_score_the_maximum(graph: FactorGraph) -> None:
    note(repr(graph))
    found = contract(graph, plan(graph), MAX)
    best = enumerate_joint(graph, MAX)
    assert_close(found.total, best.double(), rtol=1e-10, atol=1e-10)
    assume(best.isfinite())
    assert_close(log_weight(graph, choose(found))[0], best.detach(), rtol=1e-10, atol=1e-10)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(graph=random_graphs(scales=False))
def test_draws_are_possible_and_the_sum_is_the_density(graph: FactorGraph) -> None:
    note(repr(graph))
    found = contract(graph, plan(graph), LOG)
    total = enumerate_joint(graph)
    assert_close(found.total, total.double(), rtol=1e-10, atol=1e-10)
    assume(total.isfinite())
    chosen = choose(found, 7, torch.Generator().manual_seed(0))
    assert log_weight(graph, chosen).isfinite().all()


@pytest.mark.parametrize("seed", range(12))
def test_draws_have_the_joint_probabilities(seed: int) -> None:
    graph = random_graph(random.Random(seed), max_joint=60, max_time=3, scales=False)
    keys = keys_of(graph)
    found = contract(graph, plan(graph), LOG)
    if not found.total.isfinite() or not keys:
        pytest.skip("nothing to draw")
    n = 20_000
    chosen = choose(found, n, torch.Generator().manual_seed(seed))
    for group in groups(graph):
        joint = table(graph, group, keys)
        shape = [keys[k] for k in group]
        drawn = torch.stack([state_of(k, chosen, graph) for k in group])
        strides = torch.tensor([torch.Size(shape[i + 1 :]).numel() for i in range(len(shape))])
        seen = torch.bincount((drawn * strides[:, None]).sum(0), minlength=joint.numel()).double()
        expected = joint.reshape(-1) * n
        assert (seen[expected == 0] == 0).all()
        large = expected >= 5
        if large.sum() > 1:
            rest = (seen[~large].sum(), expected[~large].sum())
            pairs = [*zip(seen[large].tolist(), expected[large].tolist(), strict=True)]
            pairs += [(rest[0].item(), rest[1].item())] if rest[1] > 5 else []
            statistic = sum((s - e) ** 2 / e for s, e in pairs)
            assert stats.chi2.sf(statistic, len(pairs) - 1) > 1e-4
