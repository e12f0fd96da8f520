"""Names for answers: the ids, times, sessions and states of the data in place of numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from symhmm.tables.data import SequenceData
from symhmm.tables.states import STATE, Answers, Labelled


def data_among(x: Any) -> SequenceData | None:
    """The first `SequenceData` in a structure of lists, tuples and dicts.

    >>> data_among(([3], {"n": 1})) is None
    True
    """
    if isinstance(x, SequenceData):
        return x
    parts = x.values() if isinstance(x, Mapping) else x if isinstance(x, (list, tuple)) else ()
    return next((found for part in parts if (found := data_among(part)) is not None), None)


def named_all(
    answers: Answers,
    data: SequenceData | None,
    plates: Mapping[str, int | None],
    axes: Sequence[str],
    states: Callable[[str], Sequence[Any]],
) -> Answers:
    """`named` for each answer, with the names of the states of its site."""
    items = {n: named(x, data, plates, axes, states(x.name)) for n, x in answers.items_.items()}
    return replace(answers, items_=items)


def named(
    x: Labelled, data: SequenceData | None, plates: Mapping[str, int | None], axes: Sequence[str], states: Sequence[Any]
) -> Labelled:
    """An answer with the names of the data; what does not fit them keeps its numbers.

    Args:
        x: answer.
        data: their ids label the plate in dimension -1, their times the steps.
        plates: dimension of each plate.
        axes: time axes.
        states: names of the states, in their order; empty to keep their numbers.
    """
    sizes = dict(zip(x.dims, x.values.shape, strict=True))
    labels: dict[str, Sequence[Any]] = {
        d: tuple(states) for d in (STATE, "from", "to") if states and sizes.get(d) == len(states)
    }
    along = dict(x.along)
    if data is None:
        return x.relabelled(labels)
    who = _plate(plates, sizes, -1, data.num_sequences)
    when = _plate(plates, sizes, -2, data.num_sessions) if data.mask.dim() == 3 else None
    if who is not None:
        labels[who] = data.ids
    names = data.labels
    if who is not None and when is not None and names.sessions is not None:
        along[names.session] = ((when, who), names.sessions)
    axis = next((d for d in x.dims if d in axes), None)
    one_plate = who is not None and (when is not None or data.mask.dim() == 2)
    if axis is not None and one_plate and names.times is not None:
        steps = np.array(x.labels[axis])
        if steps.dtype.kind == "i" and len(steps) and steps.min() >= 0 and steps.max() < data.num_steps:
            dims = (axis, *((when,) if when is not None else ()), who)
            along[names.time] = (tuple(d for d in dims if d is not None), names.times[steps])
    return replace(x.relabelled(labels), along=along, backend=names.backend)


def _plate(plates: Mapping[str, int | None], sizes: Mapping[str, int], dim: int, size: int) -> str | None:
    return next((p for p, d in plates.items() if d == dim and sizes.get(p) == size), None)
