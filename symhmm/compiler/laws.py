"""Laws of tensor algebra for traced graphs: nodes are made in a normal form, and what is equal is made once."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

aten = torch.ops.aten

LARGEST_LITERAL = 2**16  # numbers that are looked at to see whether they say "all of them, in order"
_RESHAPING = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
_SAME = {aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.clone.default}
_NOTHING = {
    aten.mul.Tensor: 1,
    aten.mul.Scalar: 1,
    aten.div.Tensor: 1,
    aten.div.Scalar: 1,
    aten.add.Tensor: 0,
    aten.add.Scalar: 0,
    aten.sub.Tensor: 0,
    aten.pow.Tensor_Scalar: 1,
}
_TESTS = {aten.eq.Tensor, aten.eq.Scalar, aten.isfinite.default}
_REDUCTIONS = {aten.sum.dim_IntList, aten.logsumexp.default, aten.amax.default}
_LINEAR = {aten.add.Tensor, aten.sub.Tensor}


def simplified(graph: fx.Graph, root: torch.nn.Module) -> fx.Graph:
    """The same function with fewer operations, to be differentiated as before.

    Operations that change nothing are left out; numbers that are only repeated are computed once and repeated afterwards
    (``f(expand(x)) = expand(f(x))``); reading all entries in order is a view; views are merged, and sums are taken before
    what they share is applied (``view(x) + view(y) = view(x + y)``, ``where(m, x, 0) + where(m, y, 0) = where(m, x + y, 0)``).

    Args:
        root: where tensors that the graph names are found.
    """
    if any(n.target in (aten.as_strided.default, aten.as_strided_scatter.default) for n in graph.nodes):
        return graph  # what it computes hangs on how its input lies in memory
    made = Builder(root)
    returned = {x for n in graph.nodes if n.op == "output" for x in n.all_input_nodes}
    for n in graph.nodes:
        made.copy(n, keep=n in returned)
    return pruned(made.graph)


def pruned(graph: fx.Graph) -> fx.Graph:
    """The graph without nodes that nobody reads; nothing in it writes in place, and its inputs stay."""
    graph.lint()
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))
    return graph


def value(n: fx.Node) -> Any:
    """What a node makes, without numbers: a tensor with its shape, dtype and strides; None where it makes several."""
    return n.meta.get("val")


def shape_of(n: fx.Node) -> tuple[int, ...]:
    """The shape of what a node makes."""
    return tuple(value(n).shape)


class Builder:
    """A graph under construction. `emit` is asked for an operation and returns a node that has its value.

    Strides are not known: views of what may lie in memory in any order are made by ``reshape``.
    """

    def __init__(self, root: torch.nn.Module) -> None:
        self.root, self.graph = root, fx.Graph()
        self.env: dict[fx.Node, fx.Node] = {}
        self._known: dict[Any, fx.Node] = {}
        self._literals: dict[fx.Node, Tensor | None] = {}

    def copy(self, n: fx.Node, *, keep: bool = False) -> fx.Node:
        """Take over a node of another graph whose arguments have been taken over; ``keep`` it apart from its argument."""
        if n.op == "call_function" and not (keep and n.target in _SAME):
            args, kwargs = fx.map_arg((n.args, n.kwargs), self.env.__getitem__)
            # What makes several tensors is only looked at through them, and they know their shapes.
            several = () if any(user.target is operator.getitem for user in n.users) else None
            found = self.emit(n.target, *args, like=n.meta.get("val", several), **kwargs)
        else:
            found = self.graph.node_copy(n, self.env.__getitem__)
            if n.op == "get_attr":
                x = getattr(self.root, str(n.target))
                found.meta["val"] = empty(x.shape, x.dtype) if isinstance(x, Tensor) else x
        self.env[n] = found
        return found

    def emit(self, target: Any, *args: Any, like: Any = None, **kwargs: Any) -> fx.Node:
        """A node that has the value of ``target(*args, **kwargs)``, whose shape and dtype are those of ``like`` if given."""
        if like is None:
            like = self.result(target, args, kwargs)
        for law in _LAWS:
            found = law(self, target, args, kwargs, like)
            if found is not None:
                return found
        key = (target, *_hashable((args, kwargs)))
        if key not in self._known:
            n = self.graph.call_function(target, args, kwargs)
            n.meta["val"] = like
            self._known[key] = n
        return self._known[key]

    def result(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What an operation makes, without numbers."""
        args, kwargs = fx.map_arg((args, kwargs), value)
        if _is_pointwise(target):
            tensors = [x for x in args if isinstance(x, Tensor)]
            dtype = (
                torch.bool if target in _TESTS else torch.result_type(tensors[-1], args[0] if len(tensors) > 1 else 0)
            )
            return empty(np.broadcast_shapes(*(x.shape for x in tensors)), dtype)
        return target(*args, **kwargs)

    def literal(self, n: fx.Node) -> Tensor | None:
        """The numbers of a node that depends on no input, if they are few."""
        if n not in self._literals:
            found = None
            if n.op == "get_attr":
                x = getattr(self.root, str(n.target))
                found = x.detach() if isinstance(x, Tensor) and x.numel() <= LARGEST_LITERAL else None
            elif n.op == "call_function" and isinstance(value(n), Tensor) and value(n).numel() <= LARGEST_LITERAL:
                inputs = {x: self.literal(x) for x in n.all_input_nodes}
                if all(x is not None for x in inputs.values()) and _is_repeatable(n.target):
                    args, kwargs = fx.map_arg((n.args, n.kwargs), inputs.__getitem__)
                    with torch.no_grad():
                        found = n.target(*args, **kwargs)  # type: ignore[operator]
            self._literals[n] = found
        return self._literals[n]

    def view(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """``x`` in another shape."""
        return self.emit(aten.reshape.default, x, list(shape), like=empty(shape, value(x).dtype))

    def expand(self, x: fx.Node, shape: Sequence[int]) -> fx.Node:
        """``x`` repeated."""
        return self.emit(aten.expand.default, x, list(shape), like=empty(shape, value(x).dtype))

    def permute(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """``x`` with its dimensions in another order."""
        shape = [shape_of(x)[d] for d in order]
        return self.emit(aten.permute.default, x, list(order), like=empty(shape, value(x).dtype))


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without numbers."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")


def _is_repeatable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags


def _is_pointwise(target: Any) -> bool:
    """Whether an operation makes each number from the numbers at the same place."""
    return _is_repeatable(target) and torch.Tag.pointwise in target.tags


def _hashable(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return tuple(map(_hashable, x))
    if isinstance(x, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(x.items()))
    return (type(x), str(x)) if isinstance(x, float) else (type(x), x)


def _is(n: Any, *targets: Any) -> bool:
    return isinstance(n, fx.Node) and n.op == "call_function" and n.target in targets


Law = Callable[[Builder, Any, tuple[Any, ...], dict[str, Any], Any], fx.Node | None]


def _same(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """Operations that change nothing; where nothing is written in place, a copy is what it is a copy of."""
    if target in _SAME:
        return args[0]
    if target in _NOTHING:
        if isinstance(args[1], bool | fx.Node) or args[1] != _NOTHING[target] or kwargs:
            return None
    elif target is not aten.slice.Tensor and not (target is aten._to_copy.default and kwargs.keys() <= {"dtype"}):
        return None
    x = args[0]
    alike = isinstance(x, fx.Node) and shape_of(x) == tuple(like.shape) and value(x).dtype == like.dtype
    return x if alike and (target is not aten.slice.Tensor or len(args) < 5 or args[4] == 1) else None


def _shapes(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """Views, permutations and repetitions, merged; repetitions come last."""
    if target in _RESHAPING:
        return b.view(args[0], like.shape)
    if target is aten.reshape.default:
        return _view(b, args[0], tuple(like.shape))
    if target in (aten.transpose.int, aten.t.default):
        order = list(range(len(like.shape)))
        if order:
            i, j = args[1:] if len(args) > 1 else (0, -1)
            order[i], order[j] = order[j], order[i]
        return b.permute(args[0], order)
    if target is aten.permute.default:
        return _permute(b, args[0], [d % len(like.shape) for d in args[1]], list(args[1]))
    if target is aten.expand.default:
        x, shape = args[0], tuple(like.shape)
        if shape == shape_of(x):
            return x
        if _is(x, aten.expand.default):
            return b.expand(x.args[0], shape)
        return b.expand(x, shape) if shape != tuple(args[1]) or kwargs else None
    if target is aten.select.int and shape_of(args[0])[args[1]] == 1:
        return b.view(args[0], like.shape)
    if target is aten.slice.Tensor and _is(args[0], aten.expand.default):
        inner, dim = _padded(b, args[0]), (args[1] if len(args) > 1 else 0)
        if shape_of(inner)[dim] == 1:
            return b.expand(inner, like.shape)
    return None


def _view(b: Builder, x: fx.Node, shape: tuple[int, ...]) -> fx.Node | None:
    if shape == shape_of(x):
        return x
    if _is(x, aten.reshape.default):
        return b.view(x.args[0], shape)  # type: ignore[arg-type]
    if _is(x, aten.expand.default):
        inner = _padded(b, x)
        wide = [(full, own) for full, own in zip(shape_of(x), shape_of(inner), strict=True) if full != 1]
        if [full for full, _ in wide] == [s for s in shape if s != 1]:
            own = iter(own for _, own in wide)
            return b.expand(b.view(inner, [1 if s == 1 else next(own) for s in shape]), shape)
    return None


def _permute(b: Builder, x: fx.Node, order: list[int], given: list[int]) -> fx.Node | None:
    shape = shape_of(x)
    wide = [d for d in order if shape[d] != 1]
    if wide == sorted(wide):
        return b.view(x, [shape[d] for d in order])
    if _is(x, aten.permute.default):
        before: Any = x.args[1]
        return b.permute(x.args[0], [before[d] for d in order])  # type: ignore[arg-type]
    if _is(x, aten.expand.default):
        return b.expand(b.permute(_padded(b, x), order), [shape[d] for d in order])
    return b.permute(x, order) if order != given else None


def _padded(b: Builder, expanded: fx.Node) -> fx.Node:
    """What an ``expand`` repeats, with as many dimensions as the result."""
    inner, rank = expanded.args[0], len(shape_of(expanded))
    own = shape_of(inner)  # type: ignore[arg-type]
    return b.view(inner, [1] * (rank - len(own)) + list(own))  # type: ignore[arg-type]


def _repeated(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """``f(expand(x)) = expand(f(x))`` for functions of single numbers, and for reductions of other dimensions."""
    if not any(_is(x, aten.expand.default) for x in args) or not isinstance(like, Tensor):
        return None
    if target in _REDUCTIONS:
        x, dims = args[0], args[1] if len(args) > 1 and args[1] else None
        inner = _padded(b, x)
        if dims is None or kwargs or any(shape_of(inner)[d] != shape_of(x)[d] for d in dims):
            return None
        kept = len(args) > 2 and args[2]
        summed = {d % len(shape_of(x)) for d in dims}
        shape = [1 if d in summed else s for d, s in enumerate(shape_of(inner)) if kept or d not in summed]
        return b.expand(b.emit(target, inner, *args[1:], like=empty(shape, like.dtype)), like.shape)
    if not _is_pointwise(target):
        return None
    # Other operands have all the numbers: reading one number many times is what the operation does by itself. The rank
    # stays, since a tensor without dimensions would count as a number in type promotion.
    narrow = tuple(_padded(b, x) if _is(x, aten.expand.default) else x for x in args)
    needed = np.broadcast_shapes(*(shape_of(x) for x in narrow if isinstance(x, fx.Node)))
    return b.expand(b.emit(target, *narrow, like=empty(needed, like.dtype), **kwargs), like.shape)


def _in_order(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """Indices that read every entry once and in order are a permutation and a view."""
    if target is aten.index_select.default:
        x, dim, index = args
        at = b.literal(index)
        if at is None or at.numel() == 0 or not torch.equal(at, torch.arange(int(at[0]), int(at[0]) + at.numel())):
            return None
        return b.emit(aten.slice.Tensor, x, dim, int(at[0]), int(at[0]) + at.numel(), like=like)
    if target is not aten.index.Tensor or any(i is None for i in args[1]):
        return None
    x, shape = args[0], shape_of(args[0])
    found = [b.literal(i) for i in args[1]]
    indices = [i for i in found if i is not None and i.dtype == torch.int64]
    if len(indices) != len(found):
        return None
    rank = max(i.dim() for i in indices)
    wide, single = [], []
    for d, i in enumerate(indices):
        places = [p - i.dim() + rank for p, s in enumerate(i.shape) if s != 1]
        if len(places) > 1 or not torch.equal(i.reshape(-1), torch.arange(shape[d])):
            return None
        if places:
            wide.append((places[0], d))
        else:
            single.append(d)
    if len({p for p, _ in wide}) != len(wide):
        return None
    order = [d for _, d in sorted(wide)] + single + list(range(len(indices), len(shape)))
    return b.view(b.permute(x, order), like.shape)


def _shared(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """``f(x) + f(y) = f(x + y)`` where f only moves numbers, or sets the same ones to zero."""
    if target not in _LINEAR or kwargs or not all(isinstance(x, fx.Node) for x in args):
        return None
    x, y = args
    if x.op != "call_function" or x.target != y.target or x is y or value(x).dtype != value(y).dtype:
        return None
    if x.target in (aten.reshape.default, aten.permute.default):
        if x.args[1] == y.args[1] and shape_of(x.args[0]) == shape_of(y.args[0]):
            inside = b.emit(target, x.args[0], y.args[0], like=value(x.args[0]))
            return b.emit(x.target, inside, x.args[1], like=like)
    elif x.target is aten.where.self and x.args[0] is y.args[0] and x.args[2] is y.args[2]:
        nothing, (p, q) = b.literal(x.args[2]), (x.args[1], y.args[1])
        if (
            nothing is not None
            and not nothing.any()
            and shape_of(x) == shape_of(y)
            and value(p).dtype == value(q).dtype
        ):
            shape = np.broadcast_shapes(shape_of(p), shape_of(q))
            inside = b.emit(target, p, q, like=empty(shape, value(p).dtype))
            return b.emit(aten.where.self, x.args[0], inside, x.args[2], like=like)
    return None


_LAWS: tuple[Law, ...] = (_same, _shapes, _repeated, _in_order, _shared)
