"""From a table to clean rows: one row per step, sorted, gaps inserted, text as codes, every fault named by column and row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symhmm.errors import DataError
from symhmm.tables.gaps import Policy, Steps, as_dates, as_times, check_duplicates, fill_missing, order_steps
from symhmm.tables.read import Column, Raw, read_table
from symhmm.tables.support import check_support, rows_text, values_text


@dataclass(frozen=True)
class Spec:
    """What the columns of a table are.

    Args:
        id: names individuals; None if there is one.
        time, session, states: columns; None if there are none.
        streams: columns of each stream.
        covariates, groups: columns.
        step: length of a step, see `symhmm.tables.gaps.order_steps`.
        missing_covariates: what to do about them.
        support: family or constraint of streams, by name.
        categories: levels of text columns in the order of their codes, by column.
    """

    id: str | None
    time: str | None
    session: str | None
    streams: Mapping[str, tuple[str, ...]]
    covariates: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    states: str | None = None
    step: Any = None
    missing_covariates: Policy = "error"
    support: Mapping[str, Any] | None = None
    categories: Mapping[str, Sequence[Any]] | None = None

    @property
    def wanted(self) -> dict[str, str]:
        """What each column is for, by its name."""
        single = {"id": self.id, "time": self.time, "session": self.session, "states": self.states}
        out = {c: use for use, c in single.items() if c is not None}
        out |= {c: f"stream {n!r}" for n, many in self.streams.items() for c in many}
        return out | dict.fromkeys(self.covariates, "covariates") | dict.fromkeys(self.groups, "groups")


@dataclass(frozen=True)
class Long:
    """Clean rows of a table, sorted by individual, session and time; R of them, inserted ones included.

    Args:
        subject, session, step: shape (R,), where each row stands.
        row: shape (R,), row of the table, -1 if inserted.
        values: by column, shape (R,): numbers, or codes of ``levels``.
        missing: by column, shape (R,), bool.
        groups: by column, shape (N,), codes.
        levels: by column, what codes stand for.
        ids: of the N individuals.
        sessions: shape (S, N), names of sessions; None without.
        times: shape (R,), as in the table; None without.
        notes: what was done.
        backend: kind of the table.
    """

    subject: np.ndarray
    session: np.ndarray
    step: np.ndarray
    row: np.ndarray
    values: dict[str, np.ndarray]
    missing: dict[str, np.ndarray]
    groups: dict[str, np.ndarray]
    levels: dict[str, tuple[Any, ...]]
    ids: tuple[Any, ...]
    sessions: np.ndarray | None
    times: np.ndarray | None
    notes: tuple[str, ...]
    backend: str


def long_table(table: Any, spec: Spec) -> Long:
    """Read, check, sort and complete a table.

    Raises:
        DataError: anything that would make the numbers mean something else than they seem to: see the modules of this
            room. Every text names the column and the rows.
    """
    raw = read_table(table, spec.wanted)
    notes: list[str] = []

    # Step 1: whose row is it, and of which session.
    ids, subject = _names(raw, spec.id)
    sessions, session = _sessions(raw, spec.session, subject, len(ids))
    sequence = subject * (1 if sessions is None else len(sessions)) + session

    # Step 2: one order, one row per step.
    column = raw.columns[spec.time] if spec.time is not None else None
    seconds, dates = as_times(column) if column is not None else (np.arange(raw.size, dtype=float), False)
    order = np.lexsort((seconds, sequence))
    if column is not None:
        _, short = np.unique(sequence[order], return_inverse=True)
        called = [_called(spec, ids, sessions, subject[i], session[i]) for i in order[np.r_[True, np.diff(short) != 0]]]
        check_duplicates(short, seconds[order], order, called, column.name)
    moved = int((np.diff(order) < 0).sum())
    if moved:
        notes.append("rows were not in order of individual and time, and have been sorted")
    _one_row_each(sequence, spec, notes)
    _, short = np.unique(sequence[order], return_inverse=True)
    steps = order_steps(short, seconds[order], order, spec.time or "", spec.step, dates, column is not None)
    notes += steps.notes
    starts = np.r_[True, np.diff(steps.sequence) != 0]
    first = order[np.r_[True, np.diff(short) != 0]][np.cumsum(starts) - 1]  # a row of the same sequence
    row = np.full(len(steps.step), -1)
    row[steps.place] = order

    # Step 3: what was seen, and what it depends on.
    values: dict[str, np.ndarray] = {}
    missing: dict[str, np.ndarray] = {}
    levels: dict[str, tuple[Any, ...]] = {}
    for name, columns in spec.streams.items():
        for c in columns:
            numbers = _coded(raw.columns[c], spec, levels, notes, f"stream {name!r}")
            _check_stream(c, name, numbers, raw.columns[c].missing, spec)
            values[c], missing[c] = _placed(numbers, raw.columns[c].missing, steps, order)
    for c in spec.covariates:
        numbers = _coded(raw.columns[c], spec, levels, notes, "covariates")
        values[c], missing[c] = _placed(numbers, raw.columns[c].missing, steps, order)
        values[c] = _complete(c, values[c], missing[c], steps, row, spec, c in levels, notes)
        missing[c] = np.zeros(len(row), dtype=bool)
    groups = {c: _group(raw.columns[c], subject, ids, spec, levels) for c in spec.groups}
    if spec.states is not None:
        codes = _states(raw.columns[spec.states], spec, levels)
        values[spec.states], missing[spec.states] = _placed(codes, raw.columns[spec.states].missing, steps, order)
    times = None if column is None else _times(column, steps, dates)
    return Long(
        subject[first], session[first], steps.step, row, values, missing, groups, levels, ids, sessions, times,
        tuple(notes), raw.backend,
    )  # fmt: skip


def _names(raw: Raw, column: str | None) -> tuple[tuple[Any, ...], np.ndarray]:
    """Sorted names of a column, and their codes row by row."""
    if column is None:
        return (0,), np.zeros(raw.size, dtype=np.int64)
    c = raw.columns[column]
    if c.missing.any():
        raise DataError(
            f"column {column!r} names no one in some rows.", details=[rows_text(np.flatnonzero(c.missing))],
            suggestion="drop these rows, or fill the names in",
        )  # fmt: skip
    values = c.values
    if c.kind == "number" and not np.array_equal(values, np.floor(values)):
        bad = np.flatnonzero(values != np.floor(values))
        raise DataError(
            f"column {column!r} has fractions, which name no one.", details=[values_text(values[bad], bad)],
            suggestion="the column that names individuals",
        )  # fmt: skip
    found, codes = np.unique(values.astype(str) if c.kind == "text" else values, return_inverse=True)
    kind = {"number": int, "text": str, "time": str}[c.kind]
    return tuple(kind(x) for x in found.tolist()) if c.kind != "time" else tuple(map(str, found)), codes


def _sessions(raw: Raw, column: str | None, subject: np.ndarray, n: int) -> tuple[np.ndarray | None, np.ndarray]:
    """Names of the sessions, (S, N), and the place of each row's session among those of its individual."""
    if column is None:
        return None, np.zeros(raw.size, dtype=np.int64)
    names, codes = _names(raw, column)
    pairs, inverse = np.unique(subject * len(names) + codes, return_inverse=True)
    owner = pairs // len(names)
    place = np.arange(len(pairs)) - np.searchsorted(owner, owner)
    table = np.full((int(place.max()) + 1, n), None, dtype=object)
    for p, o, name in zip(place, owner, pairs % len(names), strict=True):
        table[p, o] = names[name]
    return table, place[inverse]


