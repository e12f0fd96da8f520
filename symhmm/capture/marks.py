"""What is remembered of a single tensor during one run of the program."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mark:
    """What is known of one tensor.

    Args:
        run: the run it is known in; marks left by earlier runs mean nothing.
        sites: discrete sites that it was computed from.
        carried: loops in whose concrete steps it, or something it was computed from, was made.
        level: the vectorised loop in which it was made, if it differs between the steps of one.
    """

    run: object
    sites: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    level: Any = None


def get_mark(run: object, x: Tensor) -> Mark:
    """What is known of ``x`` in ``run``; views share what is known of their base."""
    with torch._C.DisableTorchFunction():
        base = x._base
    found = (getattr(t, "_symhmm_mark", None) for t in (x, base) if t is not None)
    return union(run, (mark for mark in found if mark is not None and mark.run is run))


def set_mark(x: Tensor, mark: Mark) -> None:
    """Remember ``mark`` of ``x``."""
    x._symhmm_mark = mark  # type: ignore[attr-defined]


def union(run: object, marks: Iterable[Mark]) -> Mark:
    """What is known of something computed from tensors with these marks.

    >>> run = object()
    >>> sorted(union(run, [Mark(run, frozenset({"a"})), Mark(run, frozenset({"b"}))]).sites)
    ['a', 'b']
    """
    marks = list(marks)
    if len(marks) == 1:
        return marks[0]
    return Mark(
        run,
        frozenset().union(*(m.sites for m in marks)),
        frozenset().union(*(m.carried for m in marks)),
        next((m.level for m in reversed(marks) if m.level is not None), None),
    )
