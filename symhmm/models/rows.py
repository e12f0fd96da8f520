"""Rows of a regression: a table and a formula as padded tensors by group, and one regression of them as a start."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import DataError, SpecError
from symhmm.tables.data import SequenceData
from symhmm.tables.design import closest, design, group_labels, named_rows
from symhmm.tables.formula import Formula, parse

FAMILIES = {
    "gaussian": "dist.Normal({eta}, {sd})",
    "poisson": "dist.Poisson(({eta}).exp())",
    "bernoulli": "dist.Bernoulli(logits={eta})",
}


@dataclass(frozen=True)
class Rows:
    """Rows of a regression by group, padded.

    Args:
        y: shape (R, G), response; 0 in padding.
        x: shape (R, G, P), columns of the fixed part.
        z: shape (R, G, Q), columns of the random part.
        seen: shape (R, G), bool; False in padding.
    """

    y: Tensor
    x: Tensor
    z: Tensor
    seen: Tensor


@dataclass(frozen=True)
class Names:
    """What the rows of a regression number: labels of the G groups, columns of the fixed and of the random part."""

    groups: tuple[Any, ...]
    fixed: tuple[str, ...]
    random: tuple[str, ...]


def check_family(name: str) -> None:
    """Raise `SpecError` for a family that no regression has."""
    if name not in FAMILIES:
        raise SpecError(
            f"there is no regression of family {name!r}.",
            details=[f"families: {', '.join(FAMILIES)}"],
            suggestion=repr(closest(str(name), list(FAMILIES))),
        )


def split_formula(text: str) -> tuple[str, Formula]:
    """Response and formula of ``y ~ x``. Raises `SpecError`, also for a text without response."""
    response, tilde, right = text.partition("~") if isinstance(text, str) else ("", "", "")
    if not tilde or not response.strip():
        raise SpecError(f"the formula {text!r} has no response.", suggestion="'y ~ x'")
    return response.strip(), parse(f"~ {right}")


def as_frame(data: Any) -> Any:
    """A pandas table with its index as it is."""
    import narwhals

    table = data.frame() if isinstance(data, SequenceData) else data
    try:
        return narwhals.from_native(table, eager_only=True).to_pandas()
    except TypeError as error:
        raise SpecError(f"a {type(data).__name__} is not a table.", suggestion="a pandas or polars table") from error


def read_rows(frame: Any, response: str, formula: Formula, by: tuple[str, ...], family: str) -> tuple[Rows, Names]:
    """Rows by group in the order of the table, and the names of what they number.

    Raises:
        SpecError: a column that is not there, or columns that depend on each other.
        DataError: a covariate is missing, or a response that the family cannot explain; rows are named.
    """
    names = list(map(str, frame.columns))
    for name in (response, *by):
        if name not in names:
            raise SpecError(
                f"the data have no column {name!r}.",
                details=[f"columns: {', '.join(names)}"],
                suggestion=repr(closest(name, names)),
            )
    coded = design(formula, frame)
    y = np.asarray(frame[response].to_numpy(), dtype=float)
    kept = np.isfinite(y)
    impossible = {"poisson": (y < 0) | (y != np.floor(y)), "bernoulli": (y != 0) & (y != 1)}
    wrong = kept & impossible.get(family, np.zeros_like(kept))
    if wrong.any() or not kept.any() or np.isinf(y).any():
        bad = wrong if wrong.any() else np.isinf(y) if np.isinf(y).any() else ~kept
        raise DataError(
            f"column {response!r} has values that the family {family!r} cannot explain.",
            details=[f"rows {named_rows(frame, bad)}"],
            suggestion="another family, or leave these rows out",
        )
    labels = group_labels(frame, by) if by else list(range(len(frame)))
    levels = list(dict.fromkeys(labels))
    place = {label: i for i, label in enumerate(levels)}
    code = np.array([place[label] for label in labels])
    # Place within the group: rows sorted by group, less where their group begins.
    sizes = np.bincount(code)
    order = np.empty(len(y), dtype=np.int64)
    order[np.argsort(code, kind="stable")] = np.arange(len(y)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shape = (int(order.max()) + 1, len(levels))
    x = coded.fixed(frame)
    z = coded.groups[0].coding(frame) if coded.groups else np.zeros((len(y), 0))

    def placed(values: Any) -> Tensor:
        out = torch.zeros(*shape, *values.shape[1:], dtype=torch.float64)
        out[order, code] = torch.as_tensor(values, dtype=torch.float64)
        return out

    return Rows(placed(np.where(kept, y, 0.0)), placed(x), placed(z), placed(kept.astype(float)) > 0), Names(
        tuple(levels), coded.columns, coded.groups[0].coding.columns if coded.groups else ()
    )


def one_regression(x: Tensor, y: Tensor, family: str) -> tuple[Tensor, Tensor]:
    """Coefficients and residual standard deviation of one regression, on the scale of the link."""
    target = {
        "gaussian": y,
        "poisson": torch.log(y + 0.5),
        "bernoulli": torch.where(y > 0, 1.5, -1.5).to(y),
    }[family]
    coefficients = torch.linalg.lstsq(x, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    sd = (target - x @ coefficients).square().mean().sqrt().clamp_min(1e-6)
    return coefficients, sd
