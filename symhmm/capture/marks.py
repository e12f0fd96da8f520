"""What is remembered of a single tensor during one run of the program."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
    own, base = _found(run, x), x._base
    other = None if base is None else _found(run, base)
    if own is None or other is None:
        return own or other or union(run, ())
    return union(run, (own, other))


def _found(run: object, x: Tensor) -> Mark | None:
    mark: Mark | None = getattr(x, "_symhmm_mark", None)
    return mark if mark is not None and mark.run is run else None


def set_mark(x: Tensor, mark: Mark) -> None:
    """Remember ``mark`` of ``x``."""
    x._symhmm_mark = mark  # type: ignore[attr-defined]


def union(run: object, marks: Iterable[Mark]) -> Mark:
    """What is known of something computed from tensors with these marks.

    >>> run = object()
    >>> sorted(union(run, [Mark(run, frozenset({"a"})), Mark(run, frozenset({"b"}))]).sites)
    ['a', 'b']
    """
    known = None
    for m in marks:
        if known is None or not (known.sites or known.carried or known.level is not None):
            known = m
        elif m is not known and (m.sites or m.carried or m.level is not None):
            level = known.level if m.level is None else m.level
            known = Mark(run, known.sites | m.sites, known.carried | m.carried, level)
    return Mark(run) if known is None else known
