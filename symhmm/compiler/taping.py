"""How operations of torch are written on a tape: each function is given places of numbers and returns places.

What is not here, or not in this form, is left to torch.
"""

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from symhmm.compiler.tape import MOST, Tape

Write = Callable[..., Any]

# The word for what an operation does to each number; its operands are tensors or numbers.
_EACH = {
    "add": "add", "sub": "sub", "mul": "mul", "div": "div", "maximum": "maximum", "minimum": "minimum", "eq": "eq",
    "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge", "logical_and": "and", "logical_or": "or",
    "logical_not": "not", "bitwise_and": "and", "bitwise_or": "or", "bitwise_not": "not", "where": "where", "neg": "neg",
    "abs": "abs", "sign": "sign", "sgn": "sign", "exp": "exp", "expm1": "expm1", "log": "log", "log1p": "log1p",
    "sqrt": "sqrt", "sin": "sin", "cos": "cos", "tanh": "tanh", "sigmoid": "sigmoid", "pow": "pow", "xlogy": "xlogy",
    "erf": "erf", "lgamma": "lgamma", "digamma": "digamma", "isfinite": "isfinite",
}  # fmt: skip
_CONDITIONS = {
    "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "eq", "ne", "lt", "le", "gt",
    "ge", "isfinite",
}  # fmt: skip
# Functions that torch works out for several numbers at once.
_DEAR = {
    "exp", "expm1", "log", "log1p", "sin", "cos", "tanh", "sigmoid", "pow", "xlogy", "erf", "lgamma", "digamma", "softplus",
    "softplus_backward", "logsumexp", "_softmax", "_log_softmax", "_log_softmax_backward_data",
}  # fmt: skip
MOST_DEAR = 512  # numbers of which they are worked out here
# What only says where numbers lie; zeros that it adds are the number at place zero.
_VIEWS = {
    "reshape", "view", "_unsafe_view", "permute", "expand", "slice", "select", "squeeze", "unsqueeze", "transpose", "t",
    "flip", "split_with_sizes", "split", "unbind", "cat", "stack", "select_backward", "slice_backward", "diagonal",
    "diagonal_backward", "alias", "clone", "detach", "roll", "repeat",
}  # fmt: skip


