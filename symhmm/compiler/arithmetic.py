"""Laws of arithmetic for traced graphs: signs, numbers that are the same everywhere, and quotients that are made anyway.

Negation, and multiplication by one and by two, are exact, so that next to nothing is rounded otherwise than before.
"""

from typing import Any

import numpy as np
import torch
from torch import fx

from symhmm.compiler.builder import Builder, Law, calls, empty, shape_of, value

aten = torch.ops.aten

FEW = 2**14  # numbers up to which an operation costs more than what it does to them
_FILLED = {
    aten.zeros_like.default: 0,
    aten.ones_like.default: 1,
    aten.full_like.default: None,
    aten.new_zeros.default: 0,
    aten.new_ones.default: 1,
    aten.new_full.default: None,
}
_VIEWS = {aten.reshape.default, aten.expand.default, aten.permute.default, aten.slice.Tensor, aten.select.int}
# Functions of one tensor for which f(-x) = -f(x).
_ODD = {
    aten.sum.dim_IntList,
    aten.sum.default,
    aten.cumsum.default,
    aten.flip.default,
    aten.reshape.default,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}
_EVEN = {aten.abs.default, aten.square.default, aten.cos.default}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.mm.default, aten.bmm.default}


def _constant(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """What hangs on the shape of a tensor alone does not hang on the tensor."""
    if target not in _FILLED:
        return None
    number = _FILLED[target]
    if number is None:
        number = args[1] if target is aten.full_like.default else args[2]
    if isinstance(number, fx.Node):
        return None
    device = kwargs.get("device") or b.device(args[0])
    return b.emit(aten.full.default, list(like.shape), number, dtype=like.dtype, device=device, like=like)


def filling(n: Any) -> Any:
    """The number that a node consists of; None if there are several or it is not known."""
    while calls(n, *_VIEWS):
        n = n.args[0]
    return n.args[1] if calls(n, aten.full.default) else None


def _ones(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """A product with ones, a quotient by ones, a sum with zeros."""
    if target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor) or kwargs:
        return None
    neutral = 1 if target in (aten.mul.Tensor, aten.div.Tensor) else 0
    turned = [args[::-1]] if target in (aten.mul.Tensor, aten.add.Tensor) else []
    for x, one in [args, *turned]:
        if isinstance(x, fx.Node) and filling(one) == neutral and value(x).dtype == like.dtype:
            return x if shape_of(x) == tuple(like.shape) else b.expand(x, like.shape)
    return None


def _signs(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """Signs are taken last, where they meet another or vanish in a sum."""
    if kwargs or not isinstance(like, torch.Tensor):
        return None

    def negative(x: Any) -> bool:
        return calls(x, aten.neg.default)

    def opposite(*inside: Any) -> fx.Node:
        return b.emit(aten.neg.default, b.emit(target, *inside, like=like), like=like)

    if target is aten.neg.default:
        (x,) = args
        if negative(x):
            return x.args[0]
        if calls(x, aten.sub.Tensor) and not x.kwargs and all(isinstance(y, fx.Node) for y in x.args):
            return b.emit(aten.sub.Tensor, x.args[1], x.args[0], like=like)
        return None
    if (
        target is aten.mul.Tensor
        and args[1] == -1
        and not isinstance(args[1], fx.Node)
        and like.dtype.is_floating_point
    ):
        return b.emit(aten.neg.default, args[0], like=like) if value(args[0]).dtype == like.dtype else None
    if not any(negative(x) for x in args):
        return None
    x, *rest = args
    if target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(x, fx.Node) and isinstance(rest[0], fx.Node):
        return _sum_of_signs(b, target is aten.sub.Tensor, x, rest[0], like)
    if target in (aten.add.Tensor, aten.sub.Tensor) and negative(x):
        number = rest[0] if target is aten.add.Tensor else -rest[0]
        return b.emit(aten.rsub.Scalar, x.args[0], number, like=like)
    if target is aten.rsub.Scalar and len(rest) == 1:
        return b.emit(aten.add.Tensor, x.args[0], rest[0], like=like)
    if target in _ODD and (few(like) or like.numel() <= value(x).numel()):
        return opposite(x.args[0], *rest)
    if target in _EVEN or (target is aten.pow.Tensor_Scalar and rest == [2]):
        return b.emit(target, x.args[0], *rest, like=like)
    if target in _PRODUCTS and len(args) == 2:
        inside = [y.args[0] if negative(y) else y for y in args]
        if all(negative(y) for y in args):
            return b.emit(target, *inside, like=like)
        if few(like) or any(negative(y) and value(y).numel() == like.numel() for y in args):
            return opposite(*inside)
    return None


def _sum_of_signs(b: Builder, minus: bool, x: fx.Node, y: fx.Node, like: Any) -> fx.Node:
    """``x + y``, or ``x - y`` with ``minus``, where at least one of them is the negative of something."""
    signs = [-1 if calls(n, aten.neg.default) else 1 for n in (x, y)]
    inside: list[Any] = [n.args[0] if sign < 0 else n for n, sign in zip((x, y), signs, strict=True)]
    second = -signs[1] if minus else signs[1]
    if signs[0] == second:
        total = b.emit(aten.add.Tensor, *inside, like=like)
        return total if second > 0 else b.emit(aten.neg.default, total, like=like)
    return b.emit(aten.sub.Tensor, *(inside if signs[0] > 0 else inside[::-1]), like=like)


def _factors(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """The number by which the derivative of a power is multiplied (``mul.Scalar``) is taken last, as signs are."""
    if kwargs or not isinstance(like, torch.Tensor) or not like.dtype.is_floating_point or not few(like):
        return None
    scaled = [x for x in args if calls(x, aten.mul.Scalar) and value(x).dtype == like.dtype]
    if not scaled:
        return None
    number: Any = scaled[0].args[1]
    inside = [x.args[0] if x in scaled else x for x in args]
    if target in (aten.mul.Tensor, aten.mul.Scalar):
        if len(scaled) == 2:
            number = number * scaled[1].args[1]
        elif not isinstance(args[1], fx.Node):
            return b.emit(aten.mul.Scalar, inside[0], number * args[1], like=like)
        target = aten.mul.Tensor
    elif target in (aten.add.Tensor, aten.sub.Tensor):
        if len(scaled) < 2 or number != scaled[1].args[1]:
            return None
    elif target not in _ODD:
        return None
    return b.emit(aten.mul.Scalar, b.emit(target, *inside, like=like), number, like=like)


def few(like: Any) -> bool:
    """Whether a tensor has so few numbers that what is done to them costs less than an operation."""
    return bool(like.numel() <= FEW)


def _quotients(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """``x ((y / z) / z) = (x / z) (y / z)``: both are made anyway, in the gradient of ``y / z``."""
    if target is not aten.mul.Tensor or kwargs or not all(isinstance(x, fx.Node) for x in args):
        return None
    for x, q in (args, args[::-1]):
        if calls(q, aten.div.Tensor) and calls(q.args[0], aten.div.Tensor) and q.args[1] is q.args[0].args[1]:
            z = q.args[1]
            if calls(x, aten.div.Tensor) and x.args[1] is z:
                continue  # it would take one division from another, and give it back
            if isinstance(z, fx.Node) and not q.kwargs and not q.args[0].kwargs:
                shape = np.broadcast_shapes(shape_of(x), shape_of(z))
                return b.emit(
                    target, b.emit(aten.div.Tensor, x, z, like=empty(shape, like.dtype)), q.args[0], like=like
                )
    return None


def _inside(b: Builder, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: Any) -> fx.Node | None:
    """``low <= x <= high`` where x is cut off at these bounds: what the cut has not changed lies inside."""
    if (
        target is not aten.logical_and.default
        or not calls(args[0], aten.ge.Scalar)
        or not calls(args[1], aten.le.Scalar)
    ):
        return None
    (x, low), (y, high) = args[0].args, args[1].args
    if x is not y or not b.known(aten.clamp.default, x, low, high):
        return None
    cut = b.emit(aten.clamp.default, x, low, high, like=value(x))
    return b.emit(aten.eq.Tensor, cut, x, like=like)


ARITHMETIC: tuple[Law, ...] = (_constant, _ones, _signs, _factors, _quotients, _inside)
