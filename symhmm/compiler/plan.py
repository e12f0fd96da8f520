"""Plan: decide from names and sizes alone in which order a factor graph is contracted."""

from collections.abc import Callable, Iterable, Mapping
from math import prod
from typing import TypeVar

from symhmm.chains.stage_tables import FEWEST
from symhmm.chains.stages import Stages, arranged
from symhmm.compiler.order import pairwise_order
from symhmm.compiler.steps import ChainContract, Contract, Operand, Plan, PlateProduct, Step, eliminated, in_bytes
from symhmm.errors import GraphError, IntractableError
from symhmm.graph import Chain, FactorGraph

MEMORY_LIMIT = 8 * 2**30
T = TypeVar("T")

STRATEGIES = ("auto", "kernel", "stages", "segments", "sequential", "scan")
# Products of one dense matrix that take as long as one product of chains that move one at a time, by strategy; and for the kernel
# where there is one row, whose matrix is that of all steps (docs/performance.md).
STAGED, STAGED_ALONE = {"kernel": 3.5, "segments": 2.5}, 14.0
KEPT = 2**30  # bytes of messages above which a chain makes them again in its gradient, instead of keeping all


def plan(
    graph: FactorGraph,
    *,
    keep: Iterable[str] = (),
    strategy: str = "auto",
    memory_limit: float = MEMORY_LIMIT,
) -> Plan:
    """Decide how to contract ``graph``: tensor variable elimination with chains.

    Works from the leaves of the plate nesting inwards (Obermeyer et al. 2019, "Tensor Variable Elimination for Plated
    Factor Graphs", algorithm 1). A time axis is a plate for terms that do not link its steps, and one chain operator for
    those that do. Only names, sizes and frames are read, never a tensor.

    Args:
        keep: plates that stay in the result (one term per member); empty for the total.
        strategy: how chains are contracted: ``auto``, ``kernel``, ``segments``, ``sequential`` or ``scan``, see
            `symhmm.chains.operator.chain_message`; ``stages`` sums out chains that move together one after the other.
        memory_limit: bytes that the largest step may take.

    Raises:
        IntractableError: variables of a plate are coupled across its members, or a step is over the memory limit.
        GraphError: unknown strategy or plate.
    """
    if strategy not in STRATEGIES:
        raise GraphError(f"unknown chain strategy {strategy!r}.", suggestion=f"one of {', '.join(STRATEGIES)}")
    unknown = sorted(set(keep) - set(graph.plates) - set(graph.chains))
    if unknown:
        raise GraphError(f"there is no plate {unknown[0]!r}.", details=[f"plates: {', '.join(graph.plates) or 'none'}"])
    return _Planner(graph, frozenset(keep), strategy, memory_limit).run()


