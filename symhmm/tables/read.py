"""Tables in: columns of any data frame or file as arrays with a kind, checked one by one."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from symhmm.errors import DataError
from symhmm.tables.support import rows_text

READERS = {".csv": ",", ".tsv": "\t", ".txt": "\t", ".gz": ",", ".parquet": "", ".pq": "", ".feather": "", ".arrow": ""}


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: as in the table.
        kind: ``number``, ``text`` or ``time``.
        values: shape (R,): float64 or integers, str objects, or datetime64[ns]; anything where missing.
        missing: shape (R,), bool.
        levels: declared categories in their order, or None.
    """

    name: str
    kind: str
    values: np.ndarray
    missing: np.ndarray
    levels: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Raw:
    """Columns of a table by name, its number of rows, and the kind of frame it was."""

    columns: dict[str, Column]
    size: int
    backend: str


def read_table(table: Any, wanted: Mapping[str, str]) -> Raw:
    """The columns asked for.

    Args:
        table: a pandas, polars or Arrow table, a mapping of columns, or a path of a CSV or Parquet file.
        wanted: what each column is for, by name; for messages.

    Raises:
        DataError: the file or column does not exist (with names that come close), the table is empty or no table, or a
            column mixes types.
    """
    import narwhals as nw

    native = _opened(table)
    if isinstance(native, Mapping):
        import pandas

        native = pandas.DataFrame(dict(native))
    if hasattr(native, "collect") and not hasattr(native, "to_dict"):
        native = native.collect()  # a lazy polars frame
    try:
        frame = nw.from_native(native, eager_only=True)
        names = frame.columns
    except (TypeError, nw.exceptions.NarwhalsError) as error:
        raise DataError(
            f"this is no table that can be read: {type(table).__name__}.",
            details=[str(error).splitlines()[0]],
            suggestion="a pandas, polars or Arrow table with one name per column, or the path of a CSV or Parquet file",
        ) from None
    unknown_columns(wanted, names)
    if len(frame) == 0:
        raise DataError("the table has no rows.", details=[f"columns: {', '.join(names)}"])
    backend = frame.implementation.name.lower()
    columns = {n: _column(n, frame[n], backend) for n in dict.fromkeys(wanted)}
    return Raw(columns, len(frame), backend if backend in ("pandas", "polars", "pyarrow") else "pandas")


def unknown_columns(wanted: Mapping[str, str], names: Sequence[str]) -> None:
    """Raise `DataError` for columns that a table has not got, with names that come close."""
    unknown = {n: use for n, use in wanted.items() if n not in names}
    if unknown:
        lower = {str(n).lower(): n for n in names}
        lines, near = [], []
        for n, use in unknown.items():
            close = difflib.get_close_matches(str(n).lower(), list(lower), 2, 0.5)
            near += [repr(lower[c]) for c in close]
            lines.append(f"{n!r} for {use}" + (f"; close: {', '.join(repr(lower[c]) for c in close)}" if close else ""))
        raise DataError(
            f"the table has no column {next(iter(unknown))!r}.",
            details=[*lines, f"columns: {', '.join(map(str, names))}"],
            suggestion=near[0] if near else "one of its columns",
        )


def column_names(path: str | Path) -> list[str]:
    """Names of the columns of a file. Raises `DataError` like `read_table`."""
    import narwhals as nw

    return list(nw.from_native(_opened(Path(path), rows=0), eager_only=True).columns)


def file_kind(path: Path) -> str:
    """What a path is read as: ``csv`` or ``parquet`` or ``arrow``. Raises `DataError` for no file, or another kind."""
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], 1)
        raise DataError(
            f"there is no file {str(path)!r}.",
            suggestion=repr(str(path.parent / near[0])) if near else "check the folder",
        )
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise DataError(f"cannot read {path.name!r}.", suggestion=f"a file that ends in {', '.join(READERS)}")
    return "csv" if READERS[suffix] else "parquet" if suffix in (".parquet", ".pq") else "arrow"


