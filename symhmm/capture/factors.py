"""Records of a run, written down as the factor graph: tokens become templates, tensors become funsors."""

from collections import OrderedDict
from dataclasses import dataclass

from funsor.domains import Bint
from funsor.tensor import Tensor as FunsorTensor

from symhmm.capture.loops import Loop
from symhmm.capture.records import Record, Result
from symhmm.capture.time_index import NotVectorisable
from symhmm.graph import Chain, ChainVariable, Factor, FactorGraph, LoopNote, Observed, Recipe, Variable


@dataclass(frozen=True)
class _Writer:
    """How the names of one run are written in its graph."""

    result: Result
    axes: dict[str, str]

    def name(self, name: str) -> str:
        return self.axes.get(name) or self.result.names.template(name, self.axes)

    def frames(self, record: Record) -> tuple[str, ...]:
        return tuple(map(self.name, (*record.plates, *record.axes)))


def factor_graph(result: Result, recipe: Recipe) -> FactorGraph:
    """The factor graph of what a run recorded.

    Args:
        result: the run, after verification or stacking.
        recipe: how to run the program to get the same graph again.

    Raises:
        NotVectorisable: the discrete latents of a vectorised loop differ between its steps.
    """
    loops = [loop for loop in result.loops.values() if not loop.helper]
    axes = {loop.key: "time" if i == 0 else f"time_{i + 1}" for i, loop in enumerate(loops)}
    write = _Writer(result, axes)
    kept = [r for r in result.records.values() if all(loop in axes for loop, _, _ in r.steps)]
    model = [r for r in kept if not r.helper]
    variables = {write.name(r.name): _variable(r, write) for r in kept if r.support is not None}
    frames = {frame for r in kept for frame in write.frames(r)}
    return FactorGraph(
        factors=tuple(_factor(r, write) for r in model),
        variables=variables,
        plates={write.name(n): p for n, p in result.plates.items() if write.name(n) in frames},
        chains={axes[loop.key]: _chain(loop, kept, write) for loop in result.vectorised()},
        params=dict(result.params),
        latents=dict(result.latents),
        observed={
            write.name(r.name): Observed(*r.observed, frames=write.frames(r)) for r in model if r.observed is not None
        },
        deterministic={write.name(n): value for n, value in result.deterministic.items()},
        subsamples=dict(result.subsamples),
        loops={axes[loop.key]: LoopNote(_tier(loop, recipe), loop.total, loop.reason) for loop in loops},
        recipe=recipe,
    )


def _tier(loop: Loop, recipe: Recipe) -> str:
    return recipe.tier if loop.vector else "unrolled"


def _factor(record: Record, write: _Writer) -> Factor:
    inputs = OrderedDict((write.name(d), Bint[s]) for d, s in zip(record.dims, record.tensor.shape, strict=True))
    term = FunsorTensor(record.tensor, inputs)
    return Factor(write.name(record.name), term, record.role, write.frames(record), record.scale)


def _variable(record: Record, write: _Writer) -> Variable:
    assert record.support is not None
    site = write.name(record.name)
    for lag in (step for _, role, step in record.steps if role == "prev"):
        for axis in write.axes.values():
            site = site.replace(f"{{{axis}-{lag}}}", f"{{{axis}}}")
    return Variable(record.support.shape[0], write.frames(record), site, record.support)


def _support_shape(record: Record) -> tuple[int, ...]:
    assert record.support is not None
    return tuple(record.support.shape)


def _chain(loop: Loop, kept: list[Record], write: _Writer) -> Chain:
    """The chain of a vectorised loop: its discrete latents matched with themselves at earlier steps, by position."""

    def states(role: str, step: int) -> list[Record]:
        roles = ("init", "concrete") if role == "init" else (role,)
        wanted = [(*loop.steps, (loop.key, r, step)) for r in roles]
        return [r for r in kept if r.support is not None and r.steps in wanted]

    current = states("curr", 0)
    lags = range(loop.history, 0, -1)
    before = [states("prev", lag) for lag in lags]
    initial = [states("init", loop.lead - lag) for lag in lags]
    for row in (*before, *initial):
        if list(map(_support_shape, row)) != list(map(_support_shape, current)):
            raise NotVectorisable("the discrete latents of the loop differ between its steps")
    names = write.result.names
    variables = tuple(
        ChainVariable(
            initial=tuple(write.name(row[i].name) for row in initial),
            previous=tuple(write.name(row[i].name) for row in before),
            current=write.name(record.name),
            steps=tuple(write.name(names.resolve(record.name, {loop.key: k})) for k in range(loop.length)),
        )
        for i, record in enumerate(current)
    )
    return Chain(write.axes[loop.key], loop.length, loop.history, variables, loop.lead)
