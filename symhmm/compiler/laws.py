"""Laws of tensor algebra for traced graphs: the normal form of views, repetitions, indices and shared operations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from symhmm.compiler.arithmetic import ARITHMETIC, few
from symhmm.compiler.builder import SAME, Builder, Law, calls, empty, is_pointwise, pruned, shape_of, value

aten = torch.ops.aten

_RESHAPING = {
    aten.view.default,
    aten._unsafe_view.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
}
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
_REDUCTIONS = {aten.sum.dim_IntList, aten.logsumexp.default, aten.amax.default}
_LINEAR = {aten.add.Tensor, aten.sub.Tensor}


def simplified(graph: fx.Graph, root: torch.nn.Module, varying: Sequence[fx.Node]) -> fx.Graph:
    """The same function with fewer operations, to be differentiated as before.

    Operations that change nothing are left out; numbers that are only repeated are computed once and repeated afterwards
    (``f(expand(x)) = expand(f(x))``); reading all entries in order is a view; views are merged, and sums are taken before
    what they share is applied (``view(x) + view(y) = view(x + y)``, ``where(m, x, 0) + where(m, y, 0) = where(m, x + y, 0)``).

    Args:
        root: where tensors that the graph names are found.
        varying: inputs that change from call to call; what depends on the others alone costs nothing.
    """
    if any(n.target in (aten.as_strided.default, aten.as_strided_scatter.default) for n in graph.nodes):
        return graph  # what it computes hangs on how its input lies in memory
    made = builder(root, varying)
    returned = {x for n in graph.nodes if n.op == "output" for x in n.all_input_nodes}
    for n in graph.nodes:
        made.copy(n, keep=n in returned)
    return pruned(made.graph)


def builder(root: torch.nn.Module, varying: Sequence[fx.Node]) -> Builder:
    """A graph under construction by these laws."""
    return Builder(root, _LAWS, varying)


def _same(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """Operations that change nothing; where nothing is written in place, a copy is what it is a copy of."""
    if target in SAME:
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
        if calls(x, aten.expand.default):
            return b.expand(x.args[0], shape)
        return b.expand(x, shape) if shape != tuple(args[1]) or kwargs else None
    if target is aten.select.int and shape_of(args[0])[args[1]] == 1:
        return b.view(args[0], like.shape)
    if target is aten.slice.Tensor and calls(args[0], aten.expand.default):
        inner, dim = _padded(b, args[0]), (args[1] if len(args) > 1 else 0)
        if shape_of(inner)[dim] == 1:
            return b.expand(inner, like.shape)
    return None


def _view(b: Builder, x: fx.Node, shape: tuple[int, ...]) -> fx.Node | None:
    if shape == shape_of(x):
        return x
    if calls(x, aten.reshape.default):
        return b.view(x.args[0], shape)  # type: ignore[arg-type]
    if calls(x, aten.sum.dim_IntList) and len(x.args) > 2 and x.args[1] and not x.kwargs:
        summed, before = x.args[1], shape_of(x.args[0])  # type: ignore[arg-type]
        if shape == tuple(n for d, n in enumerate(before) if d not in summed and d - len(before) not in summed):  # type: ignore[operator]
            return b.emit(aten.sum.dim_IntList, *x.args[:2], like=empty(shape, value(x).dtype))
    if calls(x, aten.expand.default):
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
    if calls(x, aten.permute.default):
        before: Any = x.args[1]
        return b.permute(x.args[0], [before[d] for d in order])  # type: ignore[arg-type]
    if calls(x, aten.expand.default):
        return b.expand(b.permute(_padded(b, x), order), [shape[d] for d in order])
    return b.permute(x, order) if order != given else None


def _padded(b: Builder, expanded: fx.Node) -> fx.Node:
    """What an ``expand`` repeats, with as many dimensions as the result."""
    inner, rank = expanded.args[0], len(shape_of(expanded))
    own = shape_of(inner)  # type: ignore[arg-type]
    return b.view(inner, [1] * (rank - len(own)) + list(own))  # type: ignore[arg-type]


def _repeated(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """``f(expand(x)) = expand(f(x))`` for functions of single numbers, and for reductions of other dimensions."""
    if not any(calls(x, aten.expand.default) for x in args) or not isinstance(like, Tensor):
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
    if not is_pointwise(target):
        return None
    # Other operands have all the numbers: reading one number many times is what the operation does by itself. The rank
    # stays, since a tensor without dimensions would count as a number in type promotion.
    narrow = tuple(_padded(b, x) if calls(x, aten.expand.default) else x for x in args)
    needed = np.broadcast_shapes(*(shape_of(x) for x in narrow if isinstance(x, fx.Node)))
    return b.expand(b.emit(target, *narrow, like=empty(needed, like.dtype), **kwargs), like.shape)


def _narrow(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """Dimensions of one entry that a view has added are left out, and added to the result: ``f(view(x)) = view(f(x))``.

    Another view may be needed for that where there are so many numbers that sums of them are worth more.
    """
    if not any(calls(x, aten.reshape.default) for x in args) or not isinstance(like, torch.Tensor):
        return None
    if target in (aten.neg.default, aten.mul.Scalar):
        return None  # signs and factors come last
    if target is aten.sum.dim_IntList and not kwargs:
        return _narrow_sum(b, args, like)
    tensors = [x for x in args if isinstance(x, fx.Node)]
    if not is_pointwise(target) or (len({value(x).dtype for x in tensors}) > 1 and target is not aten.where.self):
        return None
    rank, shapes = len(like.shape), [shape_of(x) for x in tensors]
    full = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    kept = [d for d in range(rank) if any(shape[d] != 1 for shape in full)]
    if not kept or len(kept) == rank:
        return None
    inside = {}
    for x, own, wide in zip(tensors, shapes, full, strict=True):
        shape = [wide[d] for d in kept]
        short = shape[next((d for d, n in enumerate(shape[:-1]) if n != 1), len(shape) - 1) :]
        same = list(own) in ([], shape, short)
        if not same and b.moves(x) and not calls(x, aten.reshape.default) and few(like):
            return None
        inside[x] = x if same else b.view(x, short)
    made = b.emit(
        target, *(inside[x] if isinstance(x, fx.Node) else x for x in args), **kwargs,
        like=empty([like.shape[d] for d in kept], like.dtype),
    )  # fmt: skip
    return b.view(made, like.shape)


def _narrow_sum(b: Builder, args: tuple[Any, ...], like: torch.Tensor) -> fx.Node | None:
    x, keep = args[0], len(args) > 2 and bool(args[2])
    inner = x.args[0]
    outside, own = shape_of(x), shape_of(inner)
    wide, places = [d for d, n in enumerate(outside) if n != 1], [d for d, n in enumerate(own) if n != 1]
    if not args[1] or len(own) >= len(outside) or [outside[d] for d in wide] != [own[d] for d in places]:
        return None
    summed = [places[wide.index(d % len(outside))] for d in args[1] if outside[d] != 1]
    if not summed:
        return b.view(x, like.shape)
    kept = [1 if d in summed else n for d, n in enumerate(own) if keep or d not in summed]
    made = b.emit(aten.sum.dim_IntList, inner, summed, *([True] if keep else []), like=empty(kept, like.dtype))
    return b.view(made, like.shape)


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


_LAWS: tuple[Law, ...] = (_same, *ARITHMETIC, _shapes, _repeated, _narrow, _in_order, _shared)
