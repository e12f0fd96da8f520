"""Time in tables: one order for the rows of each sequence, duplicates refused, gaps found and filled with masked steps."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal
from warnings import warn

import numpy as np

from symhmm.errors import DataError, SymhmmWarning
from symhmm.tables.read import Column
from symhmm.tables.support import rows_text, values_text

Policy = Literal["error", "carry", "interpolate"]
UNITS = {"s": 1.0, "sec": 1.0, "min": 60.0, "h": 3600.0, "hour": 3600.0, "d": 86400.0, "day": 86400.0, "w": 604800.0}
TOLERANCE = 0.01  # of a step, by which a time may miss the grid
MOST_INSERTED = 20  # steps per row of the table, above which a grid is a mistake


@dataclass(frozen=True)
class Steps:
    """Where the rows of a table, sorted by sequence and time, stand on the steps of their sequences.

    Args:
        place: shape (R,), position of each row among all R2 steps, inserted ones included.
        sequence: shape (R2,), sequence of each step.
        step: shape (R2,), 0, 1, ... within its sequence.
        seconds: shape (R2,), time of each step as a number; steps without times have their position.
        notes: what was found.
    """

    place: np.ndarray
    sequence: np.ndarray
    step: np.ndarray
    seconds: np.ndarray
    notes: tuple[str, ...]

    @property
    def inserted(self) -> np.ndarray:
        """Shape (R2,), bool: steps that no row stands for."""
        out = np.ones(len(self.step), dtype=bool)
        out[self.place] = False
        return out


def as_times(column: Column) -> tuple[np.ndarray, bool]:
    """Times as numbers, shape (R,): as they are, or seconds since the first of them for dates; and whether they are dates.

    Raises:
        DataError: missing or infinite times, or text that is no date.
    """
    if column.missing.any():
        raise DataError(
            f"column {column.name!r} has missing times.",
            details=[rows_text(np.flatnonzero(column.missing))],
            suggestion="drop these rows: a step without a row becomes a masked step when step= is given",
        )
    if column.kind == "number":
        infinite = ~np.isfinite(column.values.astype(np.float64))
        if infinite.any():
            raise DataError(
                f"column {column.name!r} has infinite times.", details=[rows_text(np.flatnonzero(infinite))]
            )
        return column.values.astype(np.float64), False
    dates = as_dates(column)
    return (dates - dates.min()) / np.timedelta64(1, "s"), True


def as_dates(column: Column) -> np.ndarray:
    """Dates, shape (R,), datetime64[ns]. Raises `DataError` for text that is no date."""
    if column.kind == "time":
        return column.values
    try:
        return column.values.astype("datetime64[ns]")
    except ValueError:
        bad = [i for i, text in enumerate(column.values) if not _is_date(text)]
    raise DataError(
        f"column {column.name!r} has times that are neither numbers nor dates.",
        details=[values_text(column.values[bad], np.array(bad))],
        suggestion="dates such as 2014-02-11 10:34:58, or numbers",
    )


def _is_date(text: str) -> bool:
    try:
        np.datetime64(text)
    except ValueError:
        return False
    return True


def as_seconds(step: Any, dates: bool) -> float:
    """The length of a step in the unit of `as_times`.

    Raises:
        DataError: it is no positive number or duration.

    >>> as_seconds("9.6h", dates=True)
    34560.0
    """
    if isinstance(step, str):
        found = re.fullmatch(r"\s*([\d.]+)\s*([a-z]+?)s?\s*", step.lower())
        if found and found[2] in UNITS and dates:
            return float(found[1]) * UNITS[found[2]]
    elif isinstance(step, timedelta) and dates:
        return step.total_seconds()
    elif isinstance(step, np.timedelta64) and dates:
        return float(step / np.timedelta64(1, "s"))
    elif isinstance(step, (int, float)) and not isinstance(step, bool) and step > 0 and not dates:
        return float(step)
    raise DataError(
        f"step={step!r} is no length of a step.",
        suggestion="'15min', '9.6h', '1d' or a timedelta for dates" if dates else "a positive number, or 'auto'",
    )


def check_duplicates(
    sequence: np.ndarray, seconds: np.ndarray, rows: np.ndarray, names: Sequence[str], time: str
) -> None:
    """Raise `DataError` if a sequence has two rows of the same time; rows are sorted by sequence and time.

    Args:
        sequence, seconds, rows: shape (R,); ``rows`` are those of the table.
        names: of the sequences, for the message.
        time: name of the column.
    """
    same = (np.diff(sequence) == 0) & (np.diff(seconds) == 0)
    if same.any():
        at = np.flatnonzero(same)
        lines = [f"{names[sequence[i]]}: rows {rows[i]} and {rows[i + 1]}" for i in at[:5]]
        more = [f"... and {len(at) - 5} more"] if len(at) > 5 else []
        raise DataError(
            f"column {time!r} has the same time twice in one sequence.",
            details=[*lines, *more, "rows are counted from 0"],
            suggestion="session= if individuals have several sequences, or one row per time",
        )


def find_step(sequence: np.ndarray, seconds: np.ndarray) -> float | None:
    """The interval of which nearly all intervals are whole multiples; None if there is none.

    >>> find_step(np.zeros(4), np.array([0.0, 2.0, 4.0, 10.0]))
    2.0
    """
    within = np.diff(sequence) == 0
    intervals = np.diff(seconds)[within]
    if not len(intervals):
        return None
    values, counts = np.unique(np.round(intervals, 6), return_counts=True)
    step = float(values[counts.argmax()])
    whole = np.abs(intervals / step - np.round(intervals / step)) <= TOLERANCE
    return step if whole.all() and (np.round(intervals / step) >= 1).all() else None


def order_steps(
    sequence: np.ndarray, seconds: np.ndarray, rows: np.ndarray, time: str, step: Any, dates: bool, timed: bool
) -> Steps:
    """Rows on the steps of their sequences, with steps inserted for gaps if there is a grid.

    Args:
        sequence, seconds, rows: shape (R,), sorted by sequence and time.
        time: name of the column, for messages.
        step: length of a step; ``"auto"`` finds it; ``"order"`` and None insert nothing, None with a warning where there
            are gaps.
        dates: the times are dates.
        timed: there are times.

    Raises:
        DataError: times off the grid, or a grid so fine that the steps would be many times the rows.
    """
    starts = np.flatnonzero(np.r_[True, np.diff(sequence) != 0])
    lengths = np.diff(np.r_[starts, len(sequence)])
    plain = np.arange(len(sequence)) - np.repeat(starts, lengths)
    nothing = Steps(np.arange(len(sequence)), sequence, plain, seconds if timed else plain.astype(float), ())
    if not timed:
        if step not in (None, "auto", "order"):
            raise DataError("step= needs the times of rows.", suggestion="time= names their column")
        return nothing
    found = find_step(sequence, seconds)
    if step is None or step == "order":
        if step is None and found is not None:
            _warn_of_gaps(sequence, seconds, found, time, dates)
        return nothing
    if step == "auto":
        if found is None:
            raise DataError(
                f"the times of column {time!r} lie on no grid.",
                suggestion="step= the length of a step, or step='order' to use times for their order alone",
            )
        length = found
    else:
        length = as_seconds(step, dates)
    position = (seconds - np.repeat(seconds[starts], lengths)) / length
    whole = np.round(position)
    off = np.abs(position - whole) > TOLERANCE
    if off.any():
        raise DataError(
            f"times of column {time!r} lie off the grid of step={step!r}.",
            details=[rows_text(rows[off]), f"the first by {(position - whole)[off][0]:+.2g} of a step"],
            suggestion="step='auto', or round the times, or step='order' to use them for their order alone",
        )
    whole = whole.astype(np.int64)
    check_duplicates(sequence, whole, rows, [f"sequence {i}" for i in range(len(starts))], time)
    full = whole[starts + lengths - 1] + 1
    if full.sum() > MOST_INSERTED * len(sequence) + 1000:
        raise DataError(
            f"step={step!r} would make {int(full.sum())} steps of {len(sequence)} rows.",
            suggestion="a longer step, or session= to break sequences at long gaps",
        )
    begin = np.r_[0, np.cumsum(full)[:-1]]
    steps = np.arange(full.sum()) - np.repeat(begin, full)
    many = int(full.sum()) - len(sequence)
    shown = duration_text(length) if dates else f"{length:g}"
    return Steps(
        np.repeat(begin, lengths) + whole,
        np.repeat(np.arange(len(full)), full),
        steps,
        np.repeat(seconds[starts], full) + steps * length,
        (f"{many} masked steps inserted for gaps, on a grid of {shown}",)
        if many
        else (f"no gaps on a grid of {shown}",),
    )


def _warn_of_gaps(sequence: np.ndarray, seconds: np.ndarray, step: float, time: str, dates: bool) -> None:
    gaps = int((np.round(np.diff(seconds) / step) > 1)[np.diff(sequence) == 0].sum())
    if gaps:
        shown = repr(duration_text(step)) if dates else f"{step:g}"
        warn(
            f"{gaps} intervals of column {time!r} are longer than one step of {shown}, and are taken for one step: step="
            f"{shown} inserts masked steps, step='order' keeps this.",
            SymhmmWarning,
            stacklevel=6,
        )


def duration_text(seconds: float) -> str:
    """A duration in its natural unit.

    >>> duration_text(34560.0)
    '9.6h'
    """
    unit = next((u for u in ("d", "h", "min") if seconds >= UNITS[u]), "s")
    return f"{seconds / UNITS[unit]:g}{unit}"


def fill_missing(values: np.ndarray, missing: np.ndarray, steps: Steps, policy: Policy) -> np.ndarray:
    """Values of a covariate at every step, by a policy, within each sequence; ends get the nearest value.

    Args:
        values, missing: shape (R2,).
        policy: ``carry`` takes the last value before, ``interpolate`` the line between neighbours in time.

    Returns:
        shape (R2,); still missing where a sequence has no value at all.
    """
    out = values.copy()
    index = np.arange(len(values))
    starts = np.r_[True, np.diff(steps.sequence) != 0]
    ends = np.r_[starts[1:], True]
    first = np.maximum.accumulate(np.where(starts, index, 0))
    last = np.minimum.accumulate(np.where(ends, index, len(index) - 1)[::-1])[::-1]
    before = np.maximum.accumulate(np.where(missing, -1, index))
    after = np.minimum.accumulate(np.where(missing, len(index), index)[::-1])[::-1]
    left, right = before >= first, after <= last
    if policy == "interpolate":
        both = missing & left & right
        a, b = before[both], after[both]
        share = (steps.seconds[both] - steps.seconds[a]) / (steps.seconds[b] - steps.seconds[a])
        out[both] = values[a] + share * (values[b] - values[a])
        missing = missing & ~both
    take = np.where(left, before, after)
    some = missing & (left | right)
    out[some] = values[take[some]]
    return out
