"""Chains whose value and gradient are one operation, in recorded steps whose gradient does not hang on the value."""

import operator

import torch
from torch import fx

from symhmm.chains.registered import chain_backward
from symhmm.chains.registered_evidence import chain_evidence, chain_evidence_gradient
from symhmm.compiler.builder import calls, shape_of

aten = torch.ops.aten
_VALUE, _GRADIENT = chain_evidence._opoverload, chain_backward._opoverload
_BOTH = chain_evidence_gradient._opoverload


def fused(graph: fx.Graph) -> None:
    """Put one operation in the place of a chain's value and its gradient, where weights can be had before the values.

    The gradient of what is made of the log-probabilities z of chains is that of sum_b w_b z_b. Where the weights w are
    numbers, as in a sum over individuals, both passes over one chain can be made before those over the next. Where they
    hang on z, as in a mixture over kinds of individuals, they cannot.
    """
    for n in list(graph.nodes):
        if calls(n, _VALUE):
            _fuse(graph, n)
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def _fuse(graph: fx.Graph, chain: fx.Node) -> None:
    """Do so for the chains of one operation, if it can be done."""
    results = {n.args[1]: n for n in chain.users}
    readers = {n for k in (2, 3, 4) if k in results for n in results[k].users}
    gradient = readers.pop() if len(readers) == 1 else None
    initial, *terms, length = chain.args
    kept = [results.get(k) for k in (2, 3, 4)]
    if gradient is None or not calls(gradient, _GRADIENT) or list(gradient.args[1:]) != [*terms, *kept, length]:
        return
    first = gradient.all_input_nodes[0]
    factors = _factors(first, results[1]) if 1 in results else None
    if factors is None or not all(_moved_before(factor, chain) for factor in factors):
        return
    with graph.inserting_before(chain):
        weights = [graph.call_function(aten.reshape.default, (x, list(shape_of(x)[:-1]))) for x in factors]
        weight = weights[0] if weights else None
        both = graph.call_function(_BOTH, (initial, *terms, weight, length))
        found = [graph.call_function(operator.getitem, (both, k)) for k in range(5)]
    replaced = {first: found[1], **{n: found[2:][n.args[1]] for n in gradient.users}}  # type: ignore[index]
    if 0 in results:
        replaced[results[0]] = found[0]
    for old, new in replaced.items():
        new.meta = old.meta
        old.replace_all_uses_with(new)


def _factors(first: fx.Node, given: fx.Node) -> list[fx.Node] | None:
    """By what of shape (.., 1) the probabilities of initial states have been multiplied: once or not at all, else None."""
    if first is given:
        return []
    if not calls(first, aten.mul.Tensor) or len(given.users) > 1:
        return None
    factors = [x for x in first.args if isinstance(x, fx.Node) and x is not given]
    shapes = [shape_of(x) for x in factors]
    fits = len(factors) == 1 and len(shapes[0]) == len(shape_of(first)) and shapes[0][-1] == 1
    return factors if fits and given in first.args else None


def _moved_before(factor: fx.Node, chain: fx.Node) -> bool:
    """Have a factor made before a chain, with all that it is made of; false if it hangs on the chain."""
    hanging, others, n = {chain}, list[fx.Node](), chain.next
    while n is not factor.next and n.op != "output":
        if any(x in hanging for x in n.all_input_nodes):
            hanging.add(n)
        else:
            others.append(n)
        n = n.next
    if factor in hanging:
        return False
    for n in others:
        chain.prepend(n)
    return True
