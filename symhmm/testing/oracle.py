"""Brute force: the oracle that every plan, chain kernel and query is compared with."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, TypeVar

import funsor
import torch
from torch import Tensor

from symhmm.errors import GraphError, IntractableError
from symhmm.graph import Factor, FactorGraph
from symhmm.semiring import LOG, Semiring

MAX_STATES = 2_000_000

Key = tuple[str, tuple[tuple[str, int], ...]]  # the site of one step, and the member of each of its frames
Item = TypeVar("Item")


@dataclass(frozen=True)
class Cell:
    """One member of a factor: ``table`` has one dimension per variable in ``keys``; ``plates`` are those around it."""

    table: Tensor
    keys: tuple[Key, ...]
    plates: frozenset[str]


def enumerate_joint(graph: FactorGraph, semiring: Semiring = LOG, max_states: int = MAX_STATES) -> Tensor:
    """Sum of a factor graph over all joint states of its discrete variables, with no planning and no scan.

    Every time axis is written out into its steps and every plate into its members; a variable that stands in a plate
    becomes one variable per member. Variables that no factor connects, even indirectly, are independent, so each
    connected group gets its own joint table: all factors multiplied, then the whole table summed at once.

    A factor counts once per member of each of its ``frames``, whether or not its term has them as inputs.
    ``Plate.scale`` s means that the log-product over the members of the plate is multiplied by s, after the variables
    inside the plate have been summed out; with such plates, groups are therefore summed from the inner plates outwards.
    ``Factor.scale`` is common to all factors connected by discrete variables and multiplies their summed log-density;
    that of a factor without discrete variables multiplies just this factor.

    Args:
        graph: terms must be funsor tensors or numbers, in nats. Variables in no factor are not counted.
        semiring: `LOG` for the log-density, `MAX` for the largest log-density of a joint state.
        max_states: states that the largest joint table may have.

    Returns:
        shape (), nats, with the autograd graph to the data of the terms.

    Raises:
        IntractableError: a joint table would have more than ``max_states`` states, or scaled plates cross.
        GraphError: a factor reads a name that the graph does not have, or reads it outside of its plate.

    >>> from symhmm.graph import Variable
    >>> from symhmm.semiring import MAX
    >>> z, y = Variable(2), torch.tensor([1.0, 3.0]).log()
    >>> graph = FactorGraph((Factor("z", funsor.Tensor(y)["z"], "discrete latent"),), {"z": z})
    >>> enumerate_joint(graph), enumerate_joint(graph, MAX)  # log 4, log 3
    (tensor(1.3863), tensor(1.0986))
    """
    total = torch.zeros(())
    for cells, scale in _components(graph):
        if any(graph.plates[plate].scale != 1 for cell in cells for plate in cell.plates):
            cells = _sum_inner_plates(cells, graph, semiring, max_states)
        for group in _connected(cells, lambda cell: cell.keys):
            total = total + scale * _sum_joint(group, (), semiring, max_states).table
    return total


def largest_joint(graph: FactorGraph) -> int:
    """States in the largest joint table that `enumerate_joint` would build for a graph whose plates have scale 1.

    >>> from symhmm.graph import Variable
    >>> pairs = Factor("pairs", funsor.Tensor(torch.zeros(2, 3))["a", "b"], "factor")
    >>> largest_joint(FactorGraph((pairs,), {"a": Variable(2), "b": Variable(3)}))
    6
    """
    groups = [group for cells, _ in _components(graph) for group in _connected(cells, lambda cell: cell.keys)]
    return max((prod(_sizes(group).values()) for group in groups), default=1)


def expand_factor(factor: Factor, graph: FactorGraph) -> Iterator[Cell]:
    """One cell per step and plate member of a factor, its variables under the names they have at that step and member.

    Raises:
        GraphError: the term is not a tensor, or reads a name that the graph does not have or outside of its plate.

    >>> from symhmm.graph import Plate
    >>> graph = FactorGraph((Factor("y", funsor.Number(-1.0), "observed", ("animal",)),), plates={"animal": Plate(3)})
    >>> [cell.table.item() for cell in expand_factor(graph.factors[0], graph)]
    [-1.0, -1.0, -1.0]
    """
    names, data = tuple(factor.term.inputs), _data(factor)
    lengths = {axis: chain.length for axis, chain in graph.chains.items()}
    sizes = {name: plate.size for name, plate in graph.plates.items()} | lengths
    for frame in factor.frames:
        if frame not in sizes:
            raise GraphError(f"factor {factor.name!r} stands in {frame!r}, which is neither a plate nor a time axis.")
    for name in names:
        if name in sizes and name not in factor.frames:
            raise GraphError(f"factor {factor.name!r} reads plate {name!r} but does not stand in it.")
    plates = frozenset(factor.frames) & frozenset(graph.plates)
    for members in itertools.product(*(range(sizes[frame]) for frame in factor.frames)):
        at = dict(zip(factor.frames, members, strict=True))
        table = data[tuple(at.get(name, slice(None)) for name in names)]
        keys = tuple(_key(name, at, factor, graph) for name in names if name not in at)
        yield Cell(table, keys, plates)


def _data(factor: Factor) -> Tensor:
    """The table of a factor's term, one dimension per input."""
    term = factor.term if isinstance(factor.term, funsor.Tensor | funsor.Number) else funsor.reinterpret(factor.term)
    if isinstance(term, funsor.Number):
        return torch.as_tensor(term.data, dtype=torch.get_default_dtype())
    if not isinstance(term, funsor.Tensor) or term.output.shape != ():
        raise GraphError(
            f"the term of factor {factor.name!r} is not a table of log-probabilities.",
            details=[f"seen {type(term).__name__} with inputs {dict(term.inputs)}"],
            suggestion="give its real-valued inputs a value first: graph.at(values)",
        )
    return term.data


