"""Steps with tapes: what is small between the kernels of a recorded step is carried out by a kernel of its own.

An operation of torch takes one or two microseconds, however few its numbers; a step has hundreds of them beside the few that
read data. They are put into as few parts as their order allows, and each part becomes one operation.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx
from torch._C._functorch import peek_interpreter_stack
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from symhmm.chains.places import LIKE
from symhmm.chains.registered import DIRECT
from symhmm.compiler.step import Constants, Step
from symhmm.compiler.tape import MOST, Row, Tape
from symhmm.compiler.taping import written

FEWEST = 8  # operations that a part must save: its call takes as long as some four, and each tensor that goes in or out as one
MANY = 1000  # operations that take as long in some hundred evaluations as numba takes to import
LARGEST = 2**20  # numbers of a memory, which is then near at hand
TRIES = 8  # at tapes of which no part is too short
LITERALS = 32  # places for numbers that no operation names, such as one


@dataclass(frozen=True, repr=False)
class TapedStep(Step):
    """A step whose body plays its small operations from tapes, where nobody wants to see them.

    Args:
        plain: the same step without tapes; its constants are all but the last of these.
        literals: first numbers of the last constant, which is laid into the memory of the tapes.
        packed: which constants follow in it.
        shapes: of the values.
    """

    plain: Step
    literals: Tensor
    packed: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    def constants(self, data: Sequence[Tensor]) -> Constants:
        """What the body needs of the data."""
        made = self.plain.constants(data)
        with torch.no_grad():
            small = [made[i].reshape(-1).to(self.literals.dtype) for i in self.packed]
            return (*made, torch.cat([self.literals, *small]))

    def numbers(self, values: Sequence[Tensor], constants: Constants) -> Any:
        """What the body makes, cut off from derivatives."""
        seen = peek_interpreter_stack() is not None or _len_torch_dispatch_stack()  # by transforms and tracers
        alike = all(x.dtype == self.literals.dtype and x.is_cpu for x in values)
        if seen or not alike or tuple(tuple(x.shape) for x in values) != self.shapes:
            return self.plain.numbers(values, constants[:-1])
        return super().numbers(values, constants)

    def native(self) -> Callable[..., Any]:
        """The step without tapes as machine code of torch's compiler."""
        native = self.plain.native()
        return lambda *inputs: native(*inputs[:-1])


