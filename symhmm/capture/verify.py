"""Check a vectorised run against the program's own steps, run one by one."""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from symhmm.capture.records import Record, Result
from symhmm.capture.time_index import NotVectorisable

# Loops whose steps have up to this many sites in all are checked at every step, others at beginning, middle and end.
FULL_SITES = 1000
_EXTRA = 3
_TOLERANCE = 1e-7


def full_length(result: Result) -> int:
    """Longest loop that is checked at every step: `FULL_SITES` over the sites in a step of the busiest loop."""
    sites: dict[str, int] = {}
    for record in result.records.values():
        for axis in record.axes if not record.helper else ():
            sites[axis] = sites.get(axis, 0) + 1
    return FULL_SITES // max(sites.values(), default=1)


def windows(full: int, extra: int = _EXTRA) -> Callable[[int, int], list[int]]:
    """Schedule for checking loops: all steps up to ``full``, else the first ones and windows in the middle and at the end."""

    def schedule(total: int, history: int) -> list[int]:
        if total <= full:
            return list(range(total))
        steps = list(range(max(2 * history, 1) + extra))
        for last in (total // 2, total - 1):
            steps += range(max(last - history, steps[-1] + 1), last + 1)
        return steps

    return schedule


def verify(result: Result, reference: Result) -> None:
    """Compare each factor of a vectorised run with the factors of the steps that were run one by one.

    Args:
        result: the vectorised run.
        reference: the same program run step by step, all steps or those of `windows`.

    Raises:
        NotVectorisable: a site is missing, or its factor differs.
    """
    full = full_length(result)
    long = {loop.key: loop.total for loop in reference.loops.values() if loop.total > full}
    wanted = {name: r for name, r in reference.records.items() if _trusted(r, reference, long)}
    seen = set()
    for record in result.records.values():
        if record.helper:
            continue
        lengths = [range(result.loops[axis].length) for axis in record.axes]
        pairs: list[tuple[Tensor, Tensor]] = []
        for at in itertools.product(*lengths):
            index = dict(zip(record.axes, at, strict=True))
            name = result.names.resolve(record.name, index)
            if name in seen:
                raise NotVectorisable(f"two steps have a site called {name!r}")
            seen.add(name)
            if name in wanted:
                pairs.append(_aligned(record, index, wanted[name], result))
            elif not long:
                raise NotVectorisable(f"site {name!r} exists in the vectorised program only")
        _compare(record, pairs, result)
    missing = sorted(set(wanted) - seen)
    if missing:
        raise NotVectorisable(f"site {missing[0]!r} is missing from the vectorised program")


def _trusted(record: Record, reference: Result, long: dict[str, int]) -> bool:
    """Whether a step run one by one had its true predecessors: the first steps of a window only set up its state."""
    for loop, _, step in record.steps:
        if loop in long:
            history, total = reference.loops[loop].history, reference.loops[loop].total
            if step >= max(2 * history, 1) + _EXTRA and step not in (total // 2, total - 1):
                return False
    return True


def _aligned(record: Record, index: dict[str, int], other: Record, result: Result) -> tuple[Tensor, Tensor]:
    """The two tensors with the same order of dimensions."""
    mine = record.tensor
    dims: list[str] = []
    for dim in record.dims:
        if dim in index:
            mine = mine.select(len(dims), index[dim])
        else:
            dims.append(result.names.resolve(dim, index))
    plates = tuple(result.names.resolve(p, index) for p in record.plates)
    if (plates, record.role, record.observed) != (other.plates, other.role, other.observed):
        raise NotVectorisable(f"site {other.name!r} differs from the program's own in role, plates or shape")
    if abs(record.scale - other.scale) > 1e-12:
        raise NotVectorisable(f"the scale of site {other.name!r} differs between steps")
    names = list(dict.fromkeys((*dims, *other.dims)))

    def spread(x: Tensor, have: list[str]) -> Tensor:
        order = [have.index(n) for n in names if n in have]
        return x.permute(order).reshape([x.shape[have.index(n)] if n in have else 1 for n in names])

    a, b = spread(mine, dims), spread(other.tensor, list(other.dims))
    if any(x != y and 1 not in (x, y) for x, y in zip(a.shape, b.shape, strict=True)):
        raise NotVectorisable(f"the factor of site {other.name!r} differs from the program's own in size")
    return a, b


def _compare(record: Record, pairs: list[tuple[Tensor, Tensor]], result: Result) -> None:
    by_shape: dict[tuple[torch.Size, torch.Size], list[tuple[Tensor, Tensor]]] = {}
    for a, b in pairs:
        by_shape.setdefault((a.shape, b.shape), []).append((a, b))
    for group in by_shape.values():
        mine, own = (torch.stack([pair[i] for pair in group]) for i in (0, 1))
        if not alike(mine, own):
            name = result.names.template(record.name, dict.fromkeys(record.axes, "time"))
            raise NotVectorisable(f"the factor of site {name!r} differs from the program's own at some steps")


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether ``a`` and ``b`` came from the same operations: they differ by rounding alone, which float32 shows more of."""
    tolerance = _TOLERANCE if a.dtype == torch.float64 else 1e-4
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