def _opened(table: Any, rows: int | None = None) -> Any:
    if not isinstance(table, (str, Path)):
        return table
    path = Path(table)
    kind = file_kind(path)
    try:
        if kind == "csv":
            import pandas

            # low_memory guesses types piece by piece: one column could then hold numbers and text.
            return pandas.read_csv(path, sep=READERS[path.suffix.lower()], low_memory=False, nrows=rows)
        if kind == "parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(path)
        import pyarrow.feather

        return pyarrow.feather.read_table(path)
    except (ValueError, OSError) as error:  # what pandas and pyarrow raise for files that are not what they claim
        raise DataError(f"cannot read {path.name!r} as {kind}.", details=[str(error).splitlines()[0]]) from None


def _column(name: str, series: Any, backend: str) -> Column:
    import narwhals as nw

    dtype = series.dtype
    missing = np.array(series.is_null().to_numpy(), dtype=bool)
    if dtype.is_numeric() or isinstance(dtype, nw.Boolean):
        if dtype.is_integer() and not missing.any():
            return Column(name, "number", series.to_numpy().astype(np.int64), missing)
        if dtype.is_float():
            values = np.array(series.to_numpy(), dtype=np.float64)
        else:  # what has no NaN of its own: whole numbers, booleans and decimals with missing ones
            values = np.array([np.nan if m else float(v) for v, m in zip(series.to_list(), missing, strict=True)])
        return Column(name, "number", values, missing | np.isnan(values))
    if dtype.is_temporal():
        if isinstance(dtype, (nw.Duration, nw.Time)):
            raise DataError(
                f"column {name!r} holds {dtype}.",
                suggestion="a number of seconds, hours or days, or a date and time",
            )
        if getattr(dtype, "time_zone", None):
            series = series.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return Column(name, "time", np.array(series.to_numpy(), dtype="datetime64[ns]"), missing)
    levels = None
    if isinstance(dtype, (nw.Categorical, nw.Enum)) and (backend == "pandas" or isinstance(dtype, nw.Enum)):
        levels = tuple(series.cat.get_categories().to_list())
    return _objects(name, series.to_list(), levels)


def _objects(name: str, values: Sequence[Any], levels: tuple[Any, ...] | None) -> Column:
    """A column of Python objects: all text, all numbers or all dates."""
    missing = np.array([v is None or v != v for v in values], dtype=bool)
    kinds = np.array([_kind(v) for v in values], dtype=object)
    found = dict.fromkeys(kinds[~missing].tolist())
    if len(found) > 1:
        first = {k: int(np.flatnonzero((kinds == k) & ~missing)[0]) for k in found}
        seen = "; ".join(f"{values[i]!r} ({k}) in row {i}" for k, i in first.items())
        rare = min(found, key=lambda k: int((kinds == k).sum()))
        raise DataError(
            f"column {name!r} mixes types.",
            details=[f"seen {seen}", f"{rare} in {rows_text(np.flatnonzero((kinds == rare) & ~missing))}"],
            suggestion="one type for the whole column",
        )
    kind = next(iter(found), "number")
    if kind == "number":
        numbers = np.array([np.nan if m else float(v) for v, m in zip(values, missing, strict=True)])
        return Column(name, "number", numbers, missing, levels)
    if kind == "date":
        dates = np.array(
            [np.datetime64("NaT") if m else np.datetime64(v) for v, m in zip(values, missing, strict=True)]
        )
        return Column(name, "time", dates.astype("datetime64[ns]"), missing)
    if kind != "text":
        raise DataError(f"column {name!r} holds {kind}.", suggestion="numbers, text or dates")
    text = np.array(["" if m else v for v, m in zip(values, missing, strict=True)], dtype=object)
    blank = np.array([not v.strip() for v in text], dtype=bool)
    return Column(name, "text", text, missing | blank, levels)


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, (bool, int, float, np.number, np.bool_)):
        return "number"
    if isinstance(value, np.datetime64) or hasattr(value, "isoformat"):
        return "date"
    return f"objects of type {type(value).__name__}"
