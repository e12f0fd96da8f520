"""Plan and lower against brute force on random plated factor graphs: values and gradients, in both semirings."""

import pytest
import torch
from hypothesis import HealthCheck, given, note, settings
from torch import Tensor
from torch.testing import assert_close

from symhmm.compiler.lower import lower
from symhmm.compiler.plan import plan
from symhmm.graph import FactorGraph
from symhmm.semiring import LOG, MAX, Semiring
from symhmm.testing import enumerate_joint, random_graphs

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def gradients(total: Tensor, graph: FactorGraph) -> list[Tensor]:
    """Gradient for each term; entries of impossible events have none by definition and are left out."""
    terms = [factor.term.data for factor in graph.factors]
    found = torch.autograd.grad(total, terms, allow_unused=True)
    pairs = zip(found, terms, strict=True)
    return [torch.zeros_like(t) if g is None else g.masked_fill(t.isinf(), 0.0) for g, t in pairs]


def compare(graph: FactorGraph, semiring: Semiring, strategy: str) -> None:
    note(repr(graph))
    recipe = plan(graph, strategy=strategy)
    note(repr(recipe))
    actual, expected = lower(graph, recipe, semiring), enumerate_joint(graph, semiring)
    assert_close(actual, expected, **EXACT)
    found = gradients(actual, graph)
    assert all(g.isfinite().all() for g in found)
    if expected.isfinite():
        for factor, mine, theirs in zip(graph.factors, found, gradients(expected, graph), strict=True):
            assert_close(mine, theirs, **EXACT, msg=lambda text, factor=factor: f"gradient of {factor.name}: {text}")


@pytest.mark.parametrize("strategy", ["kernel", "stages", "segments", "sequential", "scan"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=random_graphs())
def test_log_equals_brute_force(graph: FactorGraph, strategy: str) -> None:
    compare(graph, LOG, strategy)


@pytest.mark.parametrize("strategy", ["kernel", "stages", "segments", "sequential", "scan"])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=random_graphs())
def test_max_equals_brute_force(graph: FactorGraph, strategy: str) -> None:
    compare(graph, MAX, strategy)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(graph=random_graphs(scales=False, impossible=False))
def test_members_of_a_plate_add_up(graph: FactorGraph) -> None:
    for plate in graph.plates:
        outside = any(plate not in factor.frames for factor in graph.factors)
        if not outside:
            terms = lower(graph, plan(graph, keep=[plate]), LOG)
            assert terms.shape == (graph.plates[plate].size,)
            assert_close(terms.sum(), enumerate_joint(graph), **EXACT)
