"""Inputs: the tensors that a program reads, made of data and designs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import SpecError
from symhmm.models.spec import Predictor, Spec
from symhmm.tables.data import SequenceData
from symhmm.tables.design import Design, GroupDesign, closest, design, group_labels
from symhmm.tables.formula import Group
from symhmm.tables.support import check_support

SUBJECT, SESSION, OTHER = "subject", "session", "other"


@dataclass(frozen=True, eq=False, repr=False)
class Inputs:
    """What a program reads. N subjects, S sessions (where there are any), T steps.

    Args:
        streams: by name, shape (T, [S,] N).
        observed: by name, shape (T, [S,] N), bool.
        x: design matrix of each expression, shape (T, [S,] N, P), or ([S,] N, P) where it never changes in time.
        code: number of the group, by the name of the grouping, shape (T, [S,] N) or ([S,] N), int64.
        size: members of each plate.
        num_steps: T.
        states: known states, shape (T, [S,] N), -1 where unknown; None if none is known.
    """

    streams: Mapping[str, Tensor]
    observed: Mapping[str, Tensor]
    x: Mapping[str, Tensor]
    code: Mapping[str, Tensor]
    size: Mapping[str, int]
    num_steps: int
    states: Tensor | None = None

    def __repr__(self) -> str:
        parts = {"streams": self.streams, "x": self.x, "code": self.code}
        shown = [f"{kind} {name!r} {tuple(v.shape)}" for kind, all_ in parts.items() for name, v in all_.items()]
        return f"Inputs({self.num_steps} steps, {', '.join(f'{k}: {n}' for k, n in self.size.items())}; {', '.join(shown)})"


@dataclass(frozen=True, eq=False)
class Block:
    """Cells that share a formula, with its design.

    Args:
        name: of the parameter, ``transitions`` or ``transitions[0>1]``.
        cells: their names, row by row; () shape for a single one.
        shape: of the cells.
        design: None where the value is plain.
    """

    name: str
    link: str
    cells: tuple[str, ...]
    shape: tuple[int, ...]
    design: Design | None


@dataclass(frozen=True, eq=False, repr=False)
class Bound:
    """A specification with data: its blocks, inputs, and the labels of all groups.

    Args:
        blocks: by predictor.
        levels: labels of the members of each grouping, by name; of subjects and sessions in the order of the data.
        kinds: of each grouping: ``subject``, ``session`` or ``other``.
    """

    spec: Spec
    data: SequenceData
    blocks: Mapping[str, tuple[Block, ...]]
    inputs: Inputs
    levels: Mapping[str, tuple[Any, ...]]
    kinds: Mapping[str, str]

    def __repr__(self) -> str:
        designs = [f"{b.name}: {b.design}" for b in self.all_blocks if b.design is not None]
        return "\n".join([repr(self.spec), repr(self.inputs), *designs])

    @property
    def all_blocks(self) -> tuple[Block, ...]:
        """Blocks of all predictors."""
        return tuple(b for blocks in self.blocks.values() for b in blocks)

    def varies(self, block: Block) -> bool:
        """Whether the linear predictor changes in time."""
        d = block.design
        if d is None:
            return False
        x = [c.expr for c in (d.fixed, *(g.coding for g in d.groups))]
        return any(self.moves("x", e) for e in x) or any(self.moves("code", g.group.name) for g in d.groups)

    def moves(self, kind: str, name: str) -> bool:
        """Whether a design matrix (``kind`` x) or codes of groups (code) have a time axis."""
        if kind == "x":
            return name in self.inputs.x and self.inputs.x[name].dim() == self.data.mask.dim() + 1
        return name in self.inputs.code and self.inputs.code[name].dim() == self.data.mask.dim()


def bind(spec: Spec, data: SequenceData, like: Bound | None = None) -> Bound:
    """The specification with data.

    Args:
        spec: what is wanted.
        data: has its streams, covariates and groups.
        like: an earlier binding, whose coding is repeated; else it is learned from the data.

    Raises:
        SpecError: a stream, covariate or group is not in the data, or a design has too low a rank.
        DataError: values outside the support of their family, by row; missing covariates.
    """
    _check_streams(spec, data)
    frame = covariate_frame(data)
    blocks: dict[str, tuple[Block, ...]] = {}
    if like is not None:
        blocks = dict(like.blocks)
    else:
        for p in spec.predictors:
            cells, shape = _cells(p, data)
            if p.plain:
                blocks[p.name] = (Block(p.name, p.link, cells, shape, None),)
            else:
                blocks[p.name] = tuple(
                    Block(n, p.link, cells if one else c, shape if one else s, design(f, frame, f"formula of {n}"))
                    for n, c, s, f in p.blocks()
                    for one in [len(p.formulas) == 1]
                )
    designs = [(b.name, b.design) for bs in blocks.values() for b in bs if b.design is not None]
    x: dict[str, Tensor] = {}
    code: dict[str, Tensor] = {}
    levels: dict[str, tuple[Any, ...]] = {}
    kinds: dict[str, str] = {}
    for name, d in designs:
        what = f"formula of {name}"
        for coding in (d.fixed, *(g.coding for g in d.groups)):
            if coding.columns and not coding.constant and coding.expr not in x:
                x[coding.expr] = _still(data.scatter(coding(frame, what)).to(data.dtype), data)
        for g in d.groups:
            _add_group(g, frame, data, what, code, levels, kinds)
    size = {
        f"{name} in common" if name in plates(data) else name: len(levels[name])
        for name in kinds
        if kinds[name] == OTHER
    }
    size |= dict(zip(plates(data), reversed(data.mask.shape[1:]), strict=True))
    streams = {n: _numbers(data.streams[n], spec, n) for n in spec.emissions}
    observed = {n: data.observed[n] for n in spec.emissions}
    inputs = Inputs(streams, observed, x, code, size, data.num_steps, _known(spec, data))
    return Bound(spec, data, blocks, inputs, levels, kinds)


def plates(data: SequenceData) -> tuple[str, ...]:
    """Names of the plates of a program, of subjects first, then of sessions: those of their columns."""
    names = (data.labels.id or "individual", data.labels.session or SESSION)
    return names[: data.mask.dim() - 1]


def covariate_frame(data: SequenceData) -> Any:
    """A pandas table of what formulas may name: covariates, groups, and the columns of ids, sessions and times.

    One row for each step within a sequence; its index is the row of the user's table, -1 in gaps.
    """
    import pandas as pd

    cells = data.cells()
    columns: dict[str, Any] = {}
    for name, values in data.covariates.items():
        columns[name] = _decoded(values[cells], data.levels.get(name))
    for name, codes in data.groups.items():
        columns[name] = _decoded(codes[cells[-1]], data.levels.get(name))
    place = tuple(c.numpy() for c in cells)
    old = data.labels
    columns.setdefault(old.id, [old.ids[i] for i in place[-1]])
    if old.session and old.sessions is not None:
        columns.setdefault(old.session, np.asarray(old.sessions)[place[1], place[2]])
    if old.time and old.times is not None:
        columns.setdefault(old.time, np.asarray(old.times)[place])
    return pd.DataFrame(columns, index=data.rows[cells].numpy())


def _decoded(values: Tensor, levels: tuple[Any, ...] | None) -> Any:
    if levels is None:
        return values.double().numpy()
    import pandas as pd

    return pd.Categorical.from_codes(values.long().numpy(), list(levels)).remove_unused_categories()


def _check_streams(spec: Spec, data: SequenceData) -> None:
    for name, family in spec.emissions.items():
        if name not in data.streams:
            known = list(data.streams)
            raise SpecError(
                f"the data have no stream {name!r}.",
                details=[f"streams: {', '.join(known)}"],
                suggestion=f"{closest(name, known)!r}, or list {name!r} in streams= when the data are read",
            )
        y, seen = data.streams[name], data.observed[name]
        if y.dim() != seen.dim():
            raise SpecError(
                f"stream {name!r} has {y.shape[-1]} numbers at each step, and {family.name!r} is for one.",
                suggestion="a stream of its own for each of them, or GaussianHMM",
            )
        check_support(name, y[seen].double().numpy(), data.rows[seen].numpy(), family.name)


def _add_group(
    g: GroupDesign,
    frame: Any,
    data: SequenceData,
    what: str,
    code: dict[str, Tensor],
    levels: dict[str, tuple[Any, ...]],
    kinds: dict[str, str],
) -> None:
    name, kind = g.group.name, kind_of(g.group, data)
    if name in kinds:
        return
    kinds[name] = kind
    if kind == SUBJECT:
        levels[name] = data.ids
        return
    if kind == SESSION:
        names = np.asarray(data.labels.sessions)
        levels[name] = tuple((i, s) for column in names for s, i in zip(column, data.ids, strict=True))
        return
    # Groups that the first data did not have follow those that they had.
    here = g.codes(frame, what)
    if (here < 0).any():
        labels = group_labels(frame, g.group.by)
        known = dict.fromkeys([*g.levels, *labels])
        place = {label: i for i, label in enumerate(known)}
        levels[name], here = tuple(known), np.array([place[label] for label in labels])
    else:
        levels[name] = g.levels
    code[name] = _still(data.scatter(here, fill=0).long(), data, events=0)


def kind_of(group: Group, data: SequenceData) -> str:
    """Whether a grouping is that of the subjects, of their sessions, or another."""
    old = data.labels
    if old.id in group.by and all(name == old.id or name in data.groups for name in group.by):
        return SUBJECT  # what never changes within a subject does not divide it
    if data.mask.dim() < 3 or old.sessions is None or old.session not in group.by:
        return OTHER
    if set(group.by) == {old.id, old.session}:
        return SESSION
    # Sessions whose names are their own, whoever had them.
    names = np.asarray(old.sessions)[data.lengths.numpy() > 0].tolist()
    return SESSION if group.by == (old.session,) and len(set(names)) == len(names) else OTHER


def _still(x: Tensor, data: SequenceData, events: int = 1) -> Tensor:
    """Without its time axis, where nothing changes along it within any sequence."""
    inside = data.inside.reshape(*data.mask.shape, *[1] * events)
    return x[0] if bool(((x == x[0]) | ~inside).all()) else x


def _cells(p: Predictor, data: SequenceData) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Cells and their shape; the levels of a categorical stream are those of the data, the first the reference of logits."""
    if p.link != "softmax" or p.shape[1:] != (0,) or p.name == "transitions":
        return p.cells, p.shape
    stream = p.name.rpartition(".")[0]
    found = max(int(data.streams[stream][data.observed[stream]].max()) + 1, len(data.levels.get(stream, ())), 2)
    names = data.levels.get(stream, range(found))
    kept = list(names) if p.plain else list(names)[1:]
    return tuple(f"{c}:{level}" for c in p.cells for level in kept), (p.shape[0], len(kept))


def _numbers(y: Tensor, spec: Spec, name: str) -> Tensor:
    return y.long() if spec.emissions[name].name == "categorical" else y


def _known(spec: Spec, data: SequenceData) -> Tensor | None:
    """Known states as numbers of the model's states."""
    if data.states is None or not bool((data.states >= 0).any()):
        return None
    names = [str(n) for n in data.state_names] or [str(i) for i in range(int(data.states.max()) + 1)]
    if unknown := [n for n in names if n not in spec.states]:
        raise SpecError(
            f"the known states have {unknown[0]!r}, which is no state of the model.",
            details=[f"states: {', '.join(spec.states)}"],
            suggestion=f"states={names!r}",
        )
    place = torch.tensor([*[spec.states.index(n) for n in names], -1])
    return place[data.states]
