"""Queries against the joint table of random plated graphs, and against themselves on padded and looped programs."""

from dataclasses import replace

import funsor
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from joint_tables import groups, keys_of, table
from torch import Tensor
from torch.testing import assert_close

import symhmm
from symhmm.graph import FactorGraph
from symhmm.posterior.marginals import pairwise, smooth, transition_counts
from symhmm.posterior.prefix import filtered, step_log_likelihood
from symhmm.testing import enumerate_joint, random_graphs

EXACT = {"rtol": 1e-10, "atol": 1e-10}
slow = settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


def marginal(graph: FactorGraph, names: list) -> Tensor:
    """Probabilities of some variables of the oracle that are connected."""
    group = next(g for g in groups(graph) if names[0] in g)
    joint = table(graph, group, keys_of(graph))
    kept = joint.sum([i for i, k in enumerate(group) if k not in names]) if len(group) > len(names) else joint
    left = [k for k in group if k in names]
    return kept.permute([left.index(n) for n in names])


def find(graph: FactorGraph, site: str, step: int | None):
    """Keys of the oracle that a result is about, by plate members in the order of the result's plates."""
    keys = keys_of(graph)
    for chain in graph.chains.values():
        for v in chain.variables:
            if v.current == site:
                site = (*v.initial, *v.steps)[step]
    axes = [(axis, step) for axis in graph.chains if axis in getattr(graph.variables.get(site), "frames", ())]
    found = {tuple(m for m in k[1] if m[0] in graph.plates): k for k in keys if k[0] == site and set(axes) <= set(k[1])}
    return found


def members(answer, graph: FactorGraph):
    """Index into an answer's plates, and members as the oracle writes them."""
    plates = [d for d in answer.dims if d in graph.plates]
    for index in (
        torch.cartesian_prod(*(torch.arange(graph.plates[p].size) for p in plates)).reshape(-1, len(plates)).tolist()
        if plates
        else [[]]
    ):
        yield tuple(index), tuple(sorted(zip(plates, index, strict=True)))


@slow
@given(graph=random_graphs(scales=False, max_joint=1000))
def test_smoothing_and_pairs_are_those_of_the_joint_table(graph: FactorGraph) -> None:
    note(repr(graph))
    assume(graph.variables and enumerate_joint(graph).isfinite())
    density = symhmm.compile(graph)
    found = smooth(density, {})
    for site, answer in found.items():
        steps = range(answer.values.shape[0]) if answer.dims[0] in graph.chains else [None]
        for t in steps:
            wanted = find(graph, site, t)
            for index, name in members(answer, graph):
                mine = answer.values[index] if t is None else answer.values[(t, *index)]
                assert_close(mine, marginal(graph, [wanted[name]]), **EXACT)
    assume(graph.chains)
    chained = [v.current for c in graph.chains.values() for v in c.variables]
    for site, answer in pairwise(density, {}, chained).items():
        for t in range(answer.values.shape[0]):
            before, after = find(graph, site, t), find(graph, site, t + 1)
            for index, name in members(answer, graph):
                pair = [before[name], after[name]]
                if any(set(pair) <= set(g) for g in groups(graph)):
                    assert_close(answer.values[(t, *index)], marginal(graph, pair), **EXACT)
        counts = transition_counts(density, {}, [site])[site]
        assert_close(counts.values, answer.values.sum(0), **EXACT)


@slow
@given(graph=random_graphs(scales=False, max_joint=300, max_time=3))
def test_filter_is_smoothing_of_shorter_data(graph: FactorGraph) -> None:
    note(repr(graph))
    assume(len(graph.chains) == 1 and enumerate_joint(graph).isfinite())
    (chain,) = graph.chains.values()
    density = symhmm.compile(graph)
    found = filtered(density, {})
    for length in range(1, chain.length + 1):
        shorter = cut(graph, length)
        if not enumerate_joint(shorter).isfinite():
            continue
        theirs = smooth(symhmm.compile(shorter), {})
        for site in found:
            assert_close(found[site].values[length - chain.length - 1], theirs[site].values[-1], **EXACT)
        total = step_log_likelihood(density, {}).values[: chain.first + length].sum()
        outside = [f for f in graph.factors if chain.axis not in f.frames and not inside(f, chain)]
        base = enumerate_joint(FactorGraph(tuple(outside), graph.variables, graph.plates))
        assert_close(total + base, enumerate_joint(shorter), **EXACT)


def inside(factor, chain) -> bool:
    return any(factor.name in v.initial for v in chain.variables)


def cut(graph: FactorGraph, length: int) -> FactorGraph:
    """The graph with a shorter time axis."""
    (chain,) = graph.chains.values()
    factors = []
    for f in graph.factors:
        names = list(f.term.inputs)
        if chain.axis in names:
            data = f.term.data.narrow(names.index(chain.axis), 0, length)
            f = replace(
                f, term=funsor.Tensor(data, {n: funsor.Bint[s] for n, s in zip(names, data.shape, strict=True)})
            )
        factors.append(f)
    variables = tuple(replace(v, steps=v.steps[:length]) for v in chain.variables)
    shorter = replace(chain, length=length, variables=variables)
    return replace(graph, factors=tuple(factors), chains={chain.axis: shorter})
