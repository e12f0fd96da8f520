"""Occupied: which states a fit makes use of, and which it cannot tell apart."""

from collections.abc import Mapping
from itertools import combinations
from math import prod

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.expected import e_step
from symhmm.graph import Factor, FactorGraph

EMPTY = 0.5  # expected members and steps in a state below which it counts as empty
ALIKE = 1e-3  # nats by which two states' terms differ at most if they count as alike


def unused_states(density: Density, values: Mapping[str, Tensor]) -> tuple[str, ...]:
    """States that hardly anything is expected in, and pairs that explain everything equally well, in words.

    Costs one backward pass. Empty where the log-density is not finite at constrained ``values``.
    """
    graph = density.factors_at(values)
    if not graph.variables:
        return ()
    with torch.no_grad():
        found = e_step(density, values)
    if not bool(found.log_density.isfinite()):
        return ()
    counts = _counts(graph, found.weights)
    remarks = []
    for name, count in counts.items():
        for k in (count < EMPTY).nonzero()[:, 0].tolist():
            total = count.sum().item()
            remarks.append(f"state {k} of {name!r} is empty: {count[k].item():.2g} of {total:.6g} expected")
        full = (count >= EMPTY).nonzero()[:, 0].tolist()
        readers = [f for f in graph.factors if name in f.inputs and f.name != name]
        terms = [_rows(f, name) for f in readers]
        for j, k in combinations(full, 2):
            if terms and all(_alike(x[j], x[k]) for x in terms):
                remarks.append(f"states {j} and {k} of {name!r} are alike: no site tells them apart")
    return tuple(remarks)


def _counts(graph: FactorGraph, weights: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Expected number of times that each state is taken, by the name of its variable; a loop's first steps included."""
    stands_for = {n: v.current for c in graph.chains.values() for v in c.variables for n in v.initial}
    earlier = {n for c in graph.chains.values() for v in c.variables for n in v.previous}
    own = {f.name: (f, w) for f, w in zip(graph.factors, weights, strict=True)}
    out: dict[str, Tensor] = {}
    for name in graph.variables:
        if name in earlier or name not in own or name not in own[name][0].inputs:
            continue
        factor, weight = own[name]
        count = _rows(factor, name, weight).reshape(factor.inputs[name], -1).sum(1)
        scale = prod(p.scale for n, p in graph.plates.items() if n in factor.frames) * factor.scale
        label = stands_for.get(name, name)
        out[label] = out.get(label, torch.zeros_like(count)) + count / scale
    return out


def _rows(factor: Factor, name: str, data: Tensor | None = None) -> Tensor:
    """A term, or data of its shape, with the variable first."""
    term = factor.term.data if data is None else data
    return term.movedim(list(factor.term.inputs).index(name), 0)


def _alike(a: Tensor, b: Tensor) -> bool:
    same = a == b  # two impossible things are alike
    return bool((same | ((a - b).abs() < ALIKE)).all())
