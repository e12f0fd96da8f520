"""Loops as their author wrote them: the first steps, which run one by one, joined with the time axis of the others."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from symhmm.graph import Chain, FactorGraph

_DIGITS = re.compile(r"\d+")


@dataclass(frozen=True)
class Series:
    """The names of one discrete latent at the steps of a loop.

    Args:
        template: ``z_{time}``, the name in results.
        names: of the variable at each step from ``start`` on; all steps that are on the axis are one name, the last.
        start: position in the loop of the first step that has the variable.
    """

    template: str
    names: tuple[str, ...]
    start: int = 0


@dataclass(frozen=True)
class Loop:
    """A time loop: ``labels`` are the values of its variable as they appear in site names, one per step.

    The first ``first`` steps are ordinary variables and factors, those after them stand on the axis (none in an unrolled
    loop, where all steps are ordinary).
    """

    axis: str
    labels: tuple[int, ...]
    first: int
    series: tuple[Series, ...]
    positions: dict[str, int | slice]

    def position(self, name: str) -> int | slice | None:
        """The step, or the slice of steps, that a factor or variable belongs to; None if it stands outside."""
        return self.positions.get(name)


def loops(graph: FactorGraph) -> list[Loop]:
    """All time loops of a graph, whatever the tier in which they were captured."""
    found = [_vectorised(graph, chain) for chain in graph.chains.values()]
    taken = {n for loop in found for n in loop.positions}
    for axis, note in graph.loops.items():
        if axis not in graph.chains and note.tier == "unrolled":
            loop = _unrolled(graph, axis, note.steps, taken)
            if loop is not None:
                found.append(loop)
                taken |= set(loop.positions)
    return found


def _vectorised(graph: FactorGraph, chain: Chain) -> Loop:
    axis = chain.axis
    labels = _labels(chain)
    steps = slice(chain.first, chain.first + chain.length)
    owners = {f.name: f.frames for f in graph.factors} | {n: v.frames for n, v in graph.variables.items()}
    positions: dict[str, int | slice] = {n: steps for n, frames in owners.items() if axis in frames}
    earlier = {n for c in graph.chains.values() for v in c.variables for n in v.previous}
    for template in [n for n in positions if n not in earlier]:
        for k in range(chain.first):
            name = at_label(template, axis, labels[k])
            if name in owners and name != template:
                positions[name] = k
    out = []
    # A loop inside a loop has two time axes: its steps are not joined.
    nested = {n for n, v in graph.variables.items() if len(set(v.frames) & set(graph.chains)) > 1}
    for v in chain.variables:
        if v.current in nested:
            continue
        home = set(graph.variables[v.current].frames) - {axis}
        names = {k: at_label(v.current, axis, labels[k]) for k in range(chain.first)}
        names |= {chain.first - len(v.initial) + i: n for i, n in enumerate(v.initial)}
        names = {
            k: n
            for k, n in names.items()
            if n in graph.variables
            and set(graph.variables[n].frames) == home
            and graph.variables[n].size == graph.variables[v.current].size
        }
        positions.update({n: k for k, n in names.items()})
        start = chain.first
        while start - 1 in names:
            start -= 1
        first = [names[k] for k in range(start, chain.first)]
        out.append(Series(v.current, (*first, v.current), start))
    linked = {v.current for v in chain.variables} | earlier
    local = [n for n, v in graph.variables.items() if axis in v.frames and n not in linked | nested]
    out += [Series(n, (n,), chain.first) for n in local]
    return Loop(axis, labels, chain.first, tuple(out), positions)


def _labels(chain: Chain) -> tuple[int, ...]:
    """Values of the loop variable, by the names of the sites; positions where names do not show them."""
    total = chain.first + chain.length
    for v in chain.variables:
        before, token, after = v.current.partition(f"{{{chain.axis}}}")
        texts = [s[len(before) : len(s) - len(after)] for s in v.steps[:2]]
        if token and all(_DIGITS.fullmatch(t) for t in texts):
            start, stride = int(texts[0]), int(texts[-1]) - int(texts[0]) if len(texts) > 1 else 1
            labels = tuple(range(start - stride * chain.first, start + stride * chain.length, stride or 1))
            if v.steps == tuple(f"{before}{x}{after}" for x in labels[chain.first :]):
                return labels
    return tuple(range(total))


def at_label(template: str, axis: str, label: int) -> str:
    """A template at one value of the loop variable."""

    def number(match: "re.Match[str]") -> str:
        return str(label + int(match.group(1) or 0))

    return re.sub(rf"\{{{re.escape(axis)}([+-]\d+)?\}}", number, template)


def _unrolled(graph: FactorGraph, axis: str, steps: int, taken: Iterable[str]) -> Loop | None:
    """An unrolled loop, by the numbers in the names of its sites: only where they leave no doubt."""
    rows: dict[str, dict[int, str]] = {}
    for name in dict.fromkeys([*(f.name for f in graph.factors), *graph.variables]):
        numbers = _DIGITS.findall(name)
        if name not in taken and len(numbers) >= 1:
            head, _, tail = name.rpartition(numbers[-1])
            rows.setdefault(f"{head}{{{axis}}}{tail}", {})[int(numbers[-1])] = name
    full = [sorted(row) for row in rows.values() if len(row) == steps]
    if not full or steps < 2 or any(labels != full[0] for labels in full):
        return None
    labels = full[0]
    where = {label: k for k, label in enumerate(labels)}
    positions: dict[str, int | slice] = {}
    out = []
    for template, row in rows.items():
        if not set(row) <= set(labels):
            continue
        positions.update({name: where[label] for label, name in row.items()})
        known = [row[x] for x in labels if x in row and row[x] in graph.variables]
        kinds = {(frozenset(graph.variables[n].frames), graph.variables[n].size) for n in known}
        if len(known) > 1 and len(kinds) == 1 and len(known) == len(row):
            start = where[min(row, key=where.__getitem__)]
            if [where[x] for x in labels if x in row] == list(range(start, start + len(row))):
                out.append(Series(template, tuple(known), start))
    return Loop(axis, tuple(labels), steps, tuple(out), positions)
