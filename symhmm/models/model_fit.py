"""`ModelFit`: a fit of a model for tables, which knows the names of its states, columns and groups."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from symhmm import effects
from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.fitting import Fit
from symhmm.models.inputs import SESSION, Block, Bound, bind
from symhmm.models.order import moves, new_order
from symhmm.models.template import corr_name, correlated, effect_name, program, sd_name, source
from symhmm.reorder import reordered
from symhmm.summary import Summary
from symhmm.tables.data import SequenceData
from symhmm.tables.design import GroupDesign
from symhmm.tables.results import Table, label


@dataclass(frozen=True, eq=False, repr=False)
class ModelFit(Fit):
    """A fit with its model and data: tables speak of states, moves, columns and groups by their names.

    Args:
        model: what was fitted.
        bound: the model with its data: designs, inputs, labels.
        start: starting values; what is held fixed is among them.
        prior: arguments of the priors; empty without priors.
    """

    model: Any
    bound: Bound
    start: Mapping[str, Tensor] = field(repr=False)
    prior: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def data(self) -> SequenceData:
        """The sequences that were fitted."""
        return self.bound.data

    @property
    def states(self) -> tuple[str, ...]:
        """Names of the states."""
        return self.bound.spec.states

    def program_source(self) -> str:
        """The Pyro program that was fitted, as text."""
        return source(self.bound, self.prior)

    def fixed_effects(self) -> Table:
        """As `Fit.fixed_effects`, with the names of states, moves and columns; a formula's on the scale of the link."""
        hidden = tuple(f"{corr_name(b, g)}[" for b, g in _random(self.bound) if correlated(g))
        table = effects.fixed_effects(self)
        # Factors of correlations say nothing by themselves: `variance_components` has the correlations.
        return self._renamed(replace(table, rows=tuple(r for r in table.rows if not r[0].startswith(hidden))))

    def random_effects(self, plate: str | None = None) -> Table:
        """As `Fit.random_effects`, with the names of states, moves, columns and groups; ``plate`` is a grouping, ``ID``."""
        return self._renamed(effects.random_effects(self, plate))

    def variance_components(self) -> Table:
        """As `Fit.variance_components`, with names."""
        return self._renamed(super().variance_components())

    def shrinkage(self, plate: str | None = None) -> Table:
        """As `Fit.shrinkage`, with names."""
        return self._renamed(super().shrinkage(plate))

    def summary(self) -> Summary:
        """As `Fit.summary`, with names."""
        text = super().summary().text
        tables = [(effects.fixed_effects(self), self.fixed_effects())]
        if any(e.plates for e in self.density.layout.entries):
            tables.append((super().variance_components(), self.variance_components()))
        for plain, named in tables:
            text = text.replace(repr(plain), repr(named))
        numbers, _, rest = text.partition("\n\n")
        return Summary(f"{numbers}\n{self._held()}\n{rest}")

    def _held(self) -> str:
        """What emissions are held at, the mean direction of angles by default, and how to fit it."""
        lines = []
        for name, values in self.bound.spec.fixed.items():
            if "." in name:
                what = f"{name} = {', '.join(f'{v:g}' for v in values)}"
                lines.append(f"held fixed      {what}; formulas={{{name!r}: '~ 1'}} fits it\n")
        return "".join(lines)

    def on(self, data: SequenceData) -> "ModelFit":
        """The same estimate with other data, coded as the first were; questions are then about these.

        Groups that the first data had keep their effects, others get 0, that of a typical one.

        Raises:
            SpecError, DataError: the data lack a stream, covariate or group, or have a level that the first had not.
        """
        bound = bind(self.bound.spec, data.to(torch.float64), like=self.bound)
        model = program(source(bound, self.prior))
        arguments = (bound.inputs, dict(self.start), *([dict(self.prior)] if self.prior else []))
        density = compile(model, *arguments)
        values = dict(self.values)
        for block, g in _random(self.bound):
            name = effect_name(block, g)
            old = self.values[name]
            new = torch.zeros(density.layout[name].shape, dtype=old.dtype)
            for there, here in _matches(self.bound, bound, g.group.name):
                new[here] = old[there]
            values[name] = new
        estimate = replace(self.estimate, values=values, vector=density.pack(values), posterior=None)
        return replace(self, estimate=estimate, density=density, bound=bound)

    def kept(self) -> dict[str, Any]:
        """Starting values, which hold what is fixed, and whether parameters have priors."""
        return {"start": dict(self.start), "priors": bool(self.prior)}

    def in_order(self, by: str | None) -> "ModelFit":
        """The same fit with its states in the order of the means of ``by`` (a parameter or stream), where they can be moved."""
        order = new_order(self.bound, self.values, by)
        # What was held equal or increasing says itself which state is which.
        if order is None or self.estimate.tie or self.estimate.order:
            return self
        return self._moved(order)

    def ordered(self, by: str, site: str | None = None) -> "ModelFit":
        """The same fit with its states in the order of a parameter or stream, ``"step.mean"``; names stay in their order.

        Raises:
            FitError: the states are not alike before the fit, or ``by`` is neither a parameter nor a stream.
        """
        order = new_order(self.bound, self.values, by)
        if order is None:
            known = [p.name for p in self.bound.spec.parameters]
            raise FitError(
                f"the states cannot be put in the order of {by!r}.",
                details=[
                    f"parameters: {', '.join(known)}",
                    "states with formulas, fixed values or known labels of their own keep their order",
                ],
                suggestion=f"by={known[0]!r}",
            )
        return self._moved(order)

    def with_states(self, *names: str, site: str | None = None) -> "ModelFit":
        """Refused: the model has names already.

        Raises:
            FitError: always.
        """
        raise FitError(
            "the states of a model have names from the start.",
            details=[f"names: {', '.join(map(str, self.states))}"],
            suggestion=f"{type(self.model).__name__}(states={list(names)}, ...)",
        )

    def _moved(self, order: Tensor) -> "ModelFit":
        if order.tolist() == list(range(len(order))):
            return self
        return replace(self, estimate=reordered(self.estimate, self.density, moves(self.bound, order)))

    @property
    def names(self) -> Mapping[str, str]:
        """Names of single numbers, by their names in the program: ``transitions[0, 1]`` is ``transitions 0>2``."""
        out: dict[str, str] = {}
        for p in self.bound.spec.predictors:
            for b in self.bound.blocks[p.name]:
                cells = list(b.cells) if b.shape else [""]
                columns = b.design.columns if b.design is not None and not b.design.fixed.constant else ("",)
                own = [_joined(b.name, c, column) for c in cells for column in columns]
                shape = (*b.shape, *([len(columns)] if columns != ("",) else []))
                out |= dict(zip(label(b.name, shape), own, strict=True))
                for g in b.design.groups if b.design is not None else ():
                    out |= self._group_names(b, g, cells)
        if self.bound.spec.initial == "free":
            out |= {f"initial[{i}]": f"initial {s}" for i, s in enumerate(self.states)}
        return out

    def _group_names(self, b: Block, g: GroupDesign, cells: list[str]) -> dict[str, str]:
        name = effect_name(b, g)
        out: dict[str, str] = {}
        columns = ("",) if g.coding.constant else g.coding.columns
        shape = (*b.shape, *([] if g.coding.constant else [len(columns)]))
        own = [_joined("", c, column) for c in cells for column in columns]
        for made, called in ((sd_name(b, g), f"sd {name}"), (name, name)):
            out |= {x: f"{called} {o}".strip() for x, o in zip(label(made, shape), own, strict=True)}
        levels, kind = self.bound.levels[g.group.name], self.bound.kinds[g.group.name]
        lead = (self.data.num_sessions, self.data.num_sequences) if kind == SESSION else (len(levels),)
        members = [f"{name} {o} {m}".replace("  ", " ") for m in map(_member, levels) for o in own]
        return out | dict(zip(label(name, (*lead, *shape)), members, strict=True))

    def _renamed(self, table: Table) -> Table:
        names = self.names
        at = next(i for i, c in enumerate(table.columns) if c in ("name", "effect", "component"))

        def new(text: str) -> str:
            if text in names:
                return names[text]
            return re.sub(r"[^\s,]\S*?(\[[\d, ]+\])?(?=$| with|, )", lambda m: names.get(m[0], m[0]), text)

        return replace(table, rows=tuple((*r[:at], new(r[at]), *r[at + 1 :]) for r in table.rows))


def _joined(*parts: str) -> str:
    return " ".join(p for p in parts if p)


def _member(level: Any) -> str:
    return ":".join(map(str, level)) if isinstance(level, tuple) else str(level)


def _random(bound: Bound) -> list[tuple[Block, GroupDesign]]:
    return [(b, g) for b in bound.all_blocks if b.design is not None for g in b.design.groups]


def _matches(old: Bound, new: Bound, name: str) -> list[tuple[Any, Any]]:
    """Places of the groups that both have."""
    place = {level: i for i, level in enumerate(old.levels[name]) if level is not None}
    pairs = [(place[level], i) for i, level in enumerate(new.levels[name]) if level in place]
    if old.kinds[name] != SESSION:
        return pairs
    n, m = old.data.num_sequences, new.data.num_sequences
    return [((a // n, a % n), (b // m, b % m)) for a, b in pairs]
