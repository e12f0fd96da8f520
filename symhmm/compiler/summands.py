"""Summands: what a large sum in a traced graph is made of, weights apart from data."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from symhmm.compiler.builder import Builder, shape_of, value

aten = torch.ops.aten

LARGE = 2**14  # numbers from which on reading them costs more than one more operation
SMALL = 16  # times fewer numbers than the sum has: these are weights
MOST_PICKS = 16  # summands of a sum over a dimension that become rows
MOST_MEMORY = 8  # times the numbers of the sum that its rows may take

# A factor: a function of a node.
Factor = tuple[str, fx.Node]


@dataclass(frozen=True)
class Term:
    """A summand ``scale * weights * data * (square)^2 * other``; anything may be missing.

    Args:
        weights: small and varying.
        data: depend on data alone.
        square: the summands of a sum that is squared.
        other: large, varying, and not linear in the data.
        masks: fixed conditions with the value for which the summand counts; elsewhere it is zero.
        pick: dimension and index at which weights and data are read (a summand of a sum over that dimension).
    """

    scale: float = 1.0
    weights: tuple[Factor, ...] = ()
    data: tuple[Factor, ...] = ()
    square: tuple["Term", ...] = ()
    other: fx.Node | None = None
    masks: tuple[tuple[fx.Node, bool], ...] = ()
    pick: tuple[int, int] | None = None

    @property
    def linear(self) -> bool:
        return not self.square and self.other is None


def is_large_float(n: fx.Node) -> bool:
    """Whether a node makes so many real numbers that reading them is what it costs."""
    if n.op != "call_function" or not isinstance(value(n), torch.Tensor):
        return False
    return value(n).dtype in (torch.float32, torch.float64) and value(n).numel() >= LARGE


def pays(terms: Sequence[Term]) -> bool:
    """Whether something is squared, or data meet weights."""
    linear = [t for t in terms if t.linear]
    return any(t.square for t in terms) or (
        len(linear) > 1 and any(t.data for t in linear) and any(t.weights for t in linear)
    )


@dataclass(frozen=True)
class Reader:
    """Reads summands off a graph."""

    literals: Builder
    moving: set[fx.Node]

    def terms(self, n: fx.Node, top: fx.Node, inside: set[fx.Node]) -> Iterator[Term]:
        """The summands of a node; ``inside`` collects the nodes that they are made of and do not need themselves."""
        if n not in self.moving:
            yield Term(data=(("", n),))
            return
        if value(n).numel() * SMALL <= value(top).numel():
            yield Term(weights=(("", n),))
            return
        mine: set[fx.Node] = set()
        parts = self._parts(n, top, mine)
        if parts is None:
            yield Term(other=n)
            return
        inside |= mine | ({n} - {top})
        yield from parts

    def _parts(self, n: fx.Node, top: fx.Node, inside: set[fx.Node]) -> list[Term] | None:
        """The summands of what a node adds, scales, masks, squares or multiplies by weights; None if it does neither."""

        def of(x: object, scale: float = 1.0) -> list[Term]:
            if not isinstance(x, fx.Node):
                return [Term(scale=scale * float(x))]  # type: ignore[arg-type]
            return [replace(t, scale=scale * t.scale) for t in self.terms(x, top, inside)]

        a = n.args
        match n.target:
            case aten.add.Tensor | aten.sub.Tensor:
                sign = float(n.kwargs.get("alpha", 1)) * (-1.0 if n.target is aten.sub.Tensor else 1.0)  # type: ignore[arg-type]
                return of(a[0]) + of(a[1], sign)
            case aten.rsub.Scalar:
                return of(a[1]) + of(a[0], -1.0) if len(a) == 2 else None
            case aten.neg.default:
                return of(a[0], -1.0)
            case aten.expand.default:
                return of(a[0])
            case aten.mul.Tensor | aten.div.Tensor if not isinstance(a[1], fx.Node):
                c = float(a[1])  # type: ignore[arg-type]
                return of(a[0], c if n.target is aten.mul.Tensor else 1 / c) if c else None
            case aten.pow.Tensor_Scalar if a[1] == 2:
                return self._square(a[0], top, inside)  # type: ignore[arg-type]
            case aten.mul.Tensor if a[0] is a[1]:
                return self._square(a[0], top, inside)  # type: ignore[arg-type]
            case aten.mul.Tensor | aten.div.Tensor | aten.xlogy.Tensor:
                found = self._product(n, top, inside)
                return None if found is None else [found]
            case aten.where.self:
                nothing = self.literals.literal(a[2])  # type: ignore[arg-type]
                if a[0] in self.moving or nothing is None or bool(nothing.any()):
                    return None
                return [replace(t, masks=(*t.masks, (a[0], True))) for t in of(a[1])]  # type: ignore[arg-type]
            case aten.masked_fill.Scalar if a[1] not in self.moving and a[2] == 0:
                return [replace(t, masks=(*t.masks, (a[1], False))) for t in of(a[0])]  # type: ignore[arg-type]
            case aten.sum.dim_IntList if len(a) == 2 and len(a[1]) == 1:  # type: ignore[arg-type]
                return self._picked(a[0], a[1][0], top)  # type: ignore[arg-type, index]
        return None

    def _square(self, x: fx.Node, top: fx.Node, inside: set[fx.Node]) -> list[Term] | None:
        mine: set[fx.Node] = set()
        terms = tuple(self.terms(x, top, mine))
        if not pays(terms) or not all(t.linear for t in terms):
            return None
        inside |= mine | {x}
        return [Term(square=terms)]

    def _product(self, n: fx.Node, top: fx.Node, inside: set[fx.Node]) -> Term | None:
        """A weight times data, or times a single summand."""
        x, y = n.args
        if not isinstance(x, fx.Node) or not isinstance(y, fx.Node):
            return None
        small = [p in self.moving and value(p).numel() * SMALL <= value(top).numel() for p in (x, y)]
        fixed = [p not in self.moving for p in (x, y)]
        if n.target is aten.xlogy.Tensor:
            if small[0] and fixed[1]:
                return Term(weights=(("", x),), data=(("log", y),))
            return Term(weights=(("log", y),), data=(("", x),)) if fixed[0] and small[1] else None
        if n.target is aten.mul.Tensor and small[0]:
            x, y, small, fixed = y, x, small[::-1], fixed[::-1]
        if not small[1]:
            return None
        factor = ("inverse" if n.target is aten.div.Tensor else "", y)
        mine: set[fx.Node] = set()
        terms = list(self.terms(x, top, mine))
        if len(terms) == 1:
            inside |= mine
            return replace(terms[0], weights=(*terms[0].weights, factor))
        return Term(weights=(factor,), other=x)

    def _picked(self, x: fx.Node, dim: int, top: fx.Node) -> list[Term] | None:
        """A sum over a dimension of a few products of weights and data."""
        size = shape_of(x)[dim]
        if x not in self.moving or x.target not in (aten.mul.Tensor, aten.xlogy.Tensor) or size > MOST_PICKS:
            return None
        term = self._product(x, top, set())
        if term is None or not term.linear or term.masks or term.pick:
            return None
        return [replace(term, pick=(dim % len(shape_of(x)), i)) for i in range(size)]


@dataclass(frozen=True)
class Dims:
    """Dimensions of a sum, counted from the last: of weights and data alike, of weights alone, and of data alone."""

    both: tuple[int, ...]
    weights: tuple[int, ...]
    data: tuple[int, ...]

    @property
    def all(self) -> tuple[int, ...]:
        """In the order in which they lie in memory."""
        return self.both + self.weights + self.data


def _spread(factors: Iterable[fx.Node], pick: tuple[int, int] | None, rank: int) -> set[int]:
    """Dimensions, counted from the last, in which a product of nodes varies."""
    out = set()
    for n in factors:
        shape = list(shape_of(n))
        if pick:
            shape = [1] * (rank + 1 - len(shape)) + shape
            del shape[pick[0]]
        out |= {d - len(shape) for d, s in enumerate(shape) if s != 1}
    return out


def split_dims(terms: Sequence[Term], top: fx.Node) -> Dims | None:
    """How the dimensions of linear and squared summands fall apart; None if their rows would be too large or too short."""
    rank = len(shape_of(top))
    linear = [t for t in terms if t.linear]
    squares = [t for t in terms if t.square]
    of_weights: set[int] = set()
    of_data: set[int] = set()
    for t in (*linear, *(part for whole in squares for part in whole.square)):
        of_weights |= _spread((n for _, n in t.weights), t.pick, rank)
        of_data |= _spread((n for _, n in t.data), t.pick, rank) | _spread((m for m, _ in t.masks), None, rank)
    for t in squares:
        of_weights |= _spread((n for _, n in t.weights), None, rank)
        of_data |= _spread((m for m, _ in t.masks), None, rank)
    both = of_weights & of_data
    columns = prod(shape_of(top)[d] for d in of_data - both)
    held = max(len(linear), *(len(t.square) for t in squares), 1) * prod(shape_of(top)[d] for d in of_data)
    if of_data and (columns < SMALL or held > MOST_MEMORY * value(top).numel()):
        return None
    # The last dimension varies fastest in memory: the chain kernels read fastest along time, which stands first in a site.
    return Dims(tuple(sorted(both)), tuple(sorted(of_weights - both)), tuple(sorted(of_data - both, reverse=True)))