class Part:
    """A part of a tape, ready for the kernel.

    Args:
        rows: its instructions.
        places: of all gathered numbers.
        size: numbers of the memory.
        sizes: numbers of each input.
        results: shape and first place of each result.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        places: NDArray[np.int32],
        size: int,
        sizes: Sequence[int],
        dtype: torch.dtype,
        results: Sequence[tuple[tuple[int, ...], int]],
    ) -> None:
        from symhmm.chains.tape_steps import NAMES, replay

        codes = {name: i for i, name in enumerate(NAMES)}
        self.code = np.array([(codes[name], *rest) for name, *rest in rows], dtype=np.int32)
        self.head = len(rows), self.code.ctypes.data, places.ctypes.data
        self.places, self.size, self.dtype, self.like, self.replay = places, size, dtype, LIKE[dtype], replay
        self.inputs = [(n, dtype) for n in sizes]
        self.results = [(shape, _strides(shape), place) for shape, place in results]


def play(part: Part, memory: Tensor | None, *inputs: Tensor) -> tuple[Tensor, ...]:
    """The memory, a new one where none is given, and the results, which lie in it; ``inputs`` are copied into it."""
    if memory is None:
        memory = torch.empty(part.size, dtype=part.dtype, device="cpu")  # whatever the default device is
    held = [x.contiguous() for x in inputs]
    assert [(x.numel(), x.dtype) for x in held] == part.inputs
    addresses = np.array([x.data_ptr() for x in held], dtype=np.int64)
    part.replay(*part.head, addresses, memory.data_ptr(), part.like)
    return memory, *[memory.as_strided(*result) for result in part.results]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))


def quick(step: Step, values: int) -> Step:
    """`taped`; where no other kernel runs, only what makes up for importing numba."""
    operators = torch.ops.symhmm
    own = {*DIRECT.values(), operators.squared.default, operators.squared_backward.default}
    return taped(step, values, FEWEST if any(n.target in own for n in step.body.graph.nodes) else MANY)


def taped(step: Step, values: int, fewest: int = FEWEST) -> Step:
    """The same step with its small operations on tapes, if it runs on CPU and has enough of them.

    Args:
        values: number of the body's first inputs, which change from call to call.
        fewest: operations that a part must save; others are left to torch.
    """
    nodes, constants = list(step.body.graph.nodes), next(iter(reversed(step.prologue.graph.nodes))).args[0]
    assert isinstance(constants, tuple)
    devices = {n.meta["device"].type for n in (*nodes, *constants) if "device" in n.meta}
    dtypes = list({n.meta["val"].dtype for n in nodes[:values]})
    asks = any("as_strided" in str(n.target) for n in nodes)  # where numbers lie: on a tape they lie elsewhere
    if len(nodes) < fewest or devices != {"cpu"} or len(dtypes) != 1 or dtypes[0] not in LIKE or asks:
        return step
    like = dict(zip(nodes[values:], (n.meta.get("val") for n in constants), strict=False))
    refused: set[fx.Node] = set()
    most = MOST
    for _ in range(TRIES):
        draft = _drafted(nodes, values, like, dtypes[0], most, refused)
        few = {part for part, count in draft.saved().items() if count < fewest}
        if draft.tape.size > LARGEST:
            most //= 2
        elif few:
            refused |= {n for n in draft.made if draft.level[n] in few}
        else:
            return draft.step(step) if draft.made else step
    return step


@dataclass
class _Draft:
    """What tapes would hold of a step.

    Args:
        dtype: of all its numbers.
        most: numbers of a tensor.
        inputs: placeholders of the body, of which the first ``values`` change from call to call.
        first: numbers that are in the memory from the start.
        packed: those of them that are laid into the memory from the start, in order, behind the literals; which constants.
        env: places of the numbers of all tensors that the tape makes or reads.
        made: nodes that it makes.
        read: nodes that it reads from outside, with the first part that does.
        level: the part of a node that the tape makes; of others the first part that may read them.
    """

    tape: Tape
    dtype: torch.dtype
    most: int
    inputs: list[fx.Node]
    values: int
    first: int
    packed: dict[fx.Node, int]
    env: dict[fx.Node, Any]
    made: set[fx.Node]
    read: dict[fx.Node, int]
    level: dict[fx.Node, int]

    def saved(self) -> dict[int, int]:
        """Operations that each part saves, less what goes in and out."""
        out = dict.fromkeys({self.level[n] for n in self.made}, 0)
        for n in self.made:
            out[self.level[n]] += (n.target is not operator.getitem) - self.is_result(n)
        for part in self.read.values():
            out[part] = out.get(part, 0) - 1
        return out

    def is_result(self, n: fx.Node) -> bool:
        """Whether somebody else wants to see what the tape makes."""
        return any(user not in self.made for user in n.users)

    def place(self, n: fx.Node, refused: bool) -> None:
        """Write a node on the tape, or find out after which part it may run."""
        inputs = n.all_input_nodes
        part = max((self.level[x] for x in inputs), default=0)
        several = isinstance(n.meta.get("val"), tuple)
        known = bool(inputs) and all(x in self.env or self.is_small(x) for x in inputs)
        if known and not refused and (several or self.is_small(n, torch.bool)):
            for x in inputs:
                if x not in self.env:
                    self.env[x] = self.tape.new(x.meta["val"].numel()).reshape(x.meta["val"].shape)
            self.tape.part = part
            found = written(self.tape, n, self.env)
            if found is not None:
                self.env[n], self.level[n] = found, part
                self.made.add(n)
                for x in inputs:
                    if x not in self.made and x not in self.packed:
                        self.read[x] = min(part, self.read.get(x, part))
                return
        self.level[n] = max((self.level[x] + (x in self.made) for x in inputs), default=0)

    def is_small(self, n: fx.Node, *others: torch.dtype) -> bool:
        """Whether a tensor of numbers, or of one of some other types, may lie in the memory."""
        return _is_small(n.meta.get("val"), self.most, self.dtype, *others)

    def step(self, step: Step) -> Step:
        """The step with parts of a tape in place of the nodes that the tape makes."""
        tape, root, graph = self.tape, torch.nn.Module(), fx.Graph()
        calls = [n for n in step.body.graph.nodes if n.op == "call_function"]
        (out,) = (n for n in step.body.graph.nodes if n.op == "output")
        # Step 1: what others want to see of each part, and what it reads.
        results: dict[int, list[tuple[fx.Node, int]]] = {}
        for n in calls:
            if n in self.made and self.is_result(n):
                tape.part = self.level[n]
                results.setdefault(tape.part, []).append((n, tape.start(self.env[n])))
        reads: dict[int, list[fx.Node]] = {}
        for n, part in self.read.items():
            reads.setdefault(part, []).append(n)
        # Step 2: parts take turns with what is left.
        env = {n: graph.node_copy(n) for n in self.inputs}
        packed, memory = graph.placeholder("packed"), None
        places = np.concatenate([*tape.places, np.zeros(1, dtype=np.int32)])
        parts = tape.rows.keys() | reads.keys()
        others: dict[int, list[fx.Node]] = {}
        for n in calls:
            if n not in self.made:
                others.setdefault(self.level[n], []).append(n)
        for level in range(max(self.level.values()) + 1):
            for n in others.get(level, []):
                env[n] = graph.node_copy(n, env.__getitem__)
            if level not in parts:
                continue
            given = reads.get(level, [])
            rows: list[Row] = [
                ("input", int(self.env[n].reshape(-1)[0]), self.env[n].numel(), 1, i, 0, 0) for i, n in enumerate(given)
            ]
            inputs = [env[n] for n in given]
            if memory is None:
                rows.append(("input", 0, self.first, 1, len(rows), 0, 0))
                inputs.append(packed)
            wanted = results.get(level, [])
            made = Part(
                [*rows, *tape.rows.get(level, [])], places, tape.size, [row[2] for row in rows], self.dtype,
                [(tuple(n.meta["val"].shape), place) for n, place in wanted],
            )  # fmt: skip
            setattr(root, f"tape_{level}", made)
            played = graph.call_function(play, (graph.get_attr(f"tape_{level}"), memory, *inputs))
            memory = graph.call_function(operator.getitem, (played, 0))
            for i, (n, _) in enumerate(wanted):
                env[n] = graph.call_function(operator.getitem, (played, i + 1))
                if n.meta["val"].dtype == torch.bool:
                    env[n] = graph.call_function(torch.ne, (env[n], 0))
        graph.output(fx.map_arg(out.args[0], env.__getitem__))
        # Step 3: what is in the memory from the start.
        literals = torch.zeros(self.first - sum(self.env[n].numel() for n in self.packed), dtype=self.dtype)
        literals[: len(tape.constants)] = torch.tensor(tape.constants, dtype=self.dtype)
        shapes = tuple(tuple(n.meta["val"].shape) for n in self.inputs[: self.values])
        return TapedStep(
            step.prologue, fx.GraphModule(root, graph), step, literals, tuple(self.packed.values()), shapes
        )


def _is_small(x: Any, most: int, *dtypes: torch.dtype) -> bool:
    return isinstance(x, Tensor) and 0 < x.numel() <= most and x.dtype in dtypes


def _drafted(
    nodes: Sequence[fx.Node],
    values: int,
    like: dict[fx.Node, Any],
    dtype: torch.dtype,
    most: int,
    refused: set[fx.Node],
) -> _Draft:
    """A draft of nodes that are not refused; ``like`` holds the constants' shapes."""
    inputs = [n for n in nodes if n.op == "placeholder"]
    # Numbers without dimensions take the type of what they meet.
    packed = {
        n: i
        for i, (n, x) in enumerate(like.items())
        if _is_small(x, most, dtype, torch.bool) or (_is_small(x, 1, *LIKE) and not x.dim())
    }
    tape = Tape(size=LITERALS + sum(isinstance(x, int | float) for n in nodes for x in n.args))
    env: dict[fx.Node, Any] = {n: tape.new(like[n].numel()).reshape(like[n].shape) for n in packed}
    draft = _Draft(tape, dtype, most, inputs, values, tape.size, packed, env, set(), {}, dict.fromkeys(inputs, 0))
    for n in nodes:
        if n.op == "call_function":
            draft.place(n, n in refused)
    return draft
