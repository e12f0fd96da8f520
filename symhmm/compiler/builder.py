"""Graphs under construction: nodes are made in a normal form that laws decide upon, and what is equal is made once."""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

aten = torch.ops.aten

LARGEST_LITERAL = 2**16  # numbers that are looked at to see whether they say "all of them, in order"
SAME = {aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default, aten.clone.default}
_TESTS = {aten.eq.Tensor, aten.eq.Scalar, aten.isfinite.default}


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

    Args:
        root: where tensors that the graph names are found.
        laws: each may answer with another node for an operation; the first that does is believed.
        varying: inputs of the graphs to be copied that change from call to call; the others are data.
    """

    def __init__(self, root: torch.nn.Module, laws: "Sequence[Law]", varying: Sequence[fx.Node]) -> None:
        self.root, self.laws, self.graph = root, laws, fx.Graph()
        self._varying, self._moving = frozenset(varying), set[fx.Node]()
        self.env: dict[fx.Node, fx.Node] = {}
        self._known: dict[Any, fx.Node] = {}
        self._literals: dict[fx.Node, Tensor | None] = {}

    def copy(self, n: fx.Node, *, keep: bool = False) -> fx.Node:
        """Take over a node of another graph whose arguments have been taken over; ``keep`` it apart from its argument."""
        if n.op == "call_function" and not (keep and n.target in SAME):
            args, kwargs = fx.map_arg((n.args, n.kwargs), self.env.__getitem__)
            # What makes several tensors is only looked at through them, and they know their shapes.
            several = () if any(user.target is operator.getitem for user in n.users) else None
            found = self.emit(n.target, *args, like=n.meta.get("val", several), **kwargs)
        else:
            found = self.graph.node_copy(n, self.env.__getitem__)
            if n.op == "get_attr":
                x = getattr(self.root, str(n.target))
                found.meta["val"] = empty(x.shape, x.dtype) if isinstance(x, Tensor) else x
                found.meta["device"] = x.device if isinstance(x, Tensor) else torch.device("cpu")
            if n in self._varying:
                self._moving.add(found)
            self._place(found)
        self.env[n] = found
        return found

    def emit(self, target: Any, *args: Any, like: Any = None, **kwargs: Any) -> fx.Node:
        """A node that has the value of ``target(*args, **kwargs)``, whose shape and dtype are those of ``like`` if given."""
        if like is None:
            like = self.result(target, args, kwargs)
        for law in self.laws:
            found = law(self, target, args, kwargs, like)
            if found is not None:
                return found
        key = (target, *_hashable((args, kwargs)))
        if key not in self._known:
            n = self.graph.call_function(target, args, kwargs)
            n.meta["val"] = like
            self._known[key] = n
            self._place(n)
        return self._known[key]

    def result(self, target: Any, args: Any, kwargs: Any) -> Any:
        """What an operation makes, without numbers."""
        args, kwargs = fx.map_arg((args, kwargs), value)
        if is_pointwise(target):
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
                if all(x is not None for x in inputs.values()) and is_repeatable(n.target):
                    args, kwargs = fx.map_arg((n.args, n.kwargs), inputs.__getitem__)
                    with torch.no_grad():
                        found = n.target(*args, **kwargs)  # type: ignore[operator]
            self._literals[n] = found
        return self._literals[n]

    def moves(self, n: fx.Node) -> bool:
        """Whether a node depends on inputs that change from call to call."""
        return n in self._moving

    def device(self, n: fx.Node) -> torch.device:
        """Where the numbers of a node are; numbers without dimensions may be apart from the others they meet."""
        device: torch.device = n.meta["device"]
        return device

    def _place(self, n: fx.Node) -> None:
        """Note of a new node what is known of its arguments."""
        if any(x in self._moving for x in n.all_input_nodes):
            self._moving.add(n)
        if "device" not in n.meta:
            given, devices = n.kwargs.get("device"), [self.device(x) for x in n.all_input_nodes]
            found = next((d for d in devices if d.type != "cpu"), torch.device("cpu"))
            n.meta["device"] = found if given is None else torch.device(given)  # type: ignore[arg-type]

    def known(self, target: Any, *args: Any) -> bool:
        """Whether this very operation has been made."""
        return (target, *_hashable((args, {}))) in self._known

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


def is_repeatable(target: Any) -> bool:
    """Whether an operation makes the same of the same."""
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded not in target.tags


def is_pointwise(target: Any) -> bool:
    """Whether an operation makes each number from the numbers at the same place."""
    return is_repeatable(target) and torch.Tag.pointwise in target.tags


def _hashable(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return tuple(map(_hashable, x))
    if isinstance(x, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(x.items()))
    return (type(x), str(x)) if isinstance(x, float) else (type(x), x)


def calls(n: Any, *targets: Any) -> bool:
    """Whether ``n`` is a node that carries out one of some operations."""
    return isinstance(n, fx.Node) and n.op == "call_function" and n.target in targets


Law = Callable[[Builder, Any, tuple[Any, ...], dict[str, Any], Any], fx.Node | None]