def _key(name: str, at: Mapping[str, int], factor: Factor, graph: FactorGraph) -> Key:
    """The variable that a factor calls ``name`` at one step and plate member."""
    frames = graph.variables[name].frames if name in graph.variables else None
    for axis, chain in graph.chains.items():
        for variable in chain.variables:
            seen = (*variable.previous, variable.current)
            if name in seen and axis in at:
                step = at[axis] - (len(seen) - 1 - seen.index(name))
                if step < 0:
                    return _key(variable.initial[step], at, factor, graph)
                rest = [frame for frame in graph.variables[variable.current].frames if frame != axis]
                return variable.steps[step], _members(name, rest, at, factor)
            if name in variable.steps:
                # A step read from outside the loop, such as the last one: its plates are those of the loop's variable.
                frames = tuple(frame for frame in graph.variables[variable.current].frames if frame != axis)
    if frames is None:
        raise GraphError(
            f"factor {factor.name!r} reads the unknown name {name!r}.",
            details=[f"variables: {', '.join(graph.variables) or 'none'}"],
        )
    return name, _members(name, frames, at, factor)


def _members(name: str, frames: Iterable[str], at: Mapping[str, int], factor: Factor) -> tuple[tuple[str, int], ...]:
    outside = [frame for frame in frames if frame not in at]
    if outside:
        raise GraphError(
            f"factor {factor.name!r} reads {name!r} outside of its plate {outside[0]!r}.",
            suggestion=f"move {factor.name!r} inside {outside[0]!r}",
        )
    return tuple(sorted((frame, at[frame]) for frame in frames))


