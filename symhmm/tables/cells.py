"""Cells: rows of a table on tensors over steps and individuals, and cells as columns of a table again."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import DataError
from symhmm.tables.frame import Long, Spec
from symhmm.tables.labels import Labels


def tensors_of(
    long: Long, spec: Spec, units: Mapping[str, str] | None, pad: int | str, dtype: torch.dtype
) -> dict[str, Any]:
    """Rows on the cells of tensors: arguments of `SequenceData.from_tensors`."""
    place = [torch.as_tensor(long.step), torch.as_tensor(long.session), torch.as_tensor(long.subject)]
    steps, sessions = int(long.step.max()) + 1, 1 if long.sessions is None else len(long.sessions)
    lengths = torch.zeros(sessions, len(long.ids), dtype=torch.long)
    lengths.index_put_((place[1], place[2]), torch.ones(len(long.row), dtype=torch.long), accumulate=True)
    shape = (_padded(steps, pad), sessions, len(long.ids))

    def put(values: np.ndarray, missing: np.ndarray | None = None, fill: float = 0.0) -> Tensor:
        x = torch.as_tensor(values)
        x = x if x.dtype == torch.bool or fill == -1 else x.to(dtype)
        if missing is not None:
            x = torch.where(torch.as_tensor(missing), torch.tensor(fill, dtype=x.dtype), x)
        out = torch.full(shape, fill, dtype=x.dtype)
        out[tuple(place)] = x
        return out if long.sessions is not None else out.squeeze(1)

    streams = {}
    for n, columns in spec.streams.items():
        parts = [put(long.values[c], long.missing[c], float("nan")) for c in columns]
        streams[n] = parts[0] if len(columns) == 1 else torch.stack(parts, -1)
    times = None
    if long.times is not None:
        times = np.zeros(shape, dtype=long.times.dtype)
        times[long.step, long.session, long.subject] = long.times
        times = times if long.sessions is not None else times[:, 0]
    groups = {n: torch.as_tensor(x) for n, x in long.groups.items()}
    return {
        "streams": streams,
        "lengths": lengths if long.sessions is not None else lengths[0],
        "covariates": {n: put(long.values[n]) for n in spec.covariates},
        "groups": groups,
        "states": None if spec.states is None else put(long.values[spec.states], long.missing[spec.states], -1),
        "levels": long.levels,
        "rows": put(long.row, fill=-1),
        "labels": Labels(
            long.ids,
            id=spec.id or "id",
            time=spec.time or "",
            session=spec.session or "",
            states=spec.states or "state",
            columns=spec.streams,
            times=times,
            sessions=long.sessions,
            units=units,
            notes=long.notes,
            backend=long.backend,
        ),
    }


def _padded(steps: int, pad: int | str) -> int:
    if isinstance(pad, int):
        if pad < steps:
            raise DataError(
                f"pad={pad} is shorter than the longest sequence of {steps} steps.", suggestion="pad='longest'"
            )
        return pad
    if pad == "bucket":
        # Two significant binary digits: at most a third of the steps are padding.
        unit = max(1 << max(steps.bit_length() - 3, 0), 1)
        return -(-steps // unit) * unit
    if pad != "longest":
        raise DataError(f"there is no padding {pad!r}.", suggestion="'longest', 'bucket' or a number of steps")
    return steps


def _decoded(values: np.ndarray, levels: Sequence[Any] | None, seen: np.ndarray | None = None) -> np.ndarray:
    """Codes as what they stand for, None where not seen; numbers as they are, NaN where not seen."""
    if levels is None:
        return values if seen is None else np.where(seen, values, np.nan)
    names = np.empty(len(levels) + 1, dtype=object)
    names[: len(levels)] = list(levels)
    codes = values.astype(np.int64)
    found = names[codes if seen is None else np.where(seen, codes, len(levels))]
    whole = all(isinstance(x, int) for x in levels) and (seen is None or bool(seen.all()))
    return found.astype(np.int64) if whole and len(levels) else found


def columns_of(data: Any) -> dict[str, Any]:
    """Columns of `SequenceData.frame`, each of one value per row."""
    where = data.cells()
    names = data.labels
    out: dict[str, Any] = {names.id: _decoded(where[-1].numpy(), names.ids)}
    if names.sessions is not None:
        out[names.session] = _decoded(np.arange(names.sessions.size), tuple(names.sessions.reshape(-1)))[
            (where[1] * data.num_sequences + where[2]).numpy()
        ]
    if names.times is not None:
        out[names.time] = names.times[tuple(x.numpy() for x in where)]
    for n, x in data.streams.items():
        seen = data.observed[n][where].numpy()
        columns = x[where].numpy()
        parts = {n: columns} if columns.ndim == 1 else dict(zip(_columns(data, n), columns.T, strict=True))
        for c, values in parts.items():
            out[c] = _decoded(values, data.levels.get(c), seen)
    for n, x in data.covariates.items():
        out[n] = _decoded(x[where].numpy(), data.levels.get(n))
    for n, x in data.groups.items():
        out[n] = _decoded(x[where[-1]].numpy(), data.levels.get(n))
    if data.states is not None:
        codes = data.states[where].numpy()
        out[names.states] = _decoded(codes, data.levels.get(names.states), codes >= 0)
    return out


def _columns(data: Any, stream: str) -> Sequence[str]:
    return data.labels.columns.get(stream) or [f"{stream}[{i}]" for i in range(data.streams[stream].shape[-1])]


def check_shapes(tensors: Mapping[str, Tensor], wanted: tuple[int, ...], events: bool = False) -> None:
    """Raise `DataError` for a tensor of another shape; with ``events`` it may have one more dimension."""
    for name, x in tensors.items():
        dims = (len(wanted), len(wanted) + events)
        if tuple(x.shape[: len(wanted)]) != wanted or x.dim() not in dims:
            raise DataError(
                f"{name} has the wrong shape.",
                details=[f"seen {tuple(x.shape)}, wanted {wanted}"],
                suggestion="tensors of shape (steps, individuals) or (steps, sessions, individuals)",
            )