class _Planner:
    """Mutable state of one planning run."""

    def __init__(self, graph: FactorGraph, keep: frozenset[str], strategy: str, memory_limit: float) -> None:
        self.graph, self.keep, self.strategy, self.memory_limit = graph, keep, strategy, memory_limit
        self.sizes = {**{n: p.size for n, p in graph.plates.items()}, **{n: c.length for n, c in graph.chains.items()}}
        self.home = {n: frozenset(v.frames) for n, v in graph.variables.items()}
        self.sizes |= {n: v.size for n, v in graph.variables.items()}
        self.operands = [Operand(i, f.inputs, frozenset(f.frames), (f.name,)) for i, f in enumerate(graph.factors)]
        self.steps: list[Step] = []
        self.alias = _same_chain(graph)
        self.scales = _component_scales(graph, self.alias)

    def run(self) -> Plan:
        first = tuple(self.operands)
        live = list(first)
        while True:
            open_frames = {o.frames for o in live if o.frames - self.keep or self._variables(o)}
            if not open_frames:
                break
            # A leaf: no other term stands in all of its frames and more.
            leaf = max(
                (f for f in open_frames if not any(f < g for g in open_frames)), key=lambda f: (len(f), sorted(f))
            )
            here = [o for o in live if o.frames == leaf]
            live = [o for o in live if o.frames != leaf] + self._reduce_leaf(leaf, here)
        outputs = tuple((o.index, self.scales[o.sites[0]]) for o in live if self.keep <= o.frames)
        return Plan(first, tuple(self.steps), outputs, self.keep, self.strategy)

    def _reduce_leaf(self, leaf: frozenset[str], here: list[Operand]) -> list[Operand]:
        chained = self._linked(here)
        local = {v for o in here for v in self._variables(o) if self.home[v] == leaf} - chained
        for group in _components(here, local):
            if any(local & set(o.inputs) for o in group):
                here = [o for o in here if o not in group] + self._contract(group, local)
        out: list[Operand] = []
        own_links = {v for v in chained if self.home[v] == leaf}
        for group in _components(here, own_links, self.alias):
            linked = own_links & {v for o in group for v in o.inputs}
            if linked:
                out.append(self._chain(leaf, group, linked))
                continue
            for o in group:
                out += self._leave_plates(leaf, o)
        return out

    def _contract(self, group: list[Operand], local: set[str]) -> list[Operand]:
        order = pairwise_order([o.inputs for o in group], local)
        # A pair that sums nothing out is only a product: its operands wait for the step that does.
        pool = [[o] for o in group]
        for positions in order:
            parts = [o for p in positions for o in pool[p]]
            pool = [waiting for p, waiting in enumerate(pool) if p not in positions]
            inputs = {k: n for o in parts for k, n in o.inputs.items()}
            elsewhere = {k for waiting in pool for o in waiting for k in o.inputs}
            sums = tuple(k for k in inputs if k in local and k not in elsewhere)
            pool.append([self._multiplied(parts, inputs, sums)] if sums else parts)
        return [o for waiting in pool for o in waiting]

    def _multiplied(self, parts: list[Operand], inputs: Mapping[str, int], sums: tuple[str, ...]) -> Operand:
        elements = prod(inputs.values())
        result = self._new({k: n for k, n in inputs.items() if k not in sums}, parts, parts[0].frames)
        self._push(Contract(_ids(parts), sums, result, elements * len(parts), elements))
        return result

    def _leave_plates(self, leaf: frozenset[str], o: Operand) -> list[Operand]:
        variables = self._variables(o)
        stay = frozenset().union(*(self.home[v] for v in variables)) | (leaf & self.keep)
        if stay == leaf:
            if variables:
                raise self._coupled(leaf, o, variables)
            return [o]
        leave = [p for p in leaf if p not in stay]
        plates = tuple((p, self.sizes[p], self._scale(p)) for p in sorted(leave))
        result = self._new({k: n for k, n in o.inputs.items() if k not in leave}, [o], leaf & stay)
        self._push(PlateProduct((o.index,), plates, result, o.size, result.size))
        return [result]

    def _chain(self, leaf: frozenset[str], group: list[Operand], linked: set[str]) -> Operand:
        chain = self._axis_of(linked, leaf)
        members = [c for c in chain.variables if ({c.current, *c.previous}) & {v for o in group for v in o.inputs}]
        inside = {n for c in members for n in (*c.previous, c.current)}
        for c in members:
            if self.home[c.current] != leaf:
                raise self._coupled(leaf, group[0], {c.current, *linked})
        lag = max(
            len(c.previous) - c.previous.index(n) for o in group for n in o.inputs for c in members if n in c.previous
        )
        current = tuple(c.current for c in members)
        previous = tuple(tuple(c.previous[-k] for c in members) for k in range(lag, 0, -1))
        initial = tuple(tuple(c.initial[-k] for c in members) for k in range(lag, 0, -1))
        before = {n for names in previous for n in names}
        transition = [o for o in group if before & set(o.inputs)]
        emission = [o for o in group if o not in transition]
        outside = {k: n for o in group for k, n in o.inputs.items() if k not in inside and k != chain.axis}
        batch = tuple(sorted(outside))
        states = prod(self.sizes[n] for n in current)
        rows = prod(outside.values())
        inputs = {**outside, **{n: self.sizes[c.current] for c in members for n in c.initial[-lag:]}}
        result = self._new(inputs, group, leaf - {chain.axis})
        varying = any(chain.axis in o.inputs for o in transition)
        own_rows = prod(outside[k] for k in {k for o in transition for k in o.inputs if k in outside})
        # Stored between the value and the gradient: messages per row, step and state, and the transition factor itself.
        wanted = "auto" if self.strategy == "stages" else self.strategy
        strategy, why, kept = choose_strategy(wanted, rows, chain.length, states, lag)
        cost = states ** (lag + 1)
        stages: Stages | None = None
        groups: tuple[tuple[int, ...], ...] = ()
        if lag == 1 and len(current) > 1 and self.strategy in ("auto", "stages"):
            numbers = {n: i for i, n in enumerate((*previous[0], *current))}
            sizes = [self.sizes[n] for n in current]
            stages, groups = arranged(sizes, [[numbers[k] for k in o.inputs if k in numbers] for o in transition])
            alone = rows == 1 and not varying and strategy == "kernel"
            if self.strategy == "auto" and stages.cost * (STAGED_ALONE if alone else STAGED[strategy]) > cost:
                stages, groups = None, ()
            else:
                again = "; messages made twice" if strategy == "segments" else ""
                cost, strategy = stages.cost, "stages in segments" if strategy == "segments" else "stages"
                why = (
                    f"{rows} rows x {chain.length} steps x {len(sizes)} chains, {cost} products a step, not {states**2}"
                    f"{again}"
                )
        elements = kept + own_rows * (chain.length if varying else 1) * cost
        step = ChainContract(
            _ids(group), chain.axis, chain.length, lag, initial, previous, current, _ids(transition), _ids(emission),
            batch, strategy, result, rows * chain.length * cost, elements, why, stages,
            tuple(tuple(transition[k].index for k in g) for g in groups),
        )  # fmt: skip
        self._push(step)
        return result

    def _axis_of(self, linked: set[str], leaf: frozenset[str]) -> Chain:
        for axis in sorted(leaf & set(self.graph.chains)):
            chain = self.graph.chains[axis]
            if any(linked & {c.current, *c.previous} for c in chain.variables):
                return chain
        raise GraphError(f"variables {sorted(linked)} belong to no chain of the axes {sorted(leaf)}.")

    def _linked(self, here: list[Operand]) -> set[str]:
        """Names of chain variables that some term reads at an earlier step: these cannot be summed step by step."""
        read = {k for o in here for k in o.inputs}
        linked = set()
        for chain in self.graph.chains.values():
            for c in chain.variables:
                if read & set(c.previous):
                    linked |= {c.current, *c.previous}
        return linked

    def _variables(self, o: Operand) -> set[str]:
        return {k for k in o.inputs if k in self.home}

    def _scale(self, plate: str) -> float:
        return self.graph.plates[plate].scale if plate in self.graph.plates else 1.0

    def _new(self, inputs: Mapping[str, int], parts: list[Operand], frames: frozenset[str]) -> Operand:
        sites = tuple(dict.fromkeys(s for o in parts for s in o.sites))
        self.operands.append(Operand(len(self.operands), dict(inputs), frames, sites))
        return self.operands[-1]

    def _push(self, step: Step) -> None:
        if 8 * step.elements > self.memory_limit:
            names = ", ".join(repr(s) for s in step.result.sites[:6])
            raise IntractableError(
                f"summing out {eliminated(step)} needs {in_bytes(8 * step.elements)} at once [sites {names}].",
                details=[f"{step.elements:.3g} entries; the limit is {in_bytes(self.memory_limit)}"],
                suggestion="fewer states, fewer coupled chains, or a larger memory_limit= (bytes)",
            )
        self.steps.append(step)

    def _coupled(self, leaf: frozenset[str], o: Operand, variables: set[str]) -> IntractableError:
        # Each variable has one copy per member of its own plates; the cheapest one to enumerate jointly tells the cost.
        counts = {v: (self.sizes[v], prod(self.sizes[p] for p in self.home[v])) for v in sorted(variables)}
        inner = max(counts, key=lambda v: (len(self.home[v]), v))
        others = sorted(self.home[inner])
        plate = others[-1] if others else sorted(leaf)[0]
        states, copies = counts[inner]
        also = sorted(set(counts) - {inner})
        return IntractableError(
            f"cannot sum {inner!r} inside plate {plate!r} [site {self._site(inner)!r}].",
            details=[
                f"Factor [site {o.sites[0]!r}] stands in {_list(sorted(leaf))} and couples {inner!r} with {_list(also)}"
                if also else f"Factor [site {o.sites[0]!r}] couples {inner!r} across all {copies} members",
                f"{states}^{copies} joint states",
            ],
            suggestion=f"move {self._site(also[0]) if also else o.sites[0]!r} inside the plate {plate!r}, or give it a "
            "continuous distribution so that it is fitted instead of summed",
        )  # fmt: skip

    def _site(self, variable: str) -> str:
        return self.graph.variables[variable].site or variable


