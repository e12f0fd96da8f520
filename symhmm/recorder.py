"""Recorder: runs a function of tensors once and writes down its operations as an fx graph of ATen calls.

This is what `make_fx` does for real tensors, without its symbolic shapes and its fake twin of every tensor: those import half
of torch's compiler, which takes a second, and make each operation ten times as dear.
"""

import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, get_proxy_slot
from torch.utils._python_dispatch import TorchDispatchMode

from symhmm.errors import StructureDependsOnInput, SymhmmError

_ATEN = torch.ops.aten
_LOCAL = threading.local()
# Long operations of which a recording only needs the shapes, and functions that make the same without numbers.
BLANK: dict[Any, Callable[..., Any]] = {}
# What these make depends on the shape of a tensor, not on what it holds.
SHAPE_ONLY = {
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_full", "new_empty", "new_tensor",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Writes every operation that reaches the kernels into ``graph``. Use `record`.

    Args:
        blank: leave out what need not be carried out; ``left_out`` then says whether there was any.
    """

    def __init__(self, *, blank: bool) -> None:
        super().__init__()
        self.graph, self.root = fx.Graph(), torch.nn.Module()
        self.paused, self.blank, self.left_out = False, blank, False
        self._held: dict[int, tuple[Tensor, fx.Node]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # asked by torch: skipping would import its compiler to say that nothing is to be compiled

    def input(self, name: str, x: Tensor) -> Tensor:
        """A placeholder for ``x``, as a tensor of its own even where the same one is given twice."""
        x = x.detach().requires_grad_(x.requires_grad)
        return self._known(x, self.graph.placeholder(name))

    def node(self, x: Tensor) -> fx.Node:
        """The node that made ``x``; a constant of the graph where it came from outside."""
        slot = getattr(x, "_symhmm_node", None)
        if slot is not None and slot[0] is self:
            made: fx.Node = slot[1]
            return made
        if id(x) not in self._held:
            name = f"_tensor_constant{len(self._held)}"
            self.root.register_buffer(name, x)
            self._held[id(x)] = x, self.graph.get_attr(name)
        return self._held[id(x)][1]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.paused:
            return func(*args, **kwargs)
        if torch.Tag.data_dependent_output in func.tags:
            for x in args:
                if isinstance(x, Tensor):
                    require_constant(func.overloadpacket.__name__, x)
            return func(*args, **kwargs)
        if func is _ATEN.lift_fresh.default:
            func = _ATEN.lift_fresh_copy.default  # the constant itself must not be written to
        name = func.overloadpacket.__name__
        node = self.graph.create_node("call_function", func, self._nodes(args), self._nodes(kwargs), name)
        # Nobody can read what depends on an input; `make_fx` within the recording would write down how the blank is made.
        blank = self.blank and func in BLANK and get_proxy_mode() is None and _input_of(node) is not None
        self.left_out |= blank
        out = (BLANK[func] if blank else func)(*args, **kwargs)
        if isinstance(out, Tensor):
            self._known(out, node)
        elif isinstance(out, (tuple, list)):
            for i, x in enumerate(out):
                if isinstance(x, Tensor):
                    self._known(x, self.graph.call_function(operator.getitem, (node, i)))
        return out

    def _known(self, x: Tensor, node: fx.Node) -> Tensor:
        x._symhmm_node = (self, node)  # type: ignore[attr-defined]
        if x.layout == torch.strided:  # shape, strides and dtype, for passes over the graph
            node.meta["val"] = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
            node.meta["device"] = x.device
        return x

    def _nodes(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            return self.node(x)
        if isinstance(x, torch.Generator):
            return None  # nothing that code can name; the draw itself is there for whoever refuses it
        if isinstance(x, (tuple, list)):
            return type(x)(map(self._nodes, x))
        return {k: self._nodes(v) for k, v in x.items()} if isinstance(x, dict) else x


def record(
    f: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]], values: Sequence[Tensor], data: Sequence[Tensor]
) -> fx.GraphModule:
    """``f(values, data)`` as a graph of ATen calls, with one placeholder for each tensor and a list as output.

    Operators in `BLANK` that depend on an input are not carried out: nobody can read what they would make. Where that makes an
    operation of torch fail, ``f`` is run again and all is carried out.

    Raises:
        StructureDependsOnInput: a number is read out of a tensor that depends on an input.

    >>> module = record(lambda v, d: [v[0] * d[0].exp()], [torch.ones(2)], [torch.zeros(2)])
    >>> [n.name for n in module.graph.nodes]
    ['values_0', 'data_0', 'exp', 'mul', 'output']
    """
    recorder = Recorder(blank=True)
    try:
        return _recorded(recorder, f, values, data)
    except SymhmmError:
        raise
    except Exception:
        if not recorder.left_out:
            raise
    # A check of numbers, as of a matrix to be factorised, may have met those that are none.
    return _recorded(Recorder(blank=False), f, values, data)


def _recorded(
    recorder: Recorder,
    f: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]],
    values: Sequence[Tensor],
    data: Sequence[Tensor],
) -> fx.GraphModule:
    inputs = [
        [recorder.input(f"{n}_{i}", x) for i, x in enumerate(xs)] for n, xs in (("values", values), ("data", data))
    ]
    stack = _LOCAL.__dict__.setdefault("recorders", [])
    stack.append(recorder)
    try:
        with recorder, torch.autograd.set_detect_anomaly(False):  # which reads all gradients
            out = f(*inputs)
    finally:
        stack.pop()
    recorder.graph.output([recorder.node(x) for x in out])
    return fx.GraphModule(recorder.root, recorder.graph)


def _recorder() -> Recorder | None:
    stack = _LOCAL.__dict__.get("recorders")
    return stack[-1] if stack else None


def tracing() -> bool:
    """Whether operations are being written down, here or by `make_fx`."""
    recorder = _recorder()
    return (recorder is not None and not recorder.paused) or get_proxy_mode() is not None


@contextmanager
def untraced() -> Iterator[None]:
    """Operations in here are only carried out: their results are constants to whoever writes down the others."""
    recorder = _recorder()
    before = recorder is not None and recorder.paused
    if recorder is not None:
        recorder.paused = True
    try:
        with disable_proxy_modes_tracing():
            yield
    finally:
        if recorder is not None:
            recorder.paused = before


def require_constant(reader: str, x: Tensor) -> None:
    """Refuse reading ``x`` while tracing if it depends on an input of the trace: it would be baked in silently."""
    origin = _origin(x)
    found = None if origin is None else _input_of(origin)
    if found is not None:
        raise StructureDependsOnInput(
            f"the program reads a number ({reader}) out of a tensor that depends on input {found.name!r}.",
            placeholder=found.name,
            suggestion="torch.where instead of a Python branch",
        )


def _input_of(node: fx.Node) -> fx.Node | None:
    """An input on whose numbers those of a node depend."""
    todo = [node]
    seen = set(todo)
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return node
        if getattr(node.target, "__name__", "").split(".")[0] not in SHAPE_ONLY:
            todo += [n for n in node.all_input_nodes if n not in seen]
            seen.update(node.all_input_nodes)
    return None


def _origin(x: Tensor) -> fx.Node | None:
    """The node that made ``x`` in the trace under way."""
    while is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    slot = getattr(x, "_symhmm_node", None)
    if slot is not None and slot[0] is _recorder():
        made: fx.Node = slot[1]
        return made
    mode = get_proxy_mode()
    proxied = None if mode is None else get_proxy_slot(x, mode.tracer, None)
    return None if proxied is None else proxied.proxy.node
