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
    return find_mark(run, x) or Mark(run)


def find_mark(run: object, x: Tensor) -> Mark | None:
    """`get_mark`, or None where nothing has been said of ``x``."""
    own: Mark | None = getattr(x, "_symhmm_mark", None)
    base = x._base
    other: Mark | None = None if base is None else getattr(base, "_symhmm_mark", None)
    if own is not None and own.run is not run:
        own = None
    if other is None or other.run is not run:
        return own
    return other if own is None else union(run, (own, other))


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
