"""Design matrices: the columns that a formula makes of covariates, in a coding that repeats itself on new data."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symhmm.errors import DataError, SpecError
from symhmm.tables.formula import Formula, Group, parse

Array = NDArray[np.float64]

# What formulas may call besides the transformations of formulae (scale, center, standardize, bs, poly, C, I, ...).
FUNCTIONS: dict[str, Any] = {
    "np": np,
    **{
        name: getattr(np, name) for name in ("abs", "cos", "exp", "log", "log10", "log1p", "log2", "sin", "sqrt", "tan")
    },
}
SHOWN = 5  # rows that a message names
RANK_TOLERANCE = 1e-9  # of a column's length that must be left when the columns before it are projected out


@dataclass(frozen=True, eq=False)
class Coding:
    """Columns made from covariates, with what was learned from the first data: levels, means, knots.

    Args:
        expr: in the language of formulae.
        columns: names of the P columns, ``temp``, ``sex[m]``, ``bs(temp, df=4)[0]``.
        variables: the columns of the table that it reads.
    """

    expr: str
    columns: tuple[str, ...]
    variables: tuple[str, ...]
    _common: Any = field(repr=False)

    @property
    def constant(self) -> bool:
        """Whether it is an intercept alone."""
        return self.columns == ("Intercept",)

    def __call__(self, frame: Any, what: str = "formula") -> Array:
        """Shape (R, P): the columns for the R rows of a pandas table.

        Raises:
            DataError: a column is not there, has a missing value, or has a level that the first data did not have.
        """
        if self._common is None or self.constant:
            return np.ones((len(frame), len(self.columns)))
        _check_columns(frame, self.variables, what)
        try:
            matrix = self._common.evaluate_new_data(frame[list(self.variables)].reset_index(drop=True)).design_matrix
        except ValueError as error:
            raise DataError(
                f"the {what} cannot be evaluated on these data.",
                details=[f"'{self.expr}': {error}"],
                suggestion="use the levels of the data that the model was fitted to, or fit it to both",
            ) from error
        return _finite(np.asarray(matrix, dtype=float), self.columns, frame, what)


@dataclass(frozen=True, eq=False)
class GroupDesign:
    """A random part with its data: Q columns and G groups.

    Args:
        group: the random part.
        coding: of its Q columns.
        levels: label of each group; of tuples for combinations.
    """

    group: Group
    coding: Coding
    levels: tuple[Any, ...]

    @cached_property
    def _place(self) -> dict[Any, int]:
        return {label: i for i, label in enumerate(self.levels)}

    def codes(self, frame: Any, what: str = "formula") -> NDArray[np.int64]:
        """Shape (R,): the number of each row's group; -1 for a group that is not among ``levels``."""
        _check_columns(frame, self.group.by, what)
        return np.array([self._place.get(label, -1) for label in group_labels(frame, self.group.by)], dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Design:
    """A formula with its coding: fixed columns and random parts.

    >>> import pandas as pd
    >>> d = design("~ x + (1 | id)", pd.DataFrame({"x": [1.0, 2.0, 4.0], "id": ["a", "a", "b"]}))
    >>> d.columns, d.groups[0].levels, d.fixed(pd.DataFrame({"x": [3.0]}))
    (('Intercept', 'x'), ('a', 'b'), array([[1., 3.]]))
    """

    formula: Formula
    fixed: Coding
    groups: tuple[GroupDesign, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the fixed columns."""
        return self.fixed.columns

    def __repr__(self) -> str:
        parts = [f"{g.group} with {len(g.levels)} groups" for g in self.groups]
        return f"Design({self.formula}: {', '.join([*self.columns, *parts])})"


def design(formula: str | Formula, frame: Any, what: str = "formula") -> Design:
    """Learn the coding of a formula from a table.

    Args:
        formula: a text, see `symhmm.tables.formula.parse`, or one taken apart already.
        frame: pandas table, one row per step; numbers are used as they are, texts and categories as treatment contrasts.
        what: whose formula it is, for messages.

    Raises:
        SpecError: the formula cannot be read, names a column or a function that is not there, or its columns depend on
            each other.
        DataError: a covariate is missing in some rows.
    """
    f = parse(formula, what) if isinstance(formula, str) else formula
    fixed, x = _code(f.fixed, frame, what)
    _check_rank(fixed, x, what)
    groups = []
    for g in f.groups:
        _check_columns(frame, g.by, what, SpecError)
        _check_group(frame, g, what)
        coding, z = _code(g.expr, frame, what)
        _check_rank(coding, z, what)
        if not coding.columns:
            raise SpecError(
                f"a random part of the {what} has no effect.", details=[f"seen {g}"], suggestion=f"(1 | {g.name})"
            )
        levels = tuple(dict.fromkeys(group_labels(frame, g.by)))
        if len(levels) < 2:
            raise SpecError(
                f"a random part of the {what} has a single group, and nothing to tell its spread from.",
                details=[f"seen {g}, whose only group is {levels[0]!r}" if levels else f"seen {g} without data"],
                suggestion="leave it out, or fit several individuals",
            )
        groups.append(GroupDesign(g, coding, levels))
    if not fixed.columns and not groups:
        raise SpecError(f"the {what} has nothing in it.", details=[f"seen '{f}'"], suggestion="'~ 1' for an intercept")
    return Design(f, fixed, tuple(groups))


def group_labels(frame: Any, by: Sequence[str]) -> list[Any]:
    """Label of each row's group: the value of one column, or a tuple of several."""
    columns = [frame[name].tolist() for name in by]
    return columns[0] if len(by) == 1 else list(zip(*columns, strict=True))


def named_rows(frame: Any, bad: NDArray[np.bool_]) -> str:
    """The first few rows of ``frame`` (by its index) where ``bad`` holds, for messages."""
    rows = frame.index[bad].tolist()
    return ", ".join(map(str, rows[:SHOWN])) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def closest(name: str, known: Sequence[str]) -> str:
    """The name of ``known`` nearest to ``name``, in whatever case, or the first."""
    lower = {k.lower(): k for k in reversed(known)}
    found = difflib.get_close_matches(name.lower(), list(lower), 1, 0.4)
    return lower[found[0]] if found else next(iter(known), "")


def _code(expr: str, frame: Any, what: str) -> tuple[Coding, Array]:
    """The coding of an expression, and its columns on the table from which it was learned."""
    from formulae.environment import Environment
    from formulae.matrices import DesignMatrices
    from formulae.model_description import model_description
    from formulae.parser import ParseError
    from formulae.resolver import ResolverError
    from formulae.scanner import ScanError

    try:
        description = model_description(expr)
    except (ParseError, ResolverError, ScanError, ValueError, TypeError) as error:
        raise SpecError(
            f"the {what} cannot be read.", details=[f"'{expr}': {error}"], suggestion="'~ x + z + x:z', or '~ 1'"
        ) from error
    variables = tuple(sorted(v for v in description.var_names if v))  # keyword arguments leave an empty name
    _check_columns(frame, variables, what, SpecError)
    used = frame[list(variables)].reset_index(drop=True) if variables else frame.iloc[:, :0].assign(_rows=0.0)
    _check_missing(frame, variables, what)
    try:
        common = DesignMatrices(description, used, Environment([FUNCTIONS])).common
    except (KeyError, AttributeError) as error:
        raise SpecError(
            f"the {what} calls a function that is not there.",
            details=[f"'{expr}': {error}"],
            suggestion="scale, center, bs, poly, C, I, log, exp, sqrt, or one of numpy's as np.<name>",
        ) from error
    except (ValueError, TypeError) as error:
        raise SpecError(
            f"the {what} cannot be evaluated.", details=[f"'{expr}': {error}"], suggestion="'~ x'"
        ) from error
    if common is None:
        return Coding(expr, (), variables, None), np.zeros((len(frame), 0))
    columns: list[str] = []
    for name, term in common.terms.items():
        columns += [name] if isinstance(term.labels, str) or term.labels is None else list(term.labels)
    coding = Coding(expr, tuple(columns), variables, common)
    matrix = np.asarray(common.design_matrix, dtype=float).reshape(len(frame), -1)
    return coding, _finite(matrix, coding.columns, frame, what)


def _check_columns(
    frame: Any, names: Sequence[str], what: str, error: type[DataError] | type[SpecError] = DataError
) -> None:
    known = list(map(str, frame.columns))
    for name in names:
        if name not in known:
            raise error(
                f"the {what} names a column that is not in the data: {name!r}.",
                details=[f"covariates and groups: {', '.join(known) or 'none'}"],
                suggestion=f"{closest(name, known)!r}, or list {name!r} in covariates= or groups= when the data are read",
            )


def _check_missing(frame: Any, names: Sequence[str], what: str) -> None:
    for name in names:
        bad = frame[name].isna().to_numpy()
        if bad.any():
            raise DataError(
                f"covariate {name!r} of the {what} is missing in {int(bad.sum())} of {len(frame)} rows.",
                details=[f"rows {named_rows(frame, bad)}"],
                suggestion="read the data with missing_covariates='carry' or 'interpolate', or leave these rows out",
            )


def _check_group(frame: Any, g: Group, what: str) -> None:
    for name in g.by:
        bad = frame[name].isna().to_numpy()
        if bad.any():
            raise DataError(
                f"group {name!r} of the {what} is missing in {int(bad.sum())} of {len(frame)} rows.",
                details=[f"rows {named_rows(frame, bad)}"],
                suggestion="give these rows a group, or leave them out",
            )


def _finite(matrix: Array, columns: Sequence[str], frame: Any, what: str) -> Array:
    bad = ~np.isfinite(matrix)
    if bad.any():
        first = int(bad.any(0).argmax())
        raise DataError(
            f"column {columns[first]!r} of the {what} is not finite in {int(bad[:, first].sum())} rows.",
            details=[f"rows {named_rows(frame, bad[:, first])}"],
            suggestion="mend the covariate, or read the data with a policy for missing values",
        )
    return matrix


def _check_rank(coding: Coding, matrix: Array, what: str) -> None:
    """Refuse a column that is a combination of those before it."""
    kept: list[int] = []
    for i, name in enumerate(coding.columns):
        before, column = matrix[:, kept], matrix[:, i]
        # Columns of length one: no unit of measurement makes a dependence look small.
        lengths = np.maximum(np.linalg.norm(before, axis=0), np.finfo(float).tiny)
        length = np.linalg.norm(column)
        share = np.linalg.lstsq(before / lengths, column / (length or 1.0), rcond=None)[0]
        if np.linalg.norm(column / (length or 1.0) - before / lengths @ share) <= RANK_TOLERANCE:
            used = [coding.columns[k] for k, c in zip(kept, share, strict=True) if abs(c) > RANK_TOLERANCE]
            raise SpecError(
                f"the design of the {what} has too low a rank: column {name!r} depends on others.",
                details=[f"it is a combination of {', '.join(map(repr, used))}" if used else "it is 0 in all rows"],
                suggestion=f"leave {name!r} out",
            )
        kept.append(i)