def _called(spec: Spec, ids: Sequence[Any], sessions: np.ndarray | None, subject: int, session: int) -> str:
    who = f"{spec.id} {ids[subject]!r}" if spec.id is not None else "the table"
    return who if sessions is None else f"{who}, {spec.session} {sessions[session, subject]!r}"


def _one_row_each(sequence: np.ndarray, spec: Spec, notes: list[str]) -> None:
    counts = np.unique(sequence, return_counts=True)[1]
    if counts.max() == 1 and len(counts) > 1:
        if spec.time is not None:
            raise DataError(
                f"column {spec.session or spec.id!r} has another name in each of the {len(counts)} rows: no sequence has "
                "two steps.",
                suggestion="the column that names individuals; or leave time= out if each row is an individual of its own",
            )
        notes.append("each row is an individual of its own")
    elif (counts == 1).any():
        notes.append(f"{int((counts == 1).sum())} of {len(counts)} sequences have a single row")


def _coded(c: Column, spec: Spec, levels: dict[str, tuple[Any, ...]], notes: list[str], use: str) -> np.ndarray:
    """Numbers of a column; text becomes codes of its levels, which are noted down."""
    if c.kind == "time":
        raise DataError(
            f"column {c.name!r} holds dates.", details=[f"wanted numbers or text for {use}"],
            suggestion="numbers made of them, such as the hour of the day",
        )  # fmt: skip
    declared = (spec.categories or {}).get(c.name, c.levels)
    if c.kind == "number" and declared is None:
        return c.values
    known = ~c.missing
    if declared is None:
        readable = np.array([_reads_as_number(x) for x in c.values]) & known
        if readable.any():
            bad = np.flatnonzero(known & ~readable)
            if len(bad):
                raise DataError(
                    f"column {c.name!r} mixes numbers and text.", details=[values_text(c.values[bad], bad)],
                    suggestion="correct these rows, or leave them empty if they are missing",
                )  # fmt: skip
            notes.append(f"column {c.name!r} held numbers written as text")
            return np.array([float(x) if k else np.nan for x, k in zip(c.values, known, strict=True)])
        declared = sorted(set(c.values[known].tolist()))
    return _by_levels(c, declared, levels)


