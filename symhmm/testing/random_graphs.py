"""Random tractable factor graphs for property tests."""

from collections.abc import Iterable, Mapping
from random import Random
from typing import TYPE_CHECKING

import funsor
import torch

from symhmm.errors import IntractableError
from symhmm.graph import Chain, ChainVariable, Factor, FactorGraph, Plate, Role, Variable
from symhmm.testing.oracle import largest_joint

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def random_graphs(
    max_states: int = 3,
    max_time: int = 4,
    max_plates: int = 2,
    max_joint: int = 3000,
    *,
    scales: bool = True,
    impossible: bool = True,
) -> "SearchStrategy[FactorGraph]":
    """Hypothesis strategy of factor graphs made by `random_graph`, which explains the arguments. Needs hypothesis.

    >>> from hypothesis import find
    >>> find(random_graphs(), lambda graph: len(graph.chains) == 1).chains["time"].length
    1
    """
    from hypothesis import strategies

    return strategies.builds(
        random_graph,
        strategies.randoms(use_true_random=False),
        max_states=strategies.just(max_states),
        max_time=strategies.just(max_time),
        max_plates=strategies.just(max_plates),
        max_joint=strategies.just(max_joint),
        scales=strategies.just(scales),
        impossible=strategies.just(impossible),
    )


def random_graph(
    random: Random,
    max_states: int = 3,
    max_time: int = 4,
    max_plates: int = 2,
    max_joint: int = 3000,
    *,
    scales: bool = True,
    impossible: bool = True,
) -> FactorGraph:
    """A random tractable factor graph, with float64 terms that require gradients.

    It has nested or sibling plates; ordinary variables in them; up to two time axes, inside plates or outside, each
    with one or two coupled chain variables of history 1 or 2, variables that are local to a step, a plate inside time,
    and discrete effects from outside the loop; factors that are constant over plates in which they stand.

    Args:
        random: source of all choices.
        max_states: largest number of values of a variable.
        max_time: largest number of steps of a time axis (its initial steps come before it).
        max_plates: largest number of plates outside of time.
        max_joint: sizes are lowered until the largest connected group has no more joint states than this.
        scales: whether plates may be subsampled and sites scaled.
        impossible: whether some entries are ``-inf``.

    >>> random_graph(Random(1)).check() is not None
    True
    """
    sketch = _Sketch(random)
    sketch.add_plates(random.randint(0, max_plates), scales)
    sketch.add_variables(random.randint(0, 3))
    for axis in ("time", "later")[: random.choice((0, 1, 1, 1, 2))]:
        sketch.add_chain(axis)
    sketch.add_constant()
    sizes = {name: random.randint(2, max_states) for name in sketch.leaders()}
    sizes |= {name: random.randint(1, 3) for name in sketch.plates}
    sizes |= {axis: random.randint(1, max_time) for axis in sketch.chains}
    scale = random.choice((1.0, 1.0, 0.5)) if scales else 1.0
    seed = random.randint(0, 2**16)
    while True:
        graph = sketch.build(sizes, scale, seed, impossible)
        if largest_joint(graph) <= max_joint:
            return graph
        largest = max(sizes, key=lambda name: (sizes[name], name in sketch.plates, name))
        if sizes[largest] == 1:
            raise IntractableError(f"max_joint = {max_joint} is too small for any graph.", suggestion="max_joint=3000")
        sizes[largest] -= 1


