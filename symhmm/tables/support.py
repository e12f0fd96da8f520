"""Supports: which numbers each family of emissions can explain, and which rows of a table hold others."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from symhmm.errors import DataError

# A float32 angle of pi reads as 3.1415927410, a little more than pi.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Support:
    """Numbers that a family of distributions can explain.

    Args:
        text: in words, for messages.
        inside: from values, shape (R,), to bool, shape (R,).
        hint: what to do about values outside.
    """

    text: str
    inside: Callable[[np.ndarray], np.ndarray]
    hint: str


def _whole(x: np.ndarray) -> np.ndarray:
    return x == np.floor(x)


_REAL = Support("real numbers", np.isfinite, "remove or correct them")
_POSITIVE = Support(
    "numbers above 0",
    lambda x: x > 0,
    "a zero-inflated family if zeros are meant, missing if they stand for nothing seen",
)
_NONNEGATIVE = Support("numbers from 0 on", lambda x: x >= 0, "remove or correct them")
_ANGLE = Support(
    "angles from -pi to pi (radians)",
    lambda x: np.abs(x) <= math.pi + ROUNDING,
    "radians, wrapped: (x + pi) % (2 pi) - pi",
)
_OPEN_UNIT = Support(
    "numbers between 0 and 1, both left out",
    lambda x: (x > 0) & (x < 1),
    "zero_one_inflated_beta, or counts with a binomial, if 0 or 1 are meant",
)
_COUNT = Support("whole numbers from 0 on", lambda x: (x >= 0) & _whole(x), "counts, not rates")
_BINARY = Support("0 and 1", lambda x: (x == 0) | (x == 1), "code the two outcomes as 0 and 1")
_CODE = Support("codes 0, 1, 2, ...", lambda x: (x >= 0) & _whole(x), "codes that start at 0, or text")

SUPPORTS: dict[str, Support] = {
    "normal": _REAL,
    "gaussian": _REAL,
    "multivariate_normal": _REAL,
    "student_t": _REAL,
    "laplace": _REAL,
    "gamma": _POSITIVE,
    "lognormal": _POSITIVE,
    "weibull": _POSITIVE,
    "exponential": _NONNEGATIVE,
    "truncated_normal": _NONNEGATIVE,
    "zero_inflated_gamma": _NONNEGATIVE,
    "zero_inflated_lognormal": _NONNEGATIVE,
    "zero_inflated_weibull": _NONNEGATIVE,
    "hurdle_gamma": _NONNEGATIVE,
    "tweedie": _NONNEGATIVE,
    "vonmises": _ANGLE,
    "wrapped_cauchy": _ANGLE,
    "beta": _OPEN_UNIT,
    "zero_inflated_beta": Support("numbers from 0 to 1, 1 left out", lambda x: (x >= 0) & (x < 1), _OPEN_UNIT.hint),
    "one_inflated_beta": Support("numbers from 0 to 1, 0 left out", lambda x: (x > 0) & (x <= 1), _OPEN_UNIT.hint),
    "zero_one_inflated_beta": Support("numbers from 0 to 1", lambda x: (x >= 0) & (x <= 1), "shares, not percent"),
    "poisson": _COUNT,
    "zero_inflated_poisson": _COUNT,
    "negative_binomial": _COUNT,
    "zero_inflated_negative_binomial": _COUNT,
    "geometric": _COUNT,
    "binomial": _COUNT,
    "bernoulli": _BINARY,
    "categorical": _CODE,
}


def support_of(family: Any) -> Support:
    """The support of a family by name, of a torch constraint, or of anything with an attribute ``support``.

    Raises:
        DataError: the name is unknown; close names are suggested.

    >>> support_of("gamma").text
    'numbers above 0'
    """
    if isinstance(family, Support):
        return family
    if isinstance(family, str):
        known = {n.replace("_", ""): x for n, x in SUPPORTS.items()}
        name = family.lower().replace("_", "").replace("-", "").replace(" ", "")
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise DataError(
                f"unknown family of emissions {family!r}.",
                details=[f"known: {', '.join(SUPPORTS)}"],
                suggestion=repr(next(n for n in SUPPORTS if n.replace("_", "") == near[0])) if near else "",
            )
        return known[name]
    constraint = family if hasattr(family, "check") else getattr(family, "support", None)
    if not hasattr(constraint, "check"):
        raise DataError(
            f"{family!r} says nothing about the values it can explain.",
            suggestion="the name of a family, or a constraint of torch.distributions",
        )
    checked: Any = constraint

    def inside(x: np.ndarray) -> np.ndarray:
        found = checked.check(torch.as_tensor(x))
        return np.asarray(found)

    return Support(str(constraint), inside, "another family, or other values")


def check_support(name: str, values: np.ndarray, rows: np.ndarray, family: Any) -> None:
    """Raise if a stream has values that ``family`` gives no density.

    Args:
        name: of the column.
        values: shape (R,), observed values only.
        rows: shape (R,), the rows they came from.
        family: as in `support_of`.

    Raises:
        DataError: naming column, values and rows.
    """
    support = support_of(family)
    outside = ~support.inside(values)
    if outside.any():
        called = f"{family} " if isinstance(family, str) else ""
        raise DataError(
            f"column {name!r} has values outside the support of its {called}emission.",
            details=[values_text(values[outside], rows[outside]), f"wanted {support.text}"],
            suggestion=support.hint,
        )


def rows_text(rows: np.ndarray, most: int = 8) -> str:
    """Numbers of rows for a message.

    >>> rows_text(np.array([3, 5]))
    'rows 3, 5 (counted from 0)'
    """
    shown = ", ".join(str(r) for r in rows[:most].tolist())
    more = f", ...: {len(rows)} in all" if len(rows) > most else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more} (counted from 0)"


def values_text(values: np.ndarray, rows: np.ndarray, most: int = 5) -> str:
    """Values and their rows for a message.

    >>> values_text(np.array([0.0]), np.array([3]))
    'seen 0 in row 3 (counted from 0)'
    """
    kinds = zip(values[:most].tolist(), rows[:most].tolist(), strict=True)
    shown = ", ".join(f"{repr(v) if isinstance(v, str) else format(v, '.6g')} in row {r}" for v, r in kinds)
    more = f", ...: {len(rows)} in all" if len(rows) > most else ""
    return f"seen {shown}{more} (counted from 0)"
