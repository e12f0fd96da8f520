"""Trace once: a Python function of tensors becomes an ATen graph without Pyro, funsor, dead nodes or repeated work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.passes.tools_common import legalize_graph

from symhmm.chains.registered import DIRECT
from symhmm.compiler.fused import fused
from symhmm.compiler.laws import simplified
from symhmm.compiler.linear import combined
from symhmm.errors import ProgramError
from symhmm.memory import release_freed_memory
from symhmm.recorder import record

Constants = tuple[Tensor, ...]

# Functions of torch that take the arguments of the operator of the same name, in half the time.
_DIRECT = {
    "abs", "add", "addcmul", "amax", "bitwise_and", "bitwise_not", "cat", "clamp", "constant_pad_nd", "cos", "cumprod",
    "cumsum", "digamma", "div", "eq", "erf", "exp", "expm1", "flip", "gather", "ge", "gt", "le", "lgamma", "log",
    "log1p", "logical_and", "logical_not", "logical_or", "logsumexp", "lt", "masked_fill", "mm", "mul", "ne", "neg",
    "ones_like", "permute", "pow", "reciprocal", "relu", "reshape", "rsub", "select", "sigmoid", "sin",
    "split_with_sizes", "sqrt", "square", "stack", "sub", "sum", "tanh", "where", "xlogy", "zeros_like",
}  # fmt: skip
_PLAIN = {"default", "Tensor", "Scalar", "Tensor_Scalar", "Tensor_Tensor", "self", "int", "dim_IntList"}


@dataclass(frozen=True)
class Step:
    """A traced function ``f(*values, *data)``, cut in two.

    ``prologue(*data)`` computes everything that depends on data alone, once for each data set; ``body(*values, *constants)``
    is what runs at each step.
    """

    prologue: fx.GraphModule
    body: fx.GraphModule

    def constants(self, data: Sequence[Tensor]) -> Constants:
        """What the body needs of the data."""
        with torch.no_grad():
            return tuple(self.prologue(*data))

    def numbers(self, values: Sequence[Tensor], constants: Constants) -> Any:
        """What the body makes, cut off from derivatives."""
        with torch.inference_mode():
            out = self.body.forward(*values, *constants)
        # Only as copies may they take part in derivatives again.
        return out.clone() if isinstance(out, Tensor) else tuple(x.clone() for x in out)

    def native(self) -> Callable[..., Any]:
        """The body as machine code of torch's compiler, made at its first call, for inputs of the shapes of that call."""
        operators = {direct: operator for operator, direct in DIRECT.items()}
        graph = fx.Graph()
        graph.output(graph.graph_copy(self.body.graph, {}))
        for n in graph.nodes:
            if n.op == "call_function":  # operators, which the compiler knows, in place of what asks who listens
                n.target = operators.get(n.target, n.target)
        return torch.compile(fx.GraphModule(self.body, graph), fullgraph=True, dynamic=False)

    @property
    def nodes(self) -> int:
        """Operations per replay."""
        return sum(n.op == "call_function" for n in self.body.graph.nodes)

    def __repr__(self) -> str:
        folded = sum(n.op == "call_function" for n in self.prologue.graph.nodes)
        return f"Step({self.nodes} operations a step, {folded} once for each data set)"


def trace(
    f: Callable[..., Tensor | Sequence[Tensor]],
    values: Sequence[Tensor],
    data: Sequence[Tensor],
    *,
    gradients: bool = False,
) -> Step:
    """Record ``f(*values, *data)`` as ATen operations and prune them.

    Args:
        f: its control flow may depend on shapes and constants only; capture refuses the rest.
        gradients: ``f`` already contains its gradient, so that detach nodes have no meaning left.

    Raises:
        ProgramError: the function draws random numbers, so that replaying it would repeat them.
    """

    single = False

    def flat(values: list[Tensor], data: list[Tensor]) -> list[Tensor]:
        nonlocal single
        out = f(*values, *data)
        single = isinstance(out, Tensor)
        return [out] if isinstance(out, Tensor) else list(out)

    module = record(flat, values, data)
    if not _without_mutation(module):
        traced = module
        module = record(torch.func.functionalize(lambda v, d: traced(*v, *d), remove="mutations"), values, data)
    if gradients:
        _without_autograd(module)
    _remove_dead(module)
    _refuse_randomness(module)
    for transformed in (simplified, combined):
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        module = fx.GraphModule(module, transformed(module.graph, module, placeholders[: len(values)]))
    if gradients:
        fused(module.graph)
    release_freed_memory()  # what the recorded run has made
    return _split(module, len(values), single)