class _Sketch:
    """A random graph without sizes: contexts (plates from the outside in), variables, and what each factor reads."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.plates: dict[str, float] = {}
        self.contexts: list[tuple[str, ...]] = [()]
        self.homes: dict[str, tuple[str, ...]] = {}
        self.same: dict[str, str] = {}  # names of one chain variable share a number of states
        self.chains: dict[str, tuple[int, list[str]]] = {}
        self.reads: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = []

    def leaders(self) -> list[str]:
        return sorted({self.same.get(name, name) for name in self.homes})

    def some(self, names: Iterable[str], most: int) -> list[str]:
        pool = list(names)
        return self.random.sample(pool, self.random.randint(0, min(most, len(pool))))

    def visible(self, context: tuple[str, ...]) -> list[str]:
        """Variables outside of loops whose plates enclose the context; a tree of plates keeps elimination tractable."""
        return [name for name in self.free if set(self.homes[name]) <= set(context)]

    @property
    def free(self) -> list[str]:
        return [name for name, home in self.homes.items() if name not in self.same and not set(home) & set(self.chains)]

    def add_plates(self, count: int, scales: bool) -> None:
        for index in range(count):
            name = f"plate_{index}"
            self.contexts.append((*self.random.choice(self.contexts), name))
            self.plates[name] = self.random.choice((1.0, 1.0, 2.5)) if scales else 1.0

    def add_variables(self, count: int) -> None:
        for index in range(count):
            context = self.random.choice(self.contexts)
            parents = self.some(self.visible(context), 2)
            self.homes[f"v_{index}"] = context
            self.reads.append((f"v_{index}", context, (f"v_{index}", *parents)))

    def add_chain(self, axis: str) -> None:
        outer, history = self.random.choice(self.contexts), self.random.randint(1, 2)
        context, effects = (*outer, axis), self.visible(outer)
        bases = [f"{axis}_{letter}" for letter in "zw"[: self.random.randint(1, 2)]]
        self.chains[axis] = (history, bases)
        current = [f"{base}_{{{axis}}}" for base in bases]
        previous = [f"{base}_{{{axis}-{lag}}}" for base in bases for lag in range(history, 0, -1)]
        for base in bases:
            for step in range(history):
                name = f"{base}_{step}"
                self.homes[name], self.same[name] = outer, base
                self.reads.append((name, outer, (name, *self.some(effects, 1))))
        self.homes |= dict.fromkeys([*previous, *current], context)
        self.same |= {f"{base}_{{{axis}-{lag}}}": base for base in bases for lag in range(history, 0, -1)}
        self.same |= {f"{base}_{{{axis}}}": base for base in bases}
        for index, name in enumerate(current):
            parents = [*self.some(previous, 3), *self.some(current[:index], 1), *self.some(effects, 1)]
            self.reads.append((name, context, (name, *parents)))
        inside = context
        if self.random.random() < 0.4:
            inside = (*context, f"{axis}_inner")
            self.plates[f"{axis}_inner"] = 1.0
        local = [f"{axis}_k"] if self.random.random() < 0.5 else []
        for name in local:
            self.homes[name] = inside
            self.reads.append((name, inside, (name, *self.some([*current, *previous], 2), *self.some(effects, 1))))
        self.reads.append((f"{axis}_y", inside, (*local, *self.some(current, 2), *self.some(effects, 1))))

    def add_constant(self) -> None:
        self.reads.append(("constant", self.random.choice(self.contexts), ()))

    def build(self, sizes: Mapping[str, int], scale: float, seed: int, impossible: bool) -> FactorGraph:
        generator = torch.Generator().manual_seed(seed)
        random = Random(seed)
        states = {name: sizes[self.same.get(name, name)] for name in self.homes}
        factors = []
        for name, frames, variables in self.reads:
            # A term may be constant over a frame: its members then share one table, but each reads its own variables.
            inputs = [*(frame for frame in frames if random.random() < 0.6), *dict.fromkeys(variables)]
            shape = [states.get(name, sizes.get(name, 1)) for name in inputs]
            table = torch.randn(shape, generator=generator, dtype=torch.float64)
            if impossible and random.random() < 0.15:
                table[torch.rand(shape, generator=generator) < 0.3] = -torch.inf
            order = random.sample(range(len(inputs)), len(inputs))
            table = table.permute(order).contiguous().requires_grad_()
            domains = {inputs[position]: funsor.Bint[shape[position]] for position in order}
            role: Role = "discrete latent" if name in self.homes else "observed"
            factors.append(Factor(name, funsor.Tensor(table, domains), role, frames, scale))
        latents = {name: Variable(states[name], home, name) for name, home in self.homes.items()}
        plates = {name: Plate(sizes[name], plate_scale) for name, plate_scale in self.plates.items()}
        chains = {axis: self._chain(axis, sizes[axis]) for axis in self.chains}
        return FactorGraph(tuple(factors), latents, plates, chains)

    def _chain(self, axis: str, length: int) -> Chain:
        history, bases = self.chains[axis]
        variables = tuple(
            ChainVariable(
                initial=tuple(f"{base}_{step}" for step in range(history)),
                previous=tuple(f"{base}_{{{axis}-{lag}}}" for lag in range(history, 0, -1)),
                current=f"{base}_{{{axis}}}",
                steps=tuple(f"{base}_{step}" for step in range(history, history + length)),
            )
            for base in bases
        )
        return Chain(axis, length, history, variables, first=history)