def choose_strategy(wanted: str, rows: int, length: int, states: int, history: int) -> tuple[str, str, int]:
    """The chain strategy for a size, the reason in words, and how many numbers it keeps for the gradient.

    On a CPU the kernel is the fastest at every size that was measured (docs/performance.md); what it needs to be told is
    when its messages outgrow the memory.

    >>> choose_strategy("auto", 20, 1800, 3, 1)
    ('kernel', '20 rows x 1800 steps x 3 states, history 1; about 0.26 ms', 108000)
    >>> choose_strategy("auto", 50, 1_000_000, 8, 1)[:2]
    ('segments', '50 rows x 1000000 steps x 8 states, history 1; about 2.3 s; 2.98 GiB of messages made twice')
    """
    size, kept = f"{rows} rows x {length} steps x {states} states, history {history}", rows * length * states**history
    if wanted not in ("auto", "segments"):
        why = (
            f"asked for; {size}"
            if wanted != "kernel"
            else f"asked for; {size}; about {_time(rows, length, states, history)}"
        )
        return wanted, why, kept
    if wanted == "segments" or 8 * kept > KEPT:
        asked = "asked for; " if wanted == "segments" else ""
        again = _time(rows, length, states, history, again=3.5)
        return "segments", f"{asked}{size}; about {again}; {in_bytes(8 * kept)} of messages made twice", KEPT // 8
    few = "; a list of the possible moves if they are few" if history == 1 and states >= FEWEST else ""
    return "kernel", f"{size}; about {_time(rows, length, states, history)}{few}", kept


