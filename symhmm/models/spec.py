"""Specifications: what a model was asked to be, checked as far as that is possible without data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from symhmm.errors import SpecError
from symhmm.models.emissions import Family, family
from symhmm.tables.design import closest
from symhmm.tables.formula import Formula, parse

Formulas = str | Mapping[Any, str] | None
RESERVED = ("z", "known")
INITIAL = ("stationary", "free", "uniform")


@dataclass(frozen=True)
class Predictor:
    """A quantity with a value in each of several cells (states, pairs of states), linear in covariates on its link's scale.

    Args:
        name: ``transitions``, ``initial`` or ``step.mean``.
        link: ``identity``, ``log``, ``logit`` or ``softmax`` (logits relative to a reference cell that is left out).
        cells: names of the cells, row by row.
        shape: of the cells; (K, K - 1) for transitions, from and to, staying left out.
        formulas: one for all cells, or one for each; none where the value is plain, on its natural scale.
    """

    name: str
    link: str
    cells: tuple[str, ...]
    shape: tuple[int, ...]
    formulas: tuple[Formula, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether there is no formula: numbers on the natural scale."""
        return not self.formulas

    def blocks(self) -> tuple[tuple[str, tuple[str, ...], tuple[int, ...], Formula], ...]:
        """Cells that share a formula: name, cells, shape, formula of each."""
        if len(self.formulas) == 1:
            return ((self.name, self.cells, self.shape, self.formulas[0]),)
        return tuple((f"{self.name}[{c}]", (c,), (), f) for c, f in zip(self.cells, self.formulas, strict=True))


@dataclass(frozen=True)
class Spec:
    """All that a model is, without data.

    Args:
        states: names of the K states.
        emissions: family of each stream.
        transitions: logits of leaving each state for each other.
        initial: ``stationary``, ``uniform``, ``free``, ``fixed`` or ``formula``.
        start: of a start by formula, its logits relative to the first state.
        parameters: of all emissions, those that are fitted.
        fixed: values that are held, by parameter; one number per state, or one for all.
        timing: ``to``: row t drives the step into t; ``from``: row t drives the step out of t.
    """

    states: tuple[str, ...]
    emissions: Mapping[str, Family]
    transitions: Predictor
    initial: str
    parameters: tuple[Predictor, ...]
    timing: Literal["to", "from"] = "to"
    start: Predictor | None = None
    fixed: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def predictors(self) -> tuple[Predictor, ...]:
        """Everything that is fitted and may have a formula."""
        return (self.transitions, *([self.start] if self.start else []), *self.parameters)

    def __repr__(self) -> str:
        lines = [f"{len(self.states)} states: {', '.join(self.states)}"]
        lines += [f"{s} ~ {f}" for s, f in self.emissions.items()]
        for p in self.predictors:
            for name, _, _, f in p.blocks() if p.formulas else ():
                lines.append(f"{name} {f}")
        lines.append(
            f"initial: {self.initial}; covariates drive the step {'into' if self.timing == 'to' else 'out of'} their row"
        )
        return "\n".join(lines)


def specify(
    states: int | Sequence[str],
    emissions: Mapping[str, str],
    transitions: Formulas,
    initial: str | Sequence[float],
    formulas: Mapping[str, Formulas],
    fixed: Mapping[str, float | Sequence[float]],
    timing: str,
) -> Spec:
    """Check what a user asked for, and write it out.

    Raises:
        SpecError: a family, parameter, state or formula that is not there or cannot be read, with what comes close.
    """
    names = _state_names(states)
    k = len(names)
    families = _families(emissions)
    if timing not in ("to", "from"):
        raise SpecError(
            f"timing={timing!r} is neither 'to' nor 'from'.",
            suggestion="'to': row t drives the step into t, the default",
        )
    pairs = tuple(f"{a}>{b}" for a in names for b in names if a != b)
    moves = predictor("transitions", "softmax", pairs, (k, k - 1), transitions if k > 1 else None, _pair_aliases(names))
    held = {name: _held(name, families, value, k) for name, value in fixed.items()}
    for name in formulas:
        split_name(name, families)
        if name in held:
            raise SpecError(f"{name!r} has a formula and is held fixed.", suggestion="one of them")
    parameters = []
    aliases = {str(i): n for i, n in enumerate(names)}
    for stream, f in families.items():
        for p in f.parameters:
            name = f"{stream}.{p.name}"
            if p.fixed is not None and name not in formulas:
                held.setdefault(name, (p.fixed,))
            if name not in held:
                # The number of levels of a categorical stream is that of the data: the last size is filled in then.
                shape = (k, 0) if p.link == "softmax" else (k,)
                parameters.append(predictor(name, p.link, names, shape, formulas.get(name), aliases))
    kind, start = _initial(initial, names, aliases, held)
    return Spec(names, families, moves, kind, tuple(parameters), timing, start, held)  # type: ignore[arg-type]


