"""`SequenceData`: sequences of individuals as tensors, time first, with masks, and the names of all they number."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import DataError
from symhmm.tables.cells import check_shapes, columns_of, tensors_of
from symhmm.tables.frame import Spec, long_table
from symhmm.tables.gaps import Policy
from symhmm.tables.labels import Labels, described
from symhmm.tables.states import native_frame


@dataclass(frozen=True, eq=False, repr=False)
class SequenceData:
    """Sequences of several individuals: time first, individuals in plate dimension -1, padded at the end to the longest.

    Shapes are (T, N), or (T, S, N) where each individual has up to S sessions, each a chain of its own, in plate
    dimension -2. In a program ``data.step[t]`` and ``data.observed["step"][t]`` are one step of all individuals. Use
    `from_frame` for tables and `from_tensors` for tensors.

    Args:
        streams: by name, shape (T, [S,] N) or (T, [S,] N, D); what was observed. Harmless numbers where nothing was.
        observed: by stream, shape (T, [S,] N), bool; False where it is missing, in a gap, and in padding.
        mask: shape (T, [S,] N), bool; True where any stream is observed. With one stream it is that stream's.
        lengths: shape ([S,] N), steps of each sequence, missing ones and gaps included; 0 for a session that is not.
        covariates: by name, shape (T, [S,] N); codes of ``levels`` where they were text. Never missing.
        groups: by name, shape (N,), int64; the group of each individual, a code of ``levels``.
        states: shape (T, [S,] N), int64; known states, -1 where unknown. None if none is known.
        rows: shape (T, [S,] N), int64; row of the table that each cell came from, -1 for gaps and padding.
        levels: by name of a column, what its codes 0, 1, ... stand for.
        labels: ids, times and names of columns.

    >>> y = torch.tensor([[1.0, 2.0], [3.0, float("nan")]])
    >>> data = SequenceData.from_tensors({"y": y}, ids=["ann", "bo"])
    >>> data
    SequenceData: 2 individuals, 2 steps, torch.float32
      y  stream  1 missing, 1 to 3
    >>> data.y[0], data.mask[1]
    (tensor([1., 2.]), tensor([ True, False]))
    """

    streams: dict[str, Tensor]
    observed: dict[str, Tensor]
    mask: Tensor
    lengths: Tensor
    rows: Tensor
    covariates: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, Tensor] = field(default_factory=dict)
    states: Tensor | None = None
    levels: dict[str, tuple[Any, ...]] = field(default_factory=dict)
    labels: Labels = field(default_factory=lambda: Labels(()))

    @classmethod
    def from_frame(
        cls,
        table: Any,
        *,
        id: str | None = None,
        time: str | None = None,
        session: str | None = None,
        streams: Sequence[str] | Mapping[str, str | Sequence[str]],
        covariates: Sequence[str] = (),
        groups: Sequence[str] = (),
        states: str | None = None,
        step: Any = None,
        missing_covariates: Policy = "error",
        support: Mapping[str, Any] | None = None,
        categories: Mapping[str, Sequence[Any]] | None = None,
        units: Mapping[str, str] | None = None,
        pad: int | Literal["longest", "bucket"] = "longest",
        dtype: torch.dtype = torch.float64,
    ) -> "SequenceData":
        """Data from a long table, one row per individual and time. Rows may come in any order if ``time`` is given.

        Args:
            table: a pandas, polars or Arrow table, a mapping of columns, or the path of a CSV or Parquet file.
            id: column that names individuals; None if all rows are of one.
            time: column of times, numbers or dates; None takes the rows of each individual in their order.
            session: column that names sessions, each a chain of its own; random effects stay with the individual.
            streams: columns of what was observed; ``{"move": ["x", "y"]}`` makes a stream of several columns. Text
                becomes codes of its sorted levels.
            covariates: columns that may change from row to row.
            groups: columns that are constant within an individual.
            states: column of known states, empty where unknown.
            step: length of a step (``0.5``, ``"15min"``, a timedelta, or ``"auto"``): masked steps are inserted where times
                skip some. None inserts nothing, and warns of gaps; ``"order"`` says that this is meant.
            missing_covariates: ``error``, ``carry`` (the last value before) or ``interpolate`` (linear in time).
            support: family of emissions by stream, ``{"step": "gamma"}``: values it cannot explain are refused.
            categories: levels of text columns in the order of their codes, by column.
            units: by column, for labels.
            pad: ``longest`` sequence; ``bucket``, a round number of steps above it, so that other data reuse a
                compiled step; or a number of steps.
            dtype: of streams and covariates.

        Raises:
            DataError: unknown columns, missing or mixed ids, the same time twice, infinite values, a stream that is
                missing throughout, values outside of a support, missing covariates without a policy: each names the column
                and the rows.

        >>> table = {"ID": ["a", "a", "b"], "t": [1, 0, 0], "step": [1.5, 2.0, None]}
        >>> SequenceData.from_frame(table, id="ID", time="t", streams=["step"])
        SequenceData: 2 individuals, 1-2 steps, torch.float64
          step  stream  1 missing, 1.5 to 2
          rows were not in order of individual and time, and have been sorted
          1 of 2 sequences have a single row
        """
        pairs = streams.items() if isinstance(streams, Mapping) else [(n, n) for n in _listed(streams, "streams")]
        many = {n: (c,) if isinstance(c, str) else tuple(c) for n, c in pairs}
        if not many:
            raise DataError("no stream of observations is named.", suggestion='streams=["step", "angle"]')
        for n in support or {}:
            if n not in many:
                raise DataError(f"support= names {n!r}, which is no stream.", details=[f"streams: {', '.join(many)}"])
        spec = Spec(
            id, time, session, many, _listed(covariates, "covariates"), _listed(groups, "groups"), states, step,
            missing_covariates, support, categories,
        )  # fmt: skip
        return cls.from_tensors(**tensors_of(long_table(table, spec), spec, units, pad, dtype))

    @classmethod
    def from_tensors(
        cls,
        streams: Mapping[str, Tensor],
        *,
        observed: Mapping[str, Tensor] | Tensor | None = None,
        lengths: Tensor | None = None,
        covariates: Mapping[str, Tensor] | None = None,
        groups: Mapping[str, Tensor] | None = None,
        states: Tensor | None = None,
        ids: Sequence[Any] | None = None,
        levels: Mapping[str, Sequence[Any]] | None = None,
        labels: Labels | None = None,
        rows: Tensor | None = None,
    ) -> "SequenceData":
        """Data from tensors of shape (T, [S,] N) each; streams may have a last dimension of their own.

        Args:
            streams: by name; NaN is missing.
            observed: by stream, or one mask for all; None takes all that is not NaN and within the lengths.
            lengths: shape ([S,] N); None gives all of them T.
            covariates, groups, states, levels, labels, rows: as in `SequenceData`.
            ids: names of the individuals; None numbers them.

        Raises:
            DataError: there is no stream, or shapes differ.
        """
        if not streams:
            raise DataError("there is no stream of observations.", suggestion='streams={"y": y}')
        # Arrays and lists are tensors, too.
        streams, covariates, groups = (
            {n: torch.as_tensor(x) for n, x in (given or {}).items()} for given in (streams, covariates, groups)
        )
        lengths = None if lengths is None else torch.as_tensor(lengths)
        first = next(iter(streams.values()))
        shape = lengths.dim() + 1 if lengths is not None else min(x.dim() for x in streams.values())
        size = tuple(first.shape[:shape])
        masks = (
            {} if observed is None else observed if isinstance(observed, Mapping) else dict.fromkeys(streams, observed)
        )
        check_shapes({f"stream {n!r}": x for n, x in streams.items()}, size, events=True)
        check_shapes({f"observed[{n!r}]": x for n, x in masks.items()}, size)
        check_shapes({f"covariate {n!r}": x for n, x in covariates.items()}, size)
        check_shapes({f"group {n!r}": x for n, x in groups.items()}, size[-1:])
        check_shapes({} if states is None else {"states": states}, size)
        check_shapes({} if lengths is None else {"lengths": lengths}, size[1:])
        lengths = torch.full(size[1:], size[0]) if lengths is None else lengths
        inside = torch.arange(size[0]).reshape(-1, *[1] * lengths.dim()) < lengths
        seen, filled = {}, {}
        for name, x in streams.items():
            whole = x.flatten(len(size)).isfinite().all(-1) if x.dim() > len(size) else x.isfinite()
            seen[name] = (masks[name] if name in masks else ~_missing(x, len(size))) & inside
            if bool((seen[name] & ~whole).any()):
                raise DataError(f"stream {name!r} is not finite where it is observed.", suggestion="mask it, or NaN")
            filled[name] = _harmless(x, seen[name])
        if labels is None:
            labels = Labels(range(size[-1]) if ids is None else ids)
        if len(labels.ids) != size[-1]:
            raise DataError(
                "the number of ids does not fit the streams.", details=[f"seen {len(labels.ids)}, wanted {size[-1]}"]
            )
        if rows is None:
            # Rows are those of `frame`: individual by individual, session by session, in time.
            rows = torch.full(size, -1)
            rows[_cells(inside)] = torch.arange(int(inside.sum()))
        return cls(
            filled,
            seen,
            torch.stack(list(seen.values())).any(0),
            lengths,
            rows,
            covariates,
            groups,
            states if states is None else torch.where(inside, states, -1),
            {n: tuple(x) for n, x in (levels or {}).items()},
            labels,
        )

    @property
    def num_steps(self) -> int:
        """T, the length of the longest sequence and its padding."""
        return self.mask.shape[0]

    @property
    def num_sequences(self) -> int:
        """N, the number of individuals."""
        return self.mask.shape[-1]

    @property
    def num_sessions(self) -> int:
        """S, the largest number of sessions of one individual; 1 for data without sessions."""
        return self.mask.shape[1] if self.mask.dim() == 3 else 1

    @property
    def inside(self) -> Tensor:
        """Shape (T, [S,] N), bool: within a sequence, whether or not anything was observed."""
        return torch.arange(self.num_steps).reshape(-1, *[1] * self.lengths.dim()) < self.lengths

    @property
    def ids(self) -> tuple[Any, ...]:
        """Names of the N individuals."""
        return self.labels.ids

    @property
    def times(self) -> np.ndarray | None:
        """Times as they were in the table, shape (T, [S,] N); meaningless in padding. None if steps were not timed."""
        return self.labels.times

    @property
    def state_names(self) -> tuple[Any, ...]:
        """Names of the known states; empty if there are none."""
        return self.levels.get(self.labels.states, ())

    @property
    def dtype(self) -> torch.dtype:
        """Of the streams."""
        return next(iter(self.streams.values())).dtype

    def __getitem__(self, name: str) -> Tensor:
        for kind in (self.streams, self.covariates, self.groups):
            if name in kind:
                return kind[name]
        known = [*self.streams, *self.covariates, *self.groups]
        near = difflib.get_close_matches(str(name), known, 1)
        raise DataError(
            f"the data have no column {name!r}.",
            details=[f"columns: {', '.join(known)}"],
            suggestion=repr(near[0]) if near else "name it in streams, covariates or groups when the table is read",
        )

    def __getattr__(self, name: str) -> Tensor:
        # Only what is no field or method comes here; copies ask for names before there are any fields.
        if not name.startswith("_") and "streams" in vars(self):
            try:
                return self[name]
            except DataError as error:
                raise AttributeError(str(error)) from None
        raise AttributeError(name)

    def cells(self) -> tuple[Tensor, ...]:
        """Index of all cells within sequences, in the order of `frame`: by individual, session and time; R long each."""
        return _cells(self.inside)

    def scatter(self, values: Any, fill: float = 0.0) -> Tensor:
        """One value per row of `frame` as a tensor over cells.

        Args:
            values: shape (R, ...), a tensor or array, rows as in `frame`.
            fill: what padding gets.

        Returns:
            shape (T, [S,] N, ...).

        Raises:
            DataError: the number of rows differs.
        """
        x = torch.as_tensor(values)
        where = self.cells()
        if x.dim() == 0 or len(x) != len(where[0]):
            raise DataError(
                "the values are not one per row of the data.",
                details=[f"seen {tuple(x.shape)}, wanted ({len(where[0])}, ...)"],
                suggestion="rows as in data.frame()",
            )
        out = torch.full((*self.mask.shape, *x.shape[1:]), fill, dtype=x.dtype)
        out[where] = x
        return out

    def gather(self, values: Tensor) -> Tensor:
        """The opposite of `scatter`: values (T, [S,] N, ...) of all cells as rows (R, ...) in the order of `frame`."""
        return values[self.cells()]

    def frame(self, backend: str | None = None) -> Any:
        """The long table of all steps within sequences, by individual, session and time: R rows.

        Streams are empty where nothing was observed, steps inserted for gaps are rows too, with their covariates, and text
        is text again. ``data.rows[data.cells()]`` are the rows of the table that was read, -1 for inserted steps.

        Args:
            backend: ``pandas``, ``polars`` or ``pyarrow``; None takes what came in.

        >>> SequenceData.from_tensors({"y": torch.tensor([[1.0, 2.0]])}, ids=["ann", "bo"]).frame()
            id    y
        0  ann  1.0
        1   bo  2.0
        """
        return native_frame(columns_of(self), backend or self.labels.backend)

    def take(self, ids: Sequence[Any]) -> "SequenceData":
        """Some of the individuals, in the order given, padded to the longest of them.

        Raises:
            DataError: there is no such individual.
        """
        known = {x: i for i, x in enumerate(self.ids)}
        for x in ids:
            if x not in known:
                raise DataError(
                    f"there is no individual {x!r}.",
                    details=[f"known: {', '.join(map(repr, self.ids[:8]))}{', ...' if len(self.ids) > 8 else ''}"],
                )
        return self._picked(torch.tensor([known[x] for x in ids], dtype=torch.long))

    def head(self, n: int) -> "SequenceData":
        """The first ``n`` individuals."""
        return self._picked(torch.arange(min(n, self.num_sequences)))

    def to(self, dtype: torch.dtype) -> "SequenceData":
        """The same with streams and numeric covariates of another floating dtype."""

        def cast(x: Tensor) -> Tensor:
            return x.to(dtype) if x.is_floating_point() else x

        return replace(
            self,
            streams={n: cast(x) for n, x in self.streams.items()},
            covariates={n: cast(x) for n, x in self.covariates.items()},
        )

    def _picked(self, index: Tensor) -> "SequenceData":
        lengths = self.lengths[..., index]
        end = max(int(lengths.max()), 1)
        many = self.mask.dim() - 1  # dimension of the individuals

        def cut(x: Tensor) -> Tensor:
            return x[:end].index_select(many, index)

        place = index.numpy()
        old = self.labels
        labels = old.but(
            ids=[old.ids[i] for i in place],
            times=None if old.times is None else old.times[:end][..., place],
            sessions=None if old.sessions is None else old.sessions[:, place],
        )
        return SequenceData(
            {n: cut(x) for n, x in self.streams.items()},
            {n: cut(x) for n, x in self.observed.items()},
            cut(self.mask),
            lengths,
            cut(self.rows),
            {n: cut(x) for n, x in self.covariates.items()},
            {n: x[index] for n, x in self.groups.items()},
            None if self.states is None else cut(self.states),
            self.levels,
            labels,
        )

    def __repr__(self) -> str:
        return described(self)


def _cells(inside: Tensor) -> tuple[Tensor, ...]:
    order = range(inside.dim())
    return tuple(inside.permute(*reversed(order)).nonzero().flip(-1).unbind(-1))


def _missing(x: Tensor, dims: int) -> Tensor:
    found = x.isnan()
    return found.flatten(dims).any(-1) if x.dim() > dims else found


def _harmless(x: Tensor, seen: Tensor) -> Tensor:
    """``x`` with its first observed value wherever nothing was observed: inside the support of whatever explains it."""
    where = seen.nonzero()
    value = x[tuple(where[0])] if len(where) else torch.zeros(x.shape[seen.dim() :], dtype=x.dtype)
    return torch.where(seen.reshape(*seen.shape, *[1] * (x.dim() - seen.dim())), x, value)


def _listed(names: Sequence[str], what: str) -> tuple[str, ...]:
    if isinstance(names, str):
        raise DataError(f"{what}={names!r} is no list of columns.", suggestion=f"{what}=[{names!r}]")
    return tuple(names)