def _by_levels(c: Column, declared: Sequence[Any], levels: dict[str, tuple[Any, ...]]) -> np.ndarray:
    place = {x: i for i, x in enumerate(declared)}
    codes = np.array([place.get(x, -1) if not m else 0 for x, m in zip(c.values.tolist(), c.missing, strict=True)])
    if (codes < 0).any():
        bad = np.flatnonzero(codes < 0)
        raise DataError(
            f"column {c.name!r} has values that are none of its categories.",
            details=[values_text(c.values[bad], bad), f"wanted {', '.join(map(repr, declared))}"],
        )
    levels[c.name] = tuple(declared)
    return codes


def _reads_as_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_stream(c: str, stream: str, values: np.ndarray, missing: np.ndarray, spec: Spec) -> None:
    if missing.all():
        raise DataError(
            f"column {c!r} has no values: every row is missing.",
            suggestion=f"leave stream {stream!r} out, or look at how the file was read",
        )
    rows = np.flatnonzero(~missing)
    seen = values[rows].astype(np.float64)
    _finite(c, seen, rows)
    family = (spec.support or {}).get(stream, (spec.support or {}).get(c))
    if family is not None:
        check_support(c, seen, rows, family)


def _finite(c: str, seen: np.ndarray, rows: np.ndarray) -> None:
    infinite = np.isinf(seen)
    if infinite.any():
        raise DataError(
            f"column {c!r} has infinite values.", details=[rows_text(rows[infinite])],
            suggestion="leave them empty if they are missing",
        )  # fmt: skip