def name_of(target: Any) -> str:
    """The name of an operator of torch, or of the function that stands for it; empty for others."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__) if target.namespace == "aten" else ""
    name = getattr(target, "__name__", "")
    return name if getattr(torch, name, None) is target else ""


def written(tape: Tape, n: fx.Node, env: dict[fx.Node, Any]) -> Any:
    """Places of what a node makes, written on the tape; None for what a tape cannot do.

    Args:
        env: places of the node's arguments.
    """
    name = name_of(n.target)
    args: Any
    args, kwargs = fx.map_arg((n.args, n.kwargs), env.__getitem__)
    if n.target is operator.getitem:
        return args[0][args[1]]
    if name in _VIEWS:
        found = n.target(*args, **kwargs)  # type: ignore[operator]
        return found if isinstance(found, Tensor) or all(x.numel() for x in found) else None
    like: Any = n.meta.get("val")
    if name == "constant_pad_nd" and (len(args) < 3 or args[2] == 0):
        return n.target(*args[:2])  # type: ignore[operator]
    if name == "_to_copy" and kwargs.keys() <= {"dtype"}:
        same = like.dtype == _first(n).dtype
        return args[0] if same or like.dtype.is_floating_point else tape.add("ne", like.shape, args[0], 0.0)
    if kwargs or (name in _DEAR and max(x.numel() for x in args if isinstance(x, Tensor)) > MOST_DEAR):
        return None
    if name in _EACH:
        return _each(tape, name, like, args)
    write = _OTHERS.get(name)
    return None if write is None else write(tape, like, *args)


def _first(n: fx.Node) -> Any:
    return n.all_input_nodes[0].meta["val"]


def _each(tape: Tape, name: str, like: Tensor, args: tuple[Any, ...]) -> Tensor | None:
    if name == "mul" and like.dtype == torch.bool:
        name = "logical_and"
    if (name in _CONDITIONS) != (like.dtype == torch.bool) and name != "where":
        return None
    if name == "pow" and not isinstance(args[1], Tensor):
        if args[1] == 2:
            name, args = "mul", (args[0], args[0])
        elif args[1] == 0.5:  # as torch has it, for which the root of -inf is no number
            name, args = "sqrt", args[:1]
        elif args[1] == -0.5:
            name, args = "div", (1.0, tape.add("sqrt", like.shape, args[0]))
    return tape.add(_EACH[name], like.shape, *args)


def _rsub(tape: Tape, like: Tensor, x: Any, y: Any, factor: float = 1) -> Tensor | None:
    return tape.add("sub", like.shape, y, x) if factor == 1 else None


def _masked_fill(tape: Tape, like: Tensor, x: Any, mask: Any, filler: Any) -> Tensor:
    return tape.add("where", like.shape, mask, filler, x)


def _clamp(tape: Tape, like: Tensor, x: Any, low: Any = None, high: Any = None) -> Tensor:
    for word, bound in (("maximum", low), ("minimum", high)):
        if bound is not None:
            x = tape.add(word, like.shape, x, bound)
    return x


def _clamp_max(tape: Tape, like: Tensor, x: Any, high: Any) -> Tensor:
    return _clamp(tape, like, x, None, high)


def _relu(tape: Tape, like: Tensor, x: Any) -> Tensor:
    return tape.add("maximum", like.shape, x, 0.0)


def _reciprocal(tape: Tape, like: Tensor, x: Any) -> Tensor:
    return tape.add("div", like.shape, 1.0, x)


def _square(tape: Tape, like: Tensor, x: Any) -> Tensor:
    return tape.add("mul", like.shape, x, x)


def _addcmul(tape: Tape, like: Tensor, x: Any, y: Any, z: Any) -> Tensor:
    return tape.add("add", like.shape, x, tape.add("mul", like.shape, y, z))


def _softplus(tape: Tape, like: Tensor, x: Any, beta: float = 1, threshold: float = 20) -> Tensor | None:
    return tape.add("softplus", like.shape, x, float(threshold)) if beta == 1 else None


def _softplus_backward(tape: Tape, like: Tensor, g: Any, x: Any, beta: float, threshold: float) -> Tensor | None:
    return tape.add("softplus_backward", like.shape, g, x, float(threshold)) if beta == 1 else None


def _sigmoid_backward(tape: Tape, like: Tensor, g: Any, s: Any) -> Tensor:
    rest = tape.add("sub", like.shape, 1.0, s)
    return tape.add("mul", like.shape, tape.add("mul", like.shape, g, rest), s)


def _tanh_backward(tape: Tape, like: Tensor, g: Any, t: Any) -> Tensor:
    rest = tape.add("sub", like.shape, 1.0, tape.add("mul", like.shape, t, t))
    return tape.add("mul", like.shape, g, rest)


def _reduced(word: str) -> Write:
    def write(tape: Tape, like: Tensor, x: Tensor, dims: Any = None, keep: bool = False) -> Tensor | None:
        if like.dtype == torch.int64:
            return None
        given = range(x.dim()) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        away = sorted({d % x.dim() for d in given}) if x.dim() else []
        kept = [d for d in range(x.dim()) if d not in away]
        count = prod(x.shape[d] for d in away)
        flat = x.permute((*kept, *away)).reshape([*(x.shape[d] for d in kept), count])
        return tape.add(word, flat.shape[:-1], flat, reduced=count).reshape(like.shape)

    return write


def _product(tape: Tape, like: Tensor, x: Tensor, y: Tensor) -> Tensor | None:
    """``mm``, ``bmm``, ``mv`` and ``dot``."""
    columns = y if y.dim() == 1 else y.mT
    rows = x if y.dim() == 1 else x.unsqueeze(-2)
    columns = columns if y.dim() == 1 else columns.unsqueeze(-3)
    size = x.shape[-1]
    if like.numel() * size > MOST:
        return None
    return tape.add("dot", like.shape, rows, columns, reduced=size)


def _scanned(word: str) -> Write:
    def write(tape: Tape, like: Tensor, x: Tensor, dim: int) -> Tensor:
        return tape.scan(word, x, dim) if x.dim() else x

    return write


def _log_softmax(tape: Tape, like: Tensor, x: Tensor, dim: int, half: bool) -> Tensor:
    # From the largest down: a logarithm of a sum beside it would be rounded as it is.
    below = tape.add("sub", like.shape, x, _along(tape, "amax", x, dim))
    return tape.add("sub", like.shape, below, _along(tape, "logsumexp", below, dim))


def _softmax(tape: Tape, like: Tensor, x: Tensor, dim: int, half: bool) -> Tensor:
    return tape.add("exp", like.shape, _log_softmax(tape, like, x, dim, half))


def _log_softmax_backward(tape: Tape, like: Tensor, g: Tensor, out: Tensor, dim: int, dtype: Any) -> Tensor:
    share = tape.add("mul", like.shape, tape.add("exp", like.shape, out), _along(tape, "sum", g, dim))
    return tape.add("sub", like.shape, g, share)


def _softmax_backward(tape: Tape, like: Tensor, g: Tensor, out: Tensor, dim: int, dtype: Any) -> Tensor:
    both = tape.add("mul", like.shape, g, out)
    return tape.add("sub", like.shape, both, tape.add("mul", like.shape, out, _along(tape, "sum", both, dim)))


def _along(tape: Tape, word: str, x: Tensor, dim: int) -> Tensor:
    """A reduction of one dimension, which stays with one entry; of a single number without dimensions, if that is all."""
    if not x.dim():
        return _along(tape, word, x.reshape(1), 0).reshape(())
    moved = x.movedim(dim, -1)
    return tape.add(word, moved.shape[:-1], moved, reduced=moved.shape[-1]).unsqueeze(-1).movedim(-1, dim)


_OTHERS: dict[str, Write] = {
    "rsub": _rsub,
    "masked_fill": _masked_fill,
    "clamp": _clamp,
    "clamp_min": _clamp,
    "clamp_max": _clamp_max,
    "relu": _relu,
    "reciprocal": _reciprocal,
    "square": _square,
    "addcmul": _addcmul,
    "softplus": _softplus,
    "softplus_backward": _softplus_backward,
    "sigmoid_backward": _sigmoid_backward,
    "tanh_backward": _tanh_backward,
    "sum": _reduced("sum"),
    "amax": _reduced("amax"),
    "logsumexp": _reduced("logsumexp"),
    "cumsum": _scanned("cumsum"),
    "cumprod": _scanned("cumprod"),
    "_softmax": _softmax,
    "_log_softmax": _log_softmax,
    "_softmax_backward_data": _softmax_backward,
    "_log_softmax_backward_data": _log_softmax_backward,
    "mm": _product,
    "bmm": _product,
    "mv": _product,
    "dot": _product,
}