def _time(rows: int, length: int, states: int, history: int, again: float = 1) -> str:
    """Rough time of value and gradient by the kernel on one core, as measured in float32 (`benchmarks.strategies`)."""
    joint, moves = states**history, states ** (history + 1)
    lanes = max(1.0, rows / 16) if rows > 1 else 0.16
    seconds = again * length * lanes * (21 * joint + 0.73 * moves) * 1e-9 + 1e-4
    return f"{seconds:.2g} s" if seconds >= 1 else f"{seconds * 1e3:.2g} ms"


def _component_scales(graph: FactorGraph, alias: Mapping[str, str]) -> dict[str, float]:
    """Scale of each factor's connected component, by factor name.

    Raises:
        GraphError: discrete latents and their dependents have different ``poutine.scale``.
    """
    groups = _group(graph.factors, lambda f: {alias.get(k, k) for k in f.inputs if k in graph.variables})
    scales: dict[str, float] = {}
    for group in groups:
        found = {f.scale for f in group}
        if len(found) > 1:
            raise GraphError(
                "sites that share a discrete latent have different poutine.scale.",
                details=[f"{f.name}: {f.scale}" for f in group],
                suggestion="put all of them under one poutine.scale",
            )
        scales |= {f.name: found.copy().pop() for f in group}
    return scales


def _same_chain(graph: FactorGraph) -> dict[str, str]:
    """All names of one chain variable stand for one connected thing: any of them -> its current name."""
    return {n: c.current for ch in graph.chains.values() for c in ch.variables for n in (*c.initial, *c.previous)}


def _group(items: Iterable[T], keys: Callable[[T], set[str]]) -> list[list[T]]:
    """Items connected through shared keys, in order; an item without keys is alone."""
    groups: list[tuple[set[str], list[T]]] = []
    for item in items:
        mine, merged = keys(item), [item]
        touching = [g for g in groups if g[0] & mine]
        for names, members in touching:
            mine, merged = mine | names, members + merged
        groups = [g for g in groups if not any(g is t for t in touching)] + [(mine, merged)]
    return [members for _, members in groups]


def _components(
    operands: list[Operand], variables: set[str], alias: Mapping[str, str] | None = None
) -> list[list[Operand]]:
    """Operands connected through ``variables``, names of one chain variable counting as one."""
    same = alias or {}
    return _group(operands, lambda o: {same.get(v, v) for v in set(o.inputs) & variables})


def _ids(operands: list[Operand]) -> tuple[int, ...]:
    return tuple(o.index for o in operands)


def _list(names: list[str]) -> str:
    return " and ".join(repr(n) for n in names)