def _placed(values: np.ndarray, missing: np.ndarray, steps: Steps, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A column of the table on the steps of the sequences; inserted steps are missing."""
    out = np.zeros(len(steps.step), dtype=values.dtype)
    out[steps.place] = np.where(missing, 0, values)[order]
    gone = np.ones(len(steps.step), dtype=bool)
    gone[steps.place] = missing[order]
    return out, gone


def _complete(
    c: str,
    values: np.ndarray,
    missing: np.ndarray,
    steps: Steps,
    row: np.ndarray,
    spec: Spec,
    text: bool,
    notes: list[str],
) -> np.ndarray:
    """A covariate without missing values, by the policy of the spec."""
    _finite(c, values[~missing & (row >= 0)], row[~missing & (row >= 0)])
    if not missing.any():
        return values
    policy, inserted = spec.missing_covariates, steps.inserted
    if policy == "interpolate" and text:
        raise DataError(
            f"column {c!r} is text, and lies on no line between two values.",
            details=[f"missing in {rows_text(row[missing & ~inserted])}" if (missing & ~inserted).any() else "gaps"],
            suggestion="missing_covariates='carry'",
        )
    filled = fill_missing(values, missing, steps, "carry" if policy == "error" else policy)
    # A value that never changes within a sequence is known in its gaps too.
    low, high = _extent(values, missing, steps.sequence)
    constant = inserted & (low == high)
    if policy == "error" and (missing & ~constant).any():
        gaps, rows = int((inserted & ~constant).sum()), row[missing & ~inserted]
        raise DataError(
            f"covariate {c!r} is missing.",
            details=[*([rows_text(np.sort(rows))] if len(rows) else []),
                     *([f"{gaps} steps that were inserted for gaps"] if gaps else [])],
            suggestion="missing_covariates='carry' (the last value before) or 'interpolate' (the line between neighbours)",
        )  # fmt: skip
    empty = np.isinf(low) & missing
    if empty.any():
        bad = row[empty & (row >= 0)]
        raise DataError(
            f"covariate {c!r} has no value at all in {len(np.unique(steps.sequence[empty]))} sequences.",
            details=[rows_text(np.sort(bad))], suggestion="leave these individuals out",
        )  # fmt: skip
    how = {"carry": "carried forward", "interpolate": "interpolated", "error": "constant in its sequence"}[policy]
    notes.append(f"covariate {c!r}: {int(missing.sum())} missing values, {how}")
    return filled


def _extent(values: np.ndarray, missing: np.ndarray, sequence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest value of each row's sequence; infinite where it has none."""
    n = int(sequence.max()) + 1
    low, high = np.full(n, np.inf), np.full(n, -np.inf)
    np.minimum.at(low, sequence[~missing], values[~missing])
    np.maximum.at(high, sequence[~missing], values[~missing])
    return low[sequence], high[sequence]


def _group(
    c: Column, subject: np.ndarray, ids: Sequence[Any], spec: Spec, levels: dict[str, tuple[Any, ...]]
) -> np.ndarray:
    """Code of the group of each individual, (N,)."""
    if c.missing.any():
        raise DataError(
            f"group {c.name!r} is missing.", details=[rows_text(np.flatnonzero(c.missing))],
            suggestion="a level of its own, such as 'unknown'",
        )  # fmt: skip
    declared = (spec.categories or {}).get(c.name, c.levels)
    plain = c.values.astype(str) if c.kind == "text" else c.values
    codes = _by_levels(c, np.unique(plain).tolist() if declared is None else declared, levels)
    low, high = _extent(codes, np.zeros(len(codes), dtype=bool), subject)
    if (low != high).any():
        bad = np.unique(subject[low != high])
        raise DataError(
            f"group {c.name!r} changes within {len(bad)} individuals, the first {ids[bad[0]]!r}.",
            details=[rows_text(np.flatnonzero(subject == bad[0]))],
            suggestion=f"covariates=[{c.name!r}], which may change from row to row",
        )
    out = np.zeros(len(ids), dtype=np.int64)
    out[subject] = codes
    return out


def _states(c: Column, spec: Spec, levels: dict[str, tuple[Any, ...]]) -> np.ndarray:
    """Codes of known states; levels are named by what stands in the table."""
    known = c.values[~c.missing]
    if c.kind == "time" or (c.kind == "number" and not np.array_equal(known, np.floor(known))):
        raise DataError(f"column {c.name!r} names no states.", suggestion="whole numbers or names; empty where unknown")
    declared = (spec.categories or {}).get(c.name, c.levels)
    if declared is None:
        declared = [int(x) for x in np.unique(known)] if c.kind == "number" else sorted(set(known.tolist()))
    return _by_levels(c, declared, levels)


def _times(column: Column, steps: Steps, dates: bool) -> np.ndarray:
    if dates:
        start = as_dates(column).min()
        return start + np.round(steps.seconds * 1e9).astype("timedelta64[ns]")
    if column.values.dtype.kind == "i" and np.array_equal(steps.seconds, np.round(steps.seconds)):
        return steps.seconds.astype(np.int64)
    return steps.seconds
