"""The middle tier: steps that were run one by one, stacked over time where their structures agree."""

from dataclasses import replace
from typing import Any

import torch

from symhmm.capture.loops import Loop
from symhmm.capture.names import Names
from symhmm.capture.records import Record, Result

_MOST_LEAD = 4
Rows = dict[int, list[Record]]


def stack(result: Result) -> Result:
    """Join the records of each loop over its steps; a loop whose steps differ stays as it is.

    Args:
        result: a run in which all loops were run step by step.

    Returns:
        a run that looks as if the loops had been vectorised.
    """
    for loop in list(result.loops.values()):
        rows = _rows(loop, result)
        if rows is None:
            continue
        for lead in range(max(loop.history, 1), min(loop.history + _MOST_LEAD, loop.total - 1)):
            joined = _Stacking(loop, rows, lead, result.names).join()
            if joined is not None:
                result = _with_stacked(result, joined, rows, lead)
                break
    return result


def _rows(loop: Loop, result: Result) -> Rows | None:
    """Records of each step, or None if other sites depend on what happens inside the loop."""
    rows: Rows = {}
    inside: set[str] = set()
    for record in result.records.values():
        if (loop.key, "concrete") in [step[:2] for step in record.steps]:
            if record.steps[:-1] != loop.steps or record.axes:
                return None  # a loop inside this one
            rows.setdefault(record.steps[-1][2], []).append(record)
            inside.add(record.name)
    outside = [d for r in result.records.values() if r.name not in inside for d in r.dims]
    return rows if len(rows) == loop.total and not inside & set(outside) else None


class _Stacking:
    """One attempt: steps from ``lead`` on are joined if each looks the same as seen from its own step."""

    def __init__(self, loop: Loop, rows: Rows, lead: int, names: Names) -> None:
        self.loop, self.rows, self.lead, self.names = loop, rows, lead, names
        self.where = {r.name: (k, p) for k, row in rows.items() for p, r in enumerate(row)}
        self.steps = range(lead, loop.total)

    def relative(self, dim: str, k: int) -> tuple[Any, ...]:
        """What a dimension is as seen from step ``k``: a site some steps back, a plate of the step, or a fixed name."""
        if dim in self.where:
            step, position = self.where[dim]
            return ("site", position, k - step)
        for position, record in enumerate(self.rows[k]):
            if dim in record.plates and not self._everywhere(dim):
                return ("plate", position, record.plates.index(dim))
        return ("name", dim, 0)

    def _everywhere(self, plate: str) -> bool:
        return all(any(plate in r.plates for r in self.rows[k]) for k in self.steps)

    def shape(self, record: Record, k: int) -> tuple[Any, ...]:
        """Everything about a record that must not change from step to step."""
        dims = sorted((self.relative(d, k), s) for d, s in zip(record.dims, record.tensor.shape, strict=True))
        plates = tuple(self.relative(p, k) for p in record.plates)
        return dims, plates, record.role, record.scale, record.observed, record.tensor.dtype, _support(record)

    def join(self) -> tuple[list[Record], int] | None:
        """Records for all steps at once, and how far back they look; None if the steps differ."""
        rows = self.rows
        shapes = [[self.shape(r, k) for r in rows[k]] for k in self.steps]
        if any(shape != shapes[0] for shape in shapes):
            return None
        lags = [lag for dims, *_ in shapes[0] for (kind, _, lag), _ in dims if kind == "site"]
        history = max([self.loop.history, *lags])
        first = [_support(r) for r in rows[self.lead]]
        if self.lead < history or any(
            [_support(r) for r in rows[self.lead - lag]] != first for lag in range(1, history + 1)
        ):
            return None
        joined = [self._joined(p) for p in range(len(first))]
        helpers = [
            replace(r, name=self._name(p, lag), steps=(*self.loop.steps, (self.loop.key, "prev", lag)))
            for lag in range(history, 0, -1)
            for p, r in enumerate(joined)
            if r.support is not None
        ]
        return helpers + joined, history

    def _joined(self, position: int) -> Record:
        first = self.rows[self.lead][position]
        order = sorted(range(len(first.dims)), key=lambda i: self.relative(first.dims[i], self.lead))
        tensors = []
        for k in self.steps:
            record = self.rows[k][position]
            mine = sorted(range(len(record.dims)), key=lambda i: self.relative(record.dims[i], k))
            tensors.append(record.tensor.permute(mine))
        return replace(
            first,
            name=self._name(position, 0),
            tensor=torch.stack(tensors),
            dims=(self.loop.key, *(self._dim(first.dims[i]) for i in order)),
            plates=tuple(map(self._dim, first.plates)),
            axes=(*first.axes, self.loop.key),
            steps=(*self.loop.steps, (self.loop.key, "curr", 0)),
        )

    def _dim(self, dim: str) -> str:
        kind, position, rest = self.relative(dim, self.lead)
        if kind == "site":
            return self._name(position, rest)
        if kind == "plate":
            return self._token([self.rows[k][position].plates[rest] for k in self.steps], 0)
        return dim

    def _name(self, position: int, lag: int) -> str:
        return self._token([self.rows[k - lag][position].name for k in self.steps], lag)

    def _token(self, texts: list[str], lag: int) -> str:
        """A name with a token for the part in which ``texts`` differ."""
        prefix = _common(texts).rstrip("0123456789")
        rest = [text[len(prefix) :] for text in texts]
        suffix = _common([text[::-1] for text in rest])[::-1].lstrip("0123456789")
        middles = tuple(text[: len(text) - len(suffix)] for text in rest)
        return prefix + self.names.text(self.loop.key, middles, -lag) + suffix


def _common(texts: list[str]) -> str:
    """The longest beginning that all ``texts`` share."""
    first, last = min(texts), max(texts)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def _support(record: Record) -> tuple[int, ...] | None:
    return None if record.support is None else tuple(record.support.shape)


def _with_stacked(result: Result, joined: tuple[list[Record], int], rows: Rows, lead: int) -> Result:
    records, history = joined
    loop = next(result.loops[r.steps[-1][0]] for r in records)
    gone = {r.name for k, row in rows.items() if k >= lead for r in row}
    kept = {name: r for name, r in result.records.items() if name not in gone}
    kept.update({r.name: r for r in records})
    # Plates of single steps get the name of all of them.
    plates = dict(result.plates)
    for name in (p for r in records for p in r.plates if p not in plates):
        plates[name] = result.plates[result.names.resolve(name, {loop.key: 0})]
    loops = {**result.loops, loop.key: replace(loop, vector=True, lead=lead, history=history)}
    return replace(result, records=kept, plates=plates, loops=loops)
