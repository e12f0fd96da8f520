"""Labels: the ids, times and names of columns that belong to tensors; no compiled step depends on them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


class Labels:
    """Names that belong to tensors. All labels are equal: nothing that is compiled for data depends on them.

    Args:
        ids: the N individuals, in the order of their plate.
        id, time, session, states: names of the table's columns; empty where it had none.
        columns: of each stream.
        times: array of shape (T, [S,] N) of the times as they were; None if steps were never timed.
        sessions: array of shape (S, N) of the sessions' names; None without sessions.
        units: unit of each column that has one.
        notes: what was done to the table while it was read, one sentence each.
        backend: kind of data frame that came in, and goes out.
    """

    def __init__(
        self,
        ids: Sequence[Any],
        *,
        id: str = "id",
        time: str = "",
        session: str = "",
        states: str = "state",
        columns: Mapping[str, Sequence[str]] | None = None,
        times: np.ndarray | None = None,
        sessions: np.ndarray | None = None,
        units: Mapping[str, str] | None = None,
        notes: Sequence[str] = (),
        backend: str = "pandas",
    ) -> None:
        self.ids, self.id, self.time, self.session, self.states = tuple(ids), id, time, session, states
        self.columns = {n: tuple(x) for n, x in (columns or {}).items()}
        self.times, self.sessions = times, sessions
        self.units, self.notes, self.backend = dict(units or {}), tuple(notes), backend

    def but(self, **changes: Any) -> "Labels":
        """The same with some of them replaced."""
        return Labels(**{**vars(self), **changes})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Labels)

    def __hash__(self) -> int:
        return hash(Labels)


def described(data: Any) -> str:
    """One line for each column, and what was done to the table."""
    used = data.lengths[data.lengths > 0]
    shortest, longest = (int(used.min()), int(used.max())) if len(used) else (0, 0)
    steps = f"{longest}" if shortest == longest else f"{shortest}-{longest}"
    sessions = f" in {len(used)} sessions" if data.mask.dim() == 3 else ""
    rows: list[tuple[str, str, str]] = []
    inside = data.inside
    for n, x in data.streams.items():
        seen = data.observed[n]
        rows.append((n, "stream", f"{int((inside & ~seen).sum())} missing, {_range(x[seen], data.levels.get(n))}"))
    for n, x in data.covariates.items():
        rows.append((n, "covariate", _range(x[inside], data.levels.get(n))))
    for n in data.groups:
        rows.append((n, "group", _range(data.groups[n].double(), data.levels.get(n))))
    if data.states is not None:
        known = data.states[inside] >= 0
        what = f"{int((~known).sum())} unknown, {_range(data.states[inside][known], data.state_names or None)}"
        rows.append((data.labels.states, "states", what))
    wide = [max(len(r[i]) for r in rows) for i in range(2)]
    lines = [f"  {a:<{wide[0]}}  {b:<{wide[1]}}  {c}".rstrip() for a, b, c in rows]
    title = f"SequenceData: {data.num_sequences} individuals{sessions}, {steps} steps, {data.dtype}"
    return "\n".join([title, *lines, *(f"  {note}" for note in data.labels.notes)])


def _range(x: Tensor, levels: Sequence[Any] | None) -> str:
    if levels is not None:
        shown = ", ".join(f"{i} = {v}" for i, v in enumerate(levels[:6]))
        return f"{len(levels)} levels: {shown}" if len(levels) <= 6 else f"{len(levels)} levels: {shown}, ..."
    if not x.numel():
        return "no values"
    low, high = float(x.min()), float(x.max())
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
