"""Joint tables of small graphs: what traceback and queries are compared with."""

import torch

from symhmm.graph import FactorGraph
from symhmm.posterior.traceback import DRAW, Chosen
from symhmm.testing import expand_factor


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


def groups(graph: FactorGraph):
    """Connected variables of the oracle."""
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
