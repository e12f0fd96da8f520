"""Trace once: a Python function of tensors becomes an ATen graph without Pyro, funsor, dead nodes or repeated work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass, get_CSE_banned_ops
from torch.fx.passes.tools_common import legalize_graph

from symhmm.errors import ProgramError

Constants = tuple[Tensor, ...]


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

    @property
    def nodes(self) -> int:
        """Operations per replay."""
        return sum(n.op == "call_function" for n in self.body.graph.nodes)

    def __repr__(self) -> str:
        folded = sum(n.op == "call_function" for n in self.prologue.graph.nodes)
        return f"Step({self.nodes} operations a step, {folded} once for each data set)"


def trace(f: Callable[..., Tensor | Sequence[Tensor]], values: Sequence[Tensor], data: Sequence[Tensor], *, gradients: bool = False) -> Step:
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

    module = make_fx(flat)(list(values), list(data))
    if any(_mutates(n) for n in module.graph.nodes):
        module = make_fx(torch.func.functionalize(lambda v, d: module(v, d), remove="mutations"))(list(values), list(data))
    _refuse_randomness(module)
    if gradients:
        for n in list(module.graph.nodes):
            if n.target is torch.ops.aten.detach.default:
                n.replace_all_uses_with(n.args[0])
                module.graph.erase_node(n)
    module.graph.eliminate_dead_code()
    module = CSEPass(banned_ops=get_CSE_banned_ops())(module).graph_module
    module.graph.eliminate_dead_code()
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

    prologue, env = fx.Graph(), {}
    for n in fixed:
        env[n] = prologue.node_copy(n, env.__getitem__)
    prologue.output(tuple(env[n] for n in border))

    body, env = fx.Graph(), {}
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
    return Step(_module(module, prologue), _module(module, body))


def _module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    out = fx.GraphModule(root, graph)
    return legalize_graph(out)


def _mutates(n: fx.Node) -> bool:
    return isinstance(n.target, torch._ops.OpOverload) and n.target._schema.is_mutable


def _refuse_randomness(module: fx.GraphModule) -> None:
    for n in module.graph.nodes:
        if isinstance(n.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in n.target.tags:
            raise ProgramError(
                f"the program draws random numbers ({n.target}) outside of pyro.sample.",
                suggestion="pass them as an argument, or put networks with dropout into eval() mode",
            )
