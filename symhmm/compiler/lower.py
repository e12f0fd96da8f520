"""Lower: run a plan over a semiring, from named funsor terms to one tensor."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.chains.operator import chain_evidence, chain_message, staged_message
from symhmm.compiler.plan import ChainContract, Contract, Plan, PlateProduct
from symhmm.compiler.steps import Operand, Step
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.semiring import LOG, Semiring


def lower(graph: FactorGraph, plan: Plan, semiring: Semiring = LOG) -> Tensor:
    """Contract ``graph`` by the steps of ``plan``.

    Every operand is a named tensor, so one function serves all sizes: names decide what is aligned, multiplied (added, in
    log space) and summed; positions appear only on the way into the chain operator.

    Args:
        graph: terms in nats.
        plan: made from this graph or from one with the same names and sizes.
        semiring: `LOG` for the log-density, `MAX` for the log-density of the most probable states.

    Returns:
        nats, shape () or the sizes of the kept plates in alphabetical order.

    Raises:
        GraphError: the terms' names or sizes are not those of the plan.
    """
    terms: dict[int, Named] = {}
    if len(graph.factors) != len(plan.operands):
        raise GraphError(f"the plan is for {len(plan.operands)} factors, the graph has {len(graph.factors)}.")
    for operand, factor in zip(plan.operands, graph.factors, strict=True):
        if operand.inputs != factor.inputs:
            raise GraphError(
                f"factor {factor.name!r} does not fit the plan.",
                details=[f"seen {factor.inputs}, wanted {dict(operand.inputs)}"],
                suggestion="plan(graph) again",
            )
        terms[operand.index] = Named.from_funsor(factor.term, factor.name)
    for step in _joined(plan):
        parts = [terms.pop(i) for i in step.operands]
        match step:
            case Contract():
                terms[step.result.index] = _contract(parts, step, semiring)
            case PlateProduct():
                terms[step.result.index] = _plate_product(parts[0], step)
            case ChainContract():
                terms[step.result.index] = _chain(dict(zip(step.operands, parts, strict=True)), step, semiring)
            case WholeChain():
                terms[step.result.index] = _whole_chain(dict(zip(step.operands, parts, strict=True)), step, semiring)
    kept = sorted(plan.keep)
    total = [terms[i].aligned(kept) * scale for i, scale in plan.outputs]
    shape = [graph.plates[p].size for p in kept]
    return torch.broadcast_to(sum(total), shape) if total else torch.zeros(shape)  # type: ignore[arg-type]


@dataclass(frozen=True)
class WholeChain:
    """A chain together with all ``first`` terms of its initial variables, which are summed out, too."""

    operands: tuple[int, ...]
    chain: ChainContract
    first: tuple[int, ...]
    result: Operand


def _joined(plan: Plan) -> Iterator[Step | WholeChain]:
    """The steps of a plan, where one operator takes care of a chain and of its initial variables if it can.

    It can where these are summed out at once, and what else depends on them depends on nothing that the chain does not.
    """
    inputs = {o.index: o.inputs for o in (*plan.operands, *(s.result for s in plan.steps))}
    whole: dict[int, list[WholeChain]] = {}
    for step in plan.steps:
        for other in plan.steps:
            if not isinstance(step, ChainContract) or step.stages or not isinstance(other, Contract):
                continue
            initial = {n for names in step.initial for n in names}
            if step.result.index not in other.operands or not initial <= set(other.variables):
                continue
            first = tuple(i for i in other.operands if i != step.result.index and initial & set(inputs[i]))
            if first and all(set(inputs[i]) <= initial | set(step.batch) for i in first):
                result = replace(step.result, inputs={n: step.result.inputs[n] for n in step.batch})
                joined = WholeChain((*step.operands, *first), step, first, result)
                whole.setdefault(other.result.index, []).append(joined)
    inside = {w.chain.result.index for found in whole.values() for w in found}
    for step in plan.steps:
        if step.result.index in inside:
            continue
        for joined in whole.get(step.result.index, ()):
            assert isinstance(step, Contract)
            yield joined
            initial = {n for names in joined.chain.initial for n in names}
            step = replace(
                step,
                operands=tuple(i for i in step.operands if i not in joined.first),
                variables=tuple(n for n in step.variables if n not in initial),
            )
        yield step


class Named:
    """A tensor whose dimensions are ``names``; just enough of a funsor to be cheap under a tracer."""

    __slots__ = ("data", "names")

    def __init__(self, data: Tensor, names: Sequence[str]) -> None:
        self.data, self.names = data, tuple(names)

    @classmethod
    def from_funsor(cls, term: object, name: str) -> "Named":
        if not isinstance(term, Term):
            raise GraphError(
                f"factor {name!r} is not a tensor but {type(term).__name__}.",
                suggestion="substitute its real-valued inputs first: term(mu=...)",
            )
        return cls(term.data, tuple(term.inputs))

    def aligned(self, names: Sequence[str]) -> Tensor:
        """The data with dimensions in the order of ``names``, size 1 where it has none."""
        order = [self.names.index(n) for n in names if n in self.names]
        data = self.data if order == sorted(order) else self.data.permute(order)
        return data.reshape([self.data.shape[self.names.index(n)] if n in self.names else 1 for n in names])


def _product(parts: Iterable[Named], names: Sequence[str]) -> Tensor:
    # Smallest first: what is shared is added up before it meets the large terms.
    aligned = sorted((p.aligned(names) for p in parts), key=lambda x: x.numel())
    total = aligned[0]
    for x in aligned[1:]:
        total = total + x
    return total


def _contract(parts: list[Named], step: Contract, semiring: Semiring) -> Named:
    left = tuple(step.result.inputs)
    data = _product(parts, (*left, *step.variables))
    if step.variables:
        data = semiring.reduce(data.reshape([*data.shape[: len(left)], -1]), -1)
    return Named(data, left)


def _plate_product(part: Named, step: PlateProduct) -> Named:
    factor, dims = 1.0, []
    for name, size, scale in step.plates:
        factor *= scale
        if name in part.names:
            dims.append(part.names.index(name))
        else:
            factor *= size
    data = part.data.sum(dims) if dims else part.data
    return Named(data if factor == 1.0 else data * factor, [n for i, n in enumerate(part.names) if i not in dims])


def _chain(parts: dict[int, Named], step: ChainContract, semiring: Semiring) -> Named:
    if step.stages:
        factors, emission = stage_terms(parts, step)
        message = staged_message(
            factors, emission, step.length, step.stages, semiring, segments=step.strategy != "stages"
        )
    else:
        transition, emission = _chain_terms(parts, step)
        message = chain_message(
            transition, emission, length=step.length, history=step.history, semiring=semiring, strategy=step.strategy
        )
    names = [*step.batch, *(n for names in step.initial for n in names)]
    return Named(message.reshape([step.result.inputs[n] for n in names]), names)


def _whole_chain(parts: dict[int, Named], step: WholeChain, semiring: Semiring) -> Named:
    chain = step.chain
    names = [n for names in chain.initial for n in names]
    sizes = [chain.result.inputs[n] for n in names]
    first = _product([parts[i] for i in step.first], [*chain.batch, *names])
    lead = list(first.shape[: len(chain.batch)])
    transition, emission = _chain_terms(parts, chain)
    evidence = chain_evidence(
        first.expand([*lead, *sizes]).reshape([*lead, _volume(sizes)]), transition, emission,
        length=chain.length, history=chain.history, semiring=semiring, strategy=chain.strategy,
    )  # fmt: skip
    return Named(evidence, chain.batch)


def _chain_terms(parts: Mapping[int, Named], step: ChainContract) -> tuple[Tensor, Tensor | None]:
    """The transition (*batch, n or 1, S, K) of a chain, and its emission (*batch, n or 1, K)."""
    before = [n for names in step.previous for n in names]
    frame = [*step.batch, step.axis]
    states = [step.result.inputs[n] for n in step.initial[-1]]
    one_step, all_steps = _volume(states), _volume(states) ** step.history

    def flat(indices: tuple[int, ...], names: list[str], sizes: list[int], last: list[int]) -> Tensor:
        data = _product([parts[i] for i in indices], [*frame, *names])
        leading = list(data.shape[: len(frame)])
        return data.expand([*leading, *sizes]).reshape([*leading, *last])

    emission = flat(step.emission, list(step.current), states, [one_step]) if step.emission else None
    every = states * (step.history + 1)
    return flat(step.transition, [*before, *step.current], every, [all_steps, one_step]), emission


def stage_terms(parts: Mapping[int, Named], step: ChainContract) -> tuple[list[Tensor], Tensor | None]:
    """The factor of each stage of a chain (*batch, n or 1, entries), and its emission (*batch, n or 1, S)."""
    stages, groups = step.stages, step.groups
    assert stages is not None
    names = [*(n for before in step.previous for n in before), *step.current]
    frame = [*step.batch, step.axis]

    def flat(indices: tuple[int, ...], variables: Sequence[int]) -> Tensor:
        sizes = [stages.size(v) for v in variables]
        data = _product([parts[i] for i in indices], [*frame, *(names[v] for v in variables)])
        lead = list(data.shape[: len(frame)])
        return data.expand([*lead, *sizes]).reshape([*lead, _volume(sizes)])

    # A chain that neither its past nor another chain moves has no factor: its terms are among the emissions.
    like, lead = parts[step.transition[0]].data, [1 for _ in frame]
    factors = [
        flat(group, stage.factor) if group else like.new_zeros([*lead, entries])
        for stage, group, entries in zip(stages.stages, groups, stages.entries, strict=True)
    ]
    count = len(step.current)
    return factors, flat(step.emission, range(count, 2 * count)) if step.emission else None


def _volume(sizes: Iterable[int]) -> int:
    return int(torch.Size(sizes).numel())
