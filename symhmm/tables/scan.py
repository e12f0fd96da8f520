"""Tables larger than memory: individuals read from Parquet a few at a time, for fitting in minibatches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from symhmm.errors import DataError
from symhmm.tables.data import SequenceData
from symhmm.tables.read import file_kind, unknown_columns


@dataclass(frozen=True)
class ParquetScan:
    """Individuals of a Parquet file or folder, of whose rows only a batch is in memory; iterate over it for batches.

    Args:
        path: of the file or folder.
        id: column that names individuals.
        ids: of all of them, sorted.
        longest: most rows of one individual; all batches are padded to it, so that they share one compiled step.
        batch: individuals in each batch; the last has what is left.
        options: further arguments of `SequenceData.from_frame`.
    """

    path: str
    id: str
    ids: tuple[Any, ...]
    longest: int
    batch: int
    options: dict[str, Any]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.ids) // self.batch)

    def __iter__(self) -> Iterator[SequenceData]:
        for i in range(0, len(self.ids), self.batch):
            yield self.read(self.ids[i : i + self.batch])

    def read(self, ids: Sequence[Any]) -> SequenceData:
        """Some of the individuals. Raises like `SequenceData.from_frame`, with rows of the batch."""
        import pyarrow.dataset

        data = pyarrow.dataset.dataset(self.path)
        columns = [n for n in data.schema.names if n in self._columns]
        # Statistics of row groups spare reading those of others, where the file is sorted by individual.
        table = data.to_table(columns=columns, filter=pyarrow.dataset.field(self.id).isin(list(ids)))
        return SequenceData.from_frame(table, id=self.id, **{"pad": self.longest, **self.options})

    @property
    def _columns(self) -> set[str]:
        o = self.options
        streams = o["streams"]
        named = streams.values() if hasattr(streams, "values") else streams
        flat = [c for x in named for c in ([x] if isinstance(x, str) else x)]
        single = [o.get(n) for n in ("time", "session", "states")]
        return {self.id, *flat, *o.get("covariates", ()), *o.get("groups", ()), *(c for c in single if c)}

    def __repr__(self) -> str:
        return f"ParquetScan of {self.path}: {len(self.ids)} individuals in {len(self)} batches, up to {self.longest} rows each"


def scan_parquet(path: str | Path, *, id: str, batch: int = 32, **options: Any) -> ParquetScan:
    """Individuals of a Parquet file, in batches; only the columns of ids and of text are read as a whole, once.

    Levels of text columns are those of the whole file, so that codes mean the same in every batch.

    Args:
        path: a Parquet file, or a folder of them.
        id: column that names individuals.
        batch: individuals in each batch.
        options: of `SequenceData.from_frame`. With ``step=``, give ``pad=`` the most steps that a sequence may have.

    Raises:
        DataError: there is no such file or column, or rows without an id.
    """
    import pyarrow.compute as pc
    import pyarrow.dataset

    path = Path(path)
    if not path.is_dir() and file_kind(path) != "parquet":
        raise DataError(f"cannot read {path.name!r} by individual.", suggestion="a Parquet file, or a folder of them")
    data = pyarrow.dataset.dataset(str(path))
    if options.get("step") not in (None, "order") and "pad" not in options:
        raise DataError(
            "step= inserts steps, whose number is known only after reading.", suggestion="pad=, a number of steps"
        )
    scan = ParquetScan(str(path), id, (), 0, batch, options)
    unknown_columns(dict.fromkeys(scan._columns, "the scan"), data.schema.names)
    counts: dict[Any, int] = {}
    levels: dict[str, set[str]] = {}
    text = [f.name for f in data.schema if f.name in scan._columns - {id} and _is_text(f.type)]
    text = [c for c in text if c not in (options.get("time"), options.get("session"))]
    for piece in data.to_batches(columns=[id, *text]):
        for row in pc.value_counts(piece.column(id)).to_pylist():
            counts[row["values"]] = counts.get(row["values"], 0) + row["counts"]
        for c in text:
            levels.setdefault(c, set()).update(x for x in pc.unique(piece.column(c)).to_pylist() if x is not None)
    if None in counts:
        raise DataError(f"column {id!r} names no one in {counts[None]} rows.", suggestion="drop these rows")
    if not counts:
        raise DataError("the table has no rows.", details=[str(path)])
    ids = tuple(np.array(sorted(counts), dtype=object))
    known = {c: sorted(x) for c, x in levels.items()} | dict(options.get("categories") or {})
    return ParquetScan(str(path), id, ids, max(counts.values()), batch, options | {"categories": known})


def _is_text(kind: Any) -> bool:
    import pyarrow.types

    return bool(
        pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_dictionary(kind)
    )
