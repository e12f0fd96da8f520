"""Traceback against the joint table: the best states score the maximum, and draws have the exact probabilities."""

import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from scipy import stats
from torch.testing import assert_close

from symhmm.compiler.plan import plan
from symhmm.graph import FactorGraph
from symhmm.posterior.traceback import DRAW, Chosen, choose, contract
from symhmm.semiring import LOG, MAX
from symhmm.testing import enumerate_joint, expand_factor, random_graph, random_graphs


def state_of(key, chosen: Chosen, graph: FactorGraph):
    """Chosen states, one per draw, of a variable of the oracle: its site at one step and its plate members."""
    site, members = key[0], dict(key[1])
    for chain in graph.chains.values():
        for v in chain.variables:
            if site in v.steps:
                site, members = v.current, members | {chain.axis: v.steps.index(site)}
    named = chosen[site]
    assert set(named.names) == {DRAW, *members}
    return named.data.permute([named.names.index(n) for n in (DRAW, *members)])[(slice(None), *members.values())].long()


def log_weight(graph: FactorGraph, chosen: Chosen):
    """Log-weight of the chosen states by multiplying all factors, one number per draw (no scales)."""
    draws = next(iter(chosen.values())).data.shape[0] if chosen else 1
    total = torch.zeros(draws, dtype=torch.float64)
    for factor in graph.factors:
        for cell in expand_factor(factor, graph):
            states = tuple(state_of(k, chosen, graph) for k in cell.keys)
            total = total + cell.table.detach()[states]
    return total


def keys_of(graph: FactorGraph):
    cells = [cell for f in graph.factors for cell in expand_factor(f, graph)]
    return {k: n for cell in cells for k, n in zip(cell.keys, cell.table.shape, strict=True)}


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
    import random

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


def groups(graph: FactorGraph):
    """Connected variables."""
    found: list[set] = []
    for factor in graph.factors:
        for cell in expand_factor(factor, graph):
            mine = set(cell.keys)
            touching = [g for g in found if g & mine]
            found = [g for g in found if not g & mine] + [mine.union(*touching)]
    return [sorted(g) for g in found if g]


def table(graph: FactorGraph, group, keys):
    """Posterior probabilities of a connected group, one dimension per variable."""
    joint = torch.zeros([keys[k] for k in group], dtype=torch.float64)
    for factor in graph.factors:
        for cell in expand_factor(factor, graph):
            if cell.keys and set(cell.keys) <= set(group):
                order = sorted(range(len(cell.keys)), key=lambda i: group.index(cell.keys[i]))
                shape = [keys[k] if k in cell.keys else 1 for k in group]
                joint = joint + cell.table.detach().permute(order).reshape(shape)
    return joint.reshape(-1).softmax(0).reshape(joint.shape)