def _split(module: fx.GraphModule, n_values: int, single: bool) -> Step:
    """Cut a graph whose first ``n_values`` placeholders vary from what depends on the other placeholders alone."""
    nodes = list(module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    varying = set(placeholders[:n_values])
    for n in nodes:
        if n.op == "output" or any(a in varying for a in n.all_input_nodes):
            varying.add(n)
    fixed = [n for n in nodes if n not in varying]
    border = [n for n in fixed if any(u in varying for u in n.users)]

    env: dict[fx.Node, fx.Node] = {}
    prologue = fx.Graph()
    for n in fixed:
        env[n] = prologue.node_copy(n, env.__getitem__)
    prologue.output(tuple(env[n] for n in border))

    env = {}
    body = fx.Graph()
    for n in placeholders[:n_values]:
        env[n] = body.node_copy(n)
    for i, n in enumerate(border):
        env[n] = body.placeholder(f"constant_{i}")
    for n in nodes:
        if n.op == "output":
            results = [env[x] for x in n.all_input_nodes] if single else [env[x] for x in n.args[0]]
            body.output(results[0] if single else tuple(results))
        elif n in varying and n.op != "placeholder":
            env[n] = body.node_copy(n, env.__getitem__)
    for n in body.nodes:
        n.target = _direct(n.target)
    return Step(_module(module, prologue), _module(module, body))


def _direct(target: Any) -> Any:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        name = target.overloadpacket.__name__
        return getattr(torch, name) if name in _DIRECT and target._overloadname in _PLAIN else target
    return DIRECT.get(target, target)


def _module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    out = fx.GraphModule(root, graph)
    return legalize_graph(out)


def _without_autograd(module: fx.GraphModule) -> None:
    """Rewrites that are true of numbers but not of their derivatives, for a graph that nobody differentiates again."""
    aten = torch.ops.aten
    for n in list(module.graph.nodes):
        if n.target is aten.detach.default:
            n.replace_all_uses_with(n.args[0])
            module.graph.erase_node(n)
        elif n.target is aten.xlogy.Tensor:
            # x log(y) with the logarithm apart: of data it is taken once, of a parameter before it meets the data.
            x, y = n.args
            with module.graph.inserting_before(n):
                log = module.graph.call_function(aten.log.default, (y,))
                product = module.graph.call_function(aten.mul.Tensor, (x, log))
                nothing = module.graph.call_function(aten.eq.Scalar, (x, 0))
                value = module.graph.call_function(aten.masked_fill.Scalar, (product, nothing, 0))
            n.replace_all_uses_with(value)
            module.graph.erase_node(n)


def _without_mutation(module: fx.GraphModule) -> bool:
    """Replace in-place operations on fresh, unaliased tensors by their functional twins; False if others remain.

    Distributions of torch write in place into tensors they have just made; for these the rewrite is exact and saves a
    second trace. Anything with views is left to ``functionalize``.
    """
    nodes = list(module.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    for n in nodes:
        if not (isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable):
            continue
        owner = n.args[0]
        twin = _functional_twin(n.target)
        if twin is None or not isinstance(owner, fx.Node) or not _is_fresh(owner):
            return False
        n.target = twin
        for user in list(owner.users):
            if place[user] > place[n]:
                user.replace_input_with(owner, n)
    return True


def _functional_twin(target: torch._ops.OpOverload) -> torch._ops.OpOverload | None:
    name = target._schema.name.split("::")[1]
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _is_fresh(n: fx.Node) -> bool:
    """Whether a node makes a tensor of its own that nothing else is a view of."""
    if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload) or _aliases(n):
        return False
    return not any(_aliases(user) for user in n.users)


def _aliases(n: fx.Node) -> bool:
    """Whether a node's result shares memory with an argument that it does not write."""
    if not isinstance(n.target, torch._ops.OpOverload):
        return False
    return not n.target._schema.is_mutable and any(r.alias_info is not None for r in n.target._schema.returns)


def _remove_dead(module: fx.GraphModule) -> None:
    # Nothing writes in place any more, so only inputs and outputs are there for their effect; a draw nobody reads is not.
    module.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def _refuse_randomness(module: fx.GraphModule) -> None:
    for n in module.graph.nodes:
        if isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags:
            raise ProgramError(
                f"the program draws random numbers ({n.target}) outside of pyro.sample.",
                suggestion="pass them as an argument, or put networks with dropout into eval() mode",
            )
