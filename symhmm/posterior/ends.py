"""Ends: where the sequence of each member of a plate ends, read off a graph whose later observations are masked.

Summing over the states of padding changes nothing, since their probabilities sum to one. Maximising over them does: the
best continuation depends on the state before it. The best path therefore stops at the last observation of each member.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from funsor.domains import Bint
from funsor.tensor import Tensor as Term

from symhmm.compiler.lower import Named
from symhmm.graph import Factor, FactorGraph
from symhmm.posterior.series import Loop


@dataclass(frozen=True)
class Ends:
    """Number of steps of each loop that count, by loop."""

    graph: FactorGraph
    counts: dict[str, Named]

    def stops(self, axis: str, frames: frozenset[str]) -> Named | None:
        """Steps of the time axis that count for each member of ``frames``; None if all do."""
        if axis not in self.counts:
            return None
        count = self._within(self.counts[axis], frames)
        return Named((count.data - self.graph.chains[axis].first).clamp_min(0), count.names)

    def running(self, axis: str, frames: frozenset[str]) -> Named | None:
        """Whether a step of the time axis counts; None if ``axis`` is no time axis, or all of its steps do."""
        stops = self.stops(axis, frames)
        if stops is None:
            return None
        return Named(torch.arange(self.graph.chains[axis].length) < stops.data.unsqueeze(-1), [*stops.names, axis])

    def steps(self, loop: Loop, frames: frozenset[str]) -> Named | None:
        """Whether each step of the loop, the first ones included, counts for each member of ``frames``."""
        if loop.axis not in self.counts:
            return None
        count = self._within(self.counts[loop.axis], frames)
        return Named(torch.arange(len(loop.labels)) < count.data.unsqueeze(-1), [*count.names, loop.axis])

    def _within(self, count: Named, frames: frozenset[str]) -> Named:
        # What stands outside of a plate lasts as long as the longest of its members.
        data, names = count.data, list(count.names)
        for name in count.names:
            if name not in frames:
                data = data.amax(names.index(name))
                names.remove(name)
        return Named(data, names)


def ends(graph: FactorGraph, loops: Iterable[Loop]) -> Ends:
    """Where each loop's observations end; members without any observation keep all their steps."""
    counts = {}
    for loop in loops:
        plates = sorted(
            {p for f in graph.factors if loop.position(f.name) is not None for p in f.frames} & set(graph.plates)
        )
        # Plates inside one step have no sequence of their own.
        homes = [set(graph.variables[v].frames) for s in loop.series for v in s.names if v in graph.variables]
        plates = [p for p in plates if any(p in home for home in homes)]
        if bool(_seen(graph, loop, plates, len(loop.labels) - 1).all()):
            continue  # every sequence lasts to the last step: most data are not padded
        seen = _seen(graph, loop, plates, 0)
        count = torch.where(seen, torch.arange(1, len(loop.labels) + 1), 0).amax(-1)
        count = torch.where(count == 0, len(loop.labels), count)
        if bool((count < len(loop.labels)).any()):
            counts[loop.axis] = Named(count, plates)
    return Ends(graph, counts)


def _seen(graph: FactorGraph, loop: Loop, plates: list[str], first: int) -> torch.Tensor:
    """Whether each member has an observation at each step of a loop from ``first`` on: (*plates, steps)."""
    length = len(loop.labels)
    seen = torch.zeros([graph.plates[p].size for p in plates] + [length], dtype=torch.bool)
    for factor in graph.factors:
        where = loop.position(factor.name)
        if where is None or factor.role not in ("observed", "factor"):
            continue
        steps = where if isinstance(where, slice) else slice(where, where + 1)
        if steps.stop <= first:
            continue
        term = Named.from_funsor(factor.term, factor.name)
        kept = [n for n in term.names if n in plates or n == loop.axis]
        other = [i for i, n in enumerate(term.names) if n not in kept]
        data, late = term.data.detach(), max(first, steps.start)
        if loop.axis in kept:
            data = data.narrow(term.names.index(loop.axis), late - steps.start, steps.stop - late)
        active = data.any(other[0]) if len(other) == 1 else (data != 0).sum(other) > 0 if other else data != 0
        seen[..., late : steps.stop] |= Named(active, kept).aligned([*plates, loop.axis])
    return seen[..., first:]


def without_padding(graph: FactorGraph, found: Ends, loops: Iterable[Loop]) -> FactorGraph:
    """The graph in which the discrete latents of steps run one by one have one possible value after the end."""
    factors = list(graph.factors)
    for loop in loops:
        if loop.axis not in found.counts:
            continue
        single = {name: k for s in loop.series for k, name in enumerate(s.names, s.start) if name != s.template}
        for i, factor in enumerate(factors):
            if factor.name in single and factor.role == "discrete latent":
                running = found.steps(loop, frozenset(factor.frames))
                assert running is not None
                ended = ~running.data[..., single[factor.name]]
                if bool(ended.any()):
                    factors[i] = _fixed(factor, Named(ended, running.names[:-1]))
    changed = any(a is not b for a, b in zip(factors, graph.factors, strict=True))
    return replace(graph, factors=tuple(factors)) if changed else graph


def _fixed(factor: Factor, ended: Named) -> Factor:
    term = Named.from_funsor(factor.term, factor.name)
    names = [*(n for n in ended.names if n not in term.names), *term.names]
    data = term.aligned(names)
    own = names.index(factor.name)
    size = data.shape[own]
    only = torch.where(torch.arange(size) == 0, 0.0, -torch.inf).to(data.dtype)
    only = only.reshape([size if i == own else 1 for i in range(len(names))])
    data = torch.where(ended.aligned(names), only, data)
    return replace(factor, term=Term(data, OrderedDict((n, Bint[s]) for n, s in zip(names, data.shape, strict=True))))