def _components(graph: FactorGraph) -> Iterator[tuple[list[Cell], float]]:
    """Cells of the factors that discrete variables connect, and their common scale."""
    loops = [
        {*variable.initial, *variable.previous, *variable.steps, variable.current}
        for chain in graph.chains.values()
        for variable in chain.variables
    ]
    # All steps of a chain variable belong together, and a loop may start from the last steps of another.
    alias = {name: min(group[0]) for group in _connected(loops, lambda names: names) for loop in group for name in loop}
    frames = {*graph.plates, *graph.chains}

    def variables(factor: Factor) -> list[str]:
        return [alias.get(name, name) for name in factor.term.inputs if name not in frames]

    for factors in _connected(graph.factors, variables):
        scales = {factor.scale for factor in factors}
        if len(scales) > 1:
            raise GraphError(
                "factors that share discrete variables have different scales.",
                details=[f"{factor.name}: {factor.scale:g}" for factor in factors],
                suggestion="put all of them under one poutine.scale",
            )
        yield [cell for factor in factors for cell in expand_factor(factor, graph)], scales.pop()


def _connected(items: Iterable[Item], keys: Callable[[Item], Iterable[Any]]) -> list[list[Item]]:
    """Groups of items that share keys, directly or through others; an item without keys is a group of its own."""
    groups: list[tuple[set[Any], list[Item]]] = []
    for item in items:
        mine, members = set(keys(item)), [item]
        touching = [group for group in groups if group[0] & mine]
        for group in touching:
            mine |= group[0]
            members = group[1] + members
        groups = [group for group in groups if not any(group is other for other in touching)]
        groups.append((mine, members))
    return [members for _, members in groups]


def _sizes(cells: Iterable[Cell]) -> dict[Key, int]:
    return {key: size for cell in cells for key, size in zip(cell.keys, cell.table.shape, strict=True)}


def _sum_joint(cells: Sequence[Cell], keep: tuple[Key, ...], semiring: Semiring, max_states: int) -> Cell:
    """Multiply all cells into one joint table and sum it over everything but ``keep``."""
    sizes = _sizes(cells)
    keys = (*keep, *(key for key in sizes if key not in keep))
    states = prod(sizes.values())
    if states > max_states:
        raise IntractableError(
            f"brute force over {len(sizes)} variables would build a joint table of {states} states.",
            details=[f"allowed are {max_states}", f"the first variables: {', '.join(key[0] for key in keys[:5])}"],
            suggestion="fewer states, steps or plate members; symhmm.compile() for the real thing",
        )
    joint = torch.zeros([sizes[key] for key in keys])
    for cell in cells:
        order = sorted(range(len(cell.keys)), key=lambda position: keys.index(cell.keys[position]))
        shape = [sizes[key] if key in cell.keys else 1 for key in keys]
        joint = joint + cell.table.permute(order).reshape(shape)
    table = semiring.reduce(joint.reshape([sizes[key] for key in keep] + [-1]), -1)
    return Cell(table, keep, cells[0].plates)


def _sum_inner_plates(cells: list[Cell], graph: FactorGraph, semiring: Semiring, max_states: int) -> list[Cell]:
    """Sum the variables inside plates from the innermost outwards; on leaving a plate, multiply by its scale."""
    cells = list(cells)
    while leaf := max((cell.plates for cell in cells), key=len):
        inner = [cell for cell in cells if cell.plates == leaf]
        cells = [cell for cell in cells if cell.plates != leaf]

        def plates_of(key: Key) -> frozenset[str]:
            return frozenset(frame for frame, _ in key[1] if frame in graph.plates)

        def local(cell: Cell, leaf: frozenset[str] = leaf) -> list[Key]:
            return [key for key in cell.keys if plates_of(key) == leaf]

        for group in _connected(inner, local):
            keep = tuple(key for key in _sizes(group) if plates_of(key) != leaf)
            outer = frozenset[str]().union(*(plates_of(key) for key in keep))
            if outer == leaf:
                raise IntractableError(
                    f"variables of the scaled plates {sorted(leaf)} are coupled.",
                    details=[f"{key[0]} stands in {sorted(plates_of(key))}" for key in keep],
                    suggestion="nest the plates",
                )
            scale = prod(graph.plates[plate].scale for plate in leaf - outer)
            cell = _sum_joint(group, keep, semiring, max_states)
            cells.append(Cell(cell.table * scale, keep, outer))
    return cells
