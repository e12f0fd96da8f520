"""Large sums of (small and varying) x (large, of the data) as one matrix product: data are read once, forwards and backwards."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from symhmm.compiler.builder import Builder, empty, pruned, shape_of, value
from symhmm.compiler.laws import builder
from symhmm.compiler.squares import squared
from symhmm.compiler.summands import Dims, Factor, Reader, Term, is_large_float, pays, split_dims
from symhmm.compiler.weighted import weighted

aten = torch.ops.aten


def combined(graph: fx.Graph, root: torch.nn.Module, varying: Sequence[fx.Node]) -> fx.Graph:
    """The same function, where sums of weighted data are made by `symhmm.compiler.weighted.weighted`.

    A log-density of an exponential family is such a sum: its weights belong to the states, its rows are functions of the
    data, and constants of the states are weights of a row of ones. Masks, and logarithms of data, go into the rows, which
    are made once for each data set. Squares are not multiplied out, since that would cancel digits. The order of summation
    changes, nothing else.

    Args:
        root: where tensors that the graph names are found.
        varying: placeholders that are not data.
    """
    moving = set(varying)
    for n in graph.nodes:
        if any(x in moving for x in n.all_input_nodes):
            moving.add(n)
    reader = Reader(builder(root, varying), moving)
    found: dict[fx.Node, list[Term]] = {}
    absorbed: set[fx.Node] = set()
    for n in reversed(graph.nodes):
        if n in moving and n not in absorbed and is_large_float(n):
            inside: set[fx.Node] = set()
            terms = list(reader.terms(n, n, inside))
            if pays(terms) and split_dims(terms, n) is not None:
                found[n] = terms
                absorbed |= inside
    if not found:
        return graph
    made = builder(root, varying)
    for n in graph.nodes:
        if n in found:
            dims, anchor = split_dims(found[n], n), next(_fixed(found[n]))
            assert dims is not None
            made.env[n] = _Writer(made, n, anchor, dims).total(found[n])
        else:
            made.copy(n)
    return pruned(made.graph)


def _fixed(terms: Iterable[Term]) -> Iterator[fx.Node]:
    """The data of some summands."""
    for t in terms:
        yield from (n for _, n in t.data)
        yield from _fixed(t.square)


@dataclass(frozen=True)
class _Writer:
    """Writes the summands of ``top`` as nodes; numbers live where ``anchor`` does."""

    made: Builder
    top: fx.Node
    anchor: fx.Node
    dims: Dims

    def total(self, terms: Sequence[Term]) -> fx.Node:
        """A node that has the value of the sum."""
        shape = shape_of(self.top)
        linear = [t for t in terms if t.linear]
        parts = [self._linear(linear)] if linear else []
        masked: dict[tuple[tuple[fx.Node, bool], ...], fx.Node | None] = {}
        for t in terms:
            if t.square:
                parts = [self._square(parts[0] if parts else self._number(0.0), t)]
            elif t.other is not None:
                before = masked.get(t.masks)
                masked[t.masks] = self._add([before] if before else [], t, self.made.env[t.other])
        for masks, x in masked.items():
            for mask, counts in masks:
                x = self._masked(x, mask, counts)  # type: ignore[arg-type]
            parts = [self.made.emit(aten.add.Tensor, *parts, x)] if parts else [x]  # type: ignore[list-item]
        return self.made.expand(parts[0], shape)

    def _add(self, before: Sequence[fx.Node], t: Term, x: fx.Node) -> fx.Node:
        weight = self._weight(t)
        if not before:
            return x if weight is None else self.made.emit(aten.mul.Tensor, x, weight)
        if weight is None:
            return self.made.emit(aten.add.Tensor, *before, x)
        return self.made.emit(aten.addcmul.default, *before, weight, x)

    def _masked(self, x: fx.Node, mask: fx.Node, counts: bool) -> fx.Node:
        own = self.made.env[mask]
        if not counts:
            return self.made.emit(aten.masked_fill.Scalar, x, own, 0)
        return self.made.emit(aten.where.self, own, x, self._number(0.0))

    def _linear(self, terms: Sequence[Term]) -> fx.Node:
        """The sum of weighted data."""
        if not any(t.weights for t in terms):
            return self._sum([self.made.emit(aten.mul.Tensor, self._row(t), t.scale) for t in terms])
        if not any(t.data or t.masks for t in terms):
            return self._sum([self._weight(t) or self._number(t.scale) for t in terms])
        sides = self._sides(terms)
        return self._spread(self.made.emit(weighted, *sides, like=self._product_of(*sides[:2])))

    def _square(self, before: fx.Node, t: Term) -> fx.Node:
        """A weighted square added to a sum."""
        b, shape = self.made, shape_of(self.top)
        sides = self._sides([replace(s, masks=s.masks + t.masks) for s in t.square])
        scale = self._laid(self._weight(t) or self._number(1.0), self.dims.weights)
        scale = b.view(scale, [shape_of(scale)[0], shape_of(scale)[2]])
        given = shape_of(before)
        before = b.view(before, [1] * (len(shape) - len(given)) + list(given))
        wide = any(shape_of(before)[d] != 1 for d in self.dims.data)
        before = self._laid(before, self.dims.weights + (self.dims.data if wide else ()))
        before = b.view(before, [*shape_of(scale), shape_of(before)[2] // shape_of(scale)[1]])
        return self._spread(b.emit(squared, before, scale, *sides, like=self._product_of(*sides[:2])))

    def _sides(self, terms: Sequence[Term]) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Weights (B, J, K) and rows (B, J, R) of linear summands, and whether all rows are finite."""
        b, together = self.made, dict[object, list[Term]]()
        for t in terms:
            together.setdefault((t.data, t.masks, t.pick if t.data else None), []).append(t)
        columns = [self._sum([self._weight(t) or self._number(t.scale) for t in same]) for same in together.values()]
        rows = [self._row(same[0]) for same in together.values()]
        column = self._cat([self._laid(x, self.dims.weights) for x in columns])
        row = self._cat([self._laid(x, self.dims.data) for x in rows])
        finite = b.emit(aten.eq.Tensor, b.emit(aten.sub.Tensor, row, row), self._number(0.0))
        return column, row, b.emit(aten.all.default, finite, like=empty((), torch.bool))

    def _product_of(self, column: fx.Node, row: fx.Node) -> torch.Tensor:
        return empty([shape_of(row)[0], shape_of(column)[2], shape_of(row)[2]], value(self.top).dtype)

    def _spread(self, product: fx.Node) -> fx.Node:
        """A product (B, K, R) with the dimensions of the sum."""
        b, shape, order = self.made, shape_of(self.top), self.dims.all
        moved = b.permute(b.view(product, [shape[d] for d in order]), [order.index(d) for d in sorted(order)])
        return b.view(moved, [shape[d] if d in order else 1 for d in range(-len(shape), 0)])

    def _sum(self, parts: Sequence[fx.Node]) -> fx.Node:
        total = parts[0]
        for x in parts[1:]:
            total = self.made.emit(aten.add.Tensor, total, x)
        return total

    def _cat(self, parts: Sequence[fx.Node]) -> fx.Node:
        first = shape_of(parts[0])
        like = empty([first[0], len(parts), first[2]], value(self.top).dtype)
        return parts[0] if len(parts) == 1 else self.made.emit(aten.cat.default, list(parts), 1, like=like)

    def _laid(self, x: fx.Node, mine: tuple[int, ...]) -> fx.Node:
        """A tensor as (B, 1, n): the dimensions that weights and data share, and its own."""
        b, shape, first = self.made, shape_of(self.top), self.dims.both
        rank, given = len(shape), shape_of(x)
        x = b.view(x, [1] * (rank - len(given)) + list(given))
        rest = [d for d in range(-rank, 0) if d not in first + mine]
        x = b.permute(x, [*first, *mine, *rest])
        x = b.expand(x, [shape[d] for d in first + mine] + [1] * len(rest))
        return b.view(x, [prod(shape[d] for d in first), 1, prod(shape[d] for d in mine)])

    def _weight(self, t: Term) -> fx.Node | None:
        """The weight of a summand; None if it is one."""
        product: fx.Node | None = None
        for f in t.weights:
            x = self._factor(f, t.pick)
            product = x if product is None else self.made.emit(aten.mul.Tensor, product, x)
        if product is None:
            return None if t.scale == 1 else self._number(t.scale)
        return self.made.emit(aten.mul.Tensor, product, t.scale)

    def _row(self, t: Term) -> fx.Node:
        product: fx.Node | None = None
        for f in t.data:
            x = self._factor(f, t.pick)
            product = x if product is None else self.made.emit(aten.mul.Tensor, product, x)
        x = product or self._number(1.0)
        for mask, counts in t.masks:
            x = self._masked(x, mask, counts)
        return x

    def _factor(self, f: Factor, pick: tuple[int, int] | None) -> fx.Node:
        b, (how, old) = self.made, f
        x, dtype = b.env[old], value(self.top).dtype
        if pick:
            dim, index = pick
            shape = shape_of(x)
            rank = len(shape_of(self.top)) + 1
            x = b.view(x, [1] * (rank - len(shape)) + list(shape))
            x = b.emit(aten.select.int, x, dim, index if shape_of(x)[dim] > 1 else 0)
        if value(x).dtype != dtype:
            x = b.emit(aten._to_copy.default, x, dtype=dtype)
        if how:
            x = b.emit(aten.log.default if how == "log" else aten.reciprocal.default, x)
        return x

    def _number(self, x: float) -> fx.Node:
        like = value(self.top)
        return self.made.emit(
            aten.new_full.default,
            self.made.env[self.anchor],
            [1] * like.dim(),
            x,
            dtype=like.dtype,
            like=empty([1] * like.dim(), like.dtype),
        )
