"""Restrict: values that are equal to each other, or increasing, by moving fewer or other coordinates than the free ones."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import IndependentTransform

from symhmm.compiler.layout import Entry
from symhmm.errors import FitError

Tie = Iterable[Iterable[str]]
Order = str | Iterable[str] | Mapping[str, int]
APART = 0.1  # smallest distance of ordered values at a start, on the unconstrained scale, relative to max(1, size)

_ELEMENT = re.compile(r"(.+?)\[([-\d:,\s]*)\]")


@dataclass(frozen=True, eq=False)
class Restriction:
    """Free coordinates x as a function of the fewer or other coordinates u that a driver moves.

    Args:
        source: shape (n_x,), the entry of u that each coordinate reads; tied ones read the same.
        first: shape (n_u,), one coordinate that reads each entry of u.
        chains: entries of u that are increasing in this order: the first itself, then the logarithms of the steps.
        tie, order: what was asked for, by name.
    """

    source: Tensor
    first: Tensor
    chains: tuple[Tensor, ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    order: tuple[tuple[str, int], ...] = ()

    def __call__(self, u: Tensor) -> Tensor:
        """Free coordinates, shape (n_x,); differentiable."""
        for c in self.chains:
            steps = u[c]
            u = u.index_put((c,), torch.cat([steps[:1], steps[1:].exp()]).cumsum(0))
        return u[self.source]

    def log_abs_det_jacobian(self, u: Tensor) -> Tensor:
        """Log volume change of the free coordinates that are ordered, from the logarithms of their steps, nats, shape ()."""
        total = u.new_zeros(())
        for c in self.chains:
            total = total + u[c][1:].sum()
        return total

    def inverse(self, x: Tensor) -> Tensor:
        """Coordinates u, shape (n_u,), of free ones; where x breaks the restriction, of ones nearby that do not."""
        u = x[self.first].clone()
        for c in self.chains:
            values = u[c].sort().values
            least = APART * values.abs().clamp(min=1.0)[1:]
            gaps = values.diff()
            # Only what is out of order is moved: a start that is in order, however tightly, is kept as it is.
            broken = bool((u[c].diff() <= 0).any())
            u[c] = torch.cat([values[:1], (torch.maximum(gaps, least) if broken else gaps).log()])
        return u

    def holds(self, x: Tensor) -> bool:
        """Whether all vectors of free coordinates, shape (*, n_x), keep to it."""
        u = x[..., self.first]
        return torch.equal(u[..., self.source], x) and all(bool((u[..., c].diff() > 0).all()) for c in self.chains)

    @property
    def limited(self) -> Tensor:
        """Places of the free coordinates that are tied or ordered, shape (k,)."""
        often = torch.bincount(self.source, minlength=self.first.numel()) > 1
        for c in self.chains:
            often[c] = True
        return often[self.source].nonzero()[:, 0]

    def among(self, kept: Tensor) -> "Restriction | None":
        """What is left of it for the coordinates at ``kept``, shape (n_kept,); None if nothing. Chains stay or go as a whole."""
        numbers, source = self.source[kept].unique(return_inverse=True)
        place = {int(n): k for k, n in enumerate(numbers)}
        first = torch.tensor([int((source == k).nonzero()[0]) for k in range(len(place))], dtype=torch.long)
        lines = [c.tolist() for c in self.chains]
        chains = tuple(torch.tensor([place[i] for i in c]) for c in lines if set(c) <= set(place))
        if len(first) == len(kept) and not chains:
            return None
        return Restriction(source, first, chains, self.tie, self.order)


def restriction(
    entries: Iterable[Entry], free: Tensor, tie: Tie | None = None, order: Order | None = None
) -> Restriction | None:
    """What ``tie`` and ``order`` ask of the coordinates ``free``; None where they ask nothing.

    Args:
        entries: of the values that are not fixed.
        free: positions of their coordinates in the whole vector.
        tie: groups of names that are equal: ``[("loc[0]", "loc[2]"), ("sd", "other sd")]``.
        order: names whose values increase along the last axis, or a mapping from names to axes.

    Raises:
        FitError: an unknown name or element, values of different shapes or supports, or a value asked two things.
    """
    known = {e.name: e for e in entries}
    groups = tuple((g,) if isinstance(g, str) else tuple(g) for g in tie or ())
    along = (
        {order: -1}
        if isinstance(order, str)
        else order
        if isinstance(order, Mapping)
        else dict.fromkeys(order or (), -1)
    )
    place = {int(p): k for k, p in enumerate(free)}
    leader = list(range(len(place)))
    for members in groups:
        if len(members) < 2:
            raise FitError(f"tie= has a group of one: {', '.join(members)!r}.", suggestion='tie=[("loc[0]", "loc[1]")]')
        rows = [positions(known, m, "tie=") for m in members]
        _check_tie(members, rows)
        for row in rows[1:]:
            for a, b in zip(rows[0][1].flatten().tolist(), row[1].flatten().tolist(), strict=True):
                low, high = sorted((leader[place[a]], leader[place[b]]))
                leader = [low if k == high else k for k in leader]
    first = sorted(set(leader))
    number = {k: i for i, k in enumerate(first)}
    chains = [[number[leader[place[p]]] for p in row] for row in _ordered(known, along)]
    for line in chains:
        if len(set(line)) < len(line) or sum(bool(set(line) & set(other)) for other in chains) > 1:
            raise FitError(
                "a value is both tied and ordered, or ordered twice.", suggestion="one of tie= and order= for it"
            )
    if len(first) == len(leader) and not chains:
        return None
    source = torch.tensor([number[k] for k in leader])
    lines = tuple(torch.tensor(c) for c in chains)
    return Restriction(source, torch.tensor(first), lines, groups, tuple(along.items()))


def _ordered(known: Mapping[str, Entry], asked: Mapping[str, int]) -> list[list[int]]:
    """Positions in the whole vector that increase, one list for each line along an axis."""
    out = []
    for name, axis in asked.items():
        entry, where = positions(known, name, "order=")
        if not elementwise(entry) or not where.dim() or not -where.dim() <= axis < where.dim():
            raise FitError(
                f"order= cannot order {name!r} along axis {axis}.",
                details=[f"shape {entry.shape}, support {entry.constraint}"],
                suggestion="the name of real or positive values that differ between states, and their axis",
            )
        low, high = (entry.transform(torch.full(entry.free_shape, v, dtype=entry.dtype)) for v in (0.0, 1.0))
        rising = bool((low < high).all())
        for row in where.movedim(axis, -1).reshape(-1, where.shape[axis]).tolist():
            out.append(row if rising else row[::-1])
    return out


def positions(known: Mapping[str, Entry], text: str, option: str, *, event: bool = False) -> tuple[Entry, Tensor]:
    """The entry that ``text`` names, and the positions of that part of it in the whole vector.

    With ``event``, the part may be of one event (an element of a simplex), and positions are those in the flat value.

    Raises:
        FitError: there is no such entry or part; ``option`` is where it was asked for.
    """
    found = _ELEMENT.fullmatch(text) if text not in known else None
    name = found[1] if found else text
    if name not in known:
        raise FitError(f"{option} names {name!r}, which is not fitted.", details=[f"fitted: {', '.join(known)}"])
    entry = known[name]
    whole = elementwise(entry)
    where = torch.arange(entry.start, entry.stop).reshape(entry.free_shape)
    if event and not whole:
        where = torch.arange(int(torch.Size(entry.shape).numel())).reshape(entry.shape)
    if not found:
        return entry, where
    index = tuple(_index(part.strip()) for part in found[2].split(",") if part.strip())
    most = len(entry.shape) - (0 if whole or event else max(entry.constraint.event_dim, 1))
    try:
        if len(index) > most:
            raise IndexError
        return entry, where[index]
    except IndexError:
        raise FitError(
            f"{option} names {text!r}, which has no such part.",
            details=[f"shape {entry.shape}, support {entry.constraint}"],
            suggestion="whole rows of a simplex, single elements of others",
        ) from None


def _index(part: str) -> int | slice:
    return slice(None) if ":" in part else int(part)


def elementwise(entry: Entry) -> bool:
    """Whether each element has a coordinate of its own, be they declared an event or not."""
    transform = entry.transform
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return entry.free_shape == entry.shape and bool(transform.domain.event_dim == 0)


def _check_tie(names: tuple[str, ...], rows: list[tuple[Entry, Tensor]]) -> None:
    (entry, where), *others = rows
    for name, (other, its) in zip(names[1:], others, strict=True):
        if its.shape != where.shape or str(other.constraint) != str(entry.constraint):
            raise FitError(
                f"tie= cannot make {names[0]!r} and {name!r} equal.",
                details=[
                    f"{names[0]}: free shape {tuple(where.shape)}, support {entry.constraint}",
                    f"{name}: free shape {tuple(its.shape)}, support {other.constraint}",
                ],
                suggestion="values of one shape and one support",
            )