def predictor(
    name: str, link: str, cells: tuple[str, ...], shape: tuple[int, ...], given: Formulas, aliases: Mapping[str, str]
) -> Predictor:
    """A predictor from what a user gave: one formula for all cells, or some cells' own."""
    what = f"formula of {name}"
    if given is None:
        return Predictor(name, link, cells, shape)
    if isinstance(given, Mapping):
        own: dict[str, Formula] = {}
        for cell, text in given.items():
            key = aliases.get(str(cell).replace(" ", ""), str(cell).replace(" ", ""))
            if key not in cells:
                raise SpecError(
                    f"the {what} names {cell!r}, which is none of its cells.",
                    details=[f"cells: {', '.join(cells)}"],
                    suggestion=repr(closest(str(cell), cells)),
                )
            own[key] = parse(text, f"formula of {name}[{key}]")
        if link == "softmax" and len(shape) == 2 and shape[1] == 0:
            raise SpecError(f"the {what} must be the same for all states.", suggestion=f"{name!r}: '~ x'")
        return Predictor(name, link, cells, shape, tuple(own.get(c, Formula("1")) for c in cells))
    f = parse(given, what)
    intercept = f == Formula("1")
    # An intercept alone is the plain value: logits are their own natural scale, the others keep their constraint.
    return Predictor(name, link, cells, shape, () if intercept and 0 not in shape else (f,))


def split_name(name: str, families: Mapping[str, Family]) -> tuple[str, str]:
    """Stream and parameter of ``step.mean``; streams may have dots of their own. Raises `SpecError`."""
    stream, _, parameter = name.rpartition(".")
    if stream not in families:
        known = [f"{s}.{p.name}" for s, f in families.items() for p in f.parameters]
        raise SpecError(
            f"there is no parameter {name!r}.",
            details=[f"parameters: {', '.join(known)}"],
            suggestion=repr(closest(name, known)),
        )
    families[stream].parameter(parameter, stream)
    return stream, parameter


def _state_names(states: int | Sequence[str]) -> tuple[str, ...]:
    names = tuple(map(str, range(states))) if isinstance(states, int) else tuple(map(str, states))
    if not names or len(set(names)) < len(names) or any(">" in n or "|" in n for n in names):
        raise SpecError(
            "the states cannot be told apart.",
            details=[f"seen {states!r}"],
            suggestion="a number from 1 on, or different names without '>' and '|'",
        )
    return names


def _pair_aliases(names: Sequence[str]) -> dict[str, str]:
    pairs = [(i, j) for i in range(len(names)) for j in range(len(names)) if i != j]
    return {f"{i}>{j}": f"{names[i]}>{names[j]}" for i, j in pairs}


def _families(emissions: Mapping[str, str]) -> dict[str, Family]:
    if not isinstance(emissions, Mapping) or not emissions:
        raise SpecError(
            "there are no emissions.", details=[f"seen {emissions!r}"], suggestion='emissions={"step": "gamma"}'
        )
    if taken := [s for s in emissions if s in RESERVED]:
        raise SpecError(
            f"a stream cannot have the name {taken[0]!r}, which is that of a site of the program.",
            suggestion=f"rename the column {taken[0]!r}",
        )
    return {stream: family(name, stream) for stream, name in emissions.items()}


def _held(name: str, families: Mapping[str, Family], value: float | Sequence[float], k: int) -> tuple[float, ...]:
    split_name(name, families)
    numbers = (float(value),) if isinstance(value, (int, float)) else tuple(map(float, value))
    if len(numbers) not in (1, k):
        raise SpecError(
            f"{name!r} is held at the wrong number of values.", details=[f"seen {len(numbers)}, wanted 1 or {k}"]
        )
    return numbers


def _initial(
    given: str | Sequence[float], names: tuple[str, ...], aliases: Mapping[str, str], held: dict[str, tuple[float, ...]]
) -> tuple[str, Predictor | None]:
    """Kind of start, and its predictor where it has a formula; fixed probabilities go to ``held``."""
    if isinstance(given, str) and given in INITIAL:
        return given, None
    if isinstance(given, str) and given.strip().startswith("~"):
        f = parse(given, "formula of initial")
        if f == Formula("1"):
            return "free", None
        return "formula", Predictor("initial", "softmax", names[1:], (len(names) - 1,), (f,))
    if isinstance(given, str):
        raise SpecError(
            f"initial={given!r} is no start.",
            details=[f"starts: {', '.join(INITIAL)}, probabilities, a formula '~ x'"],
            suggestion=repr(closest(given, INITIAL)),
        )
    p = tuple(float(x) for x in given)
    if len(p) != len(names) or min(p) < 0 or abs(sum(p) - 1) > 1e-6:
        raise SpecError(
            "the fixed initial probabilities are none.",
            details=[f"seen {list(p)}, wanted {len(names)} numbers from 0 on with sum 1"],
            suggestion="initial='uniform'",
        )
    held["initial"] = p
    return "fixed", None
