"""Regressions without time: with random effects of one grouping, and with coefficients of several kinds."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from symhmm import fitting
from symhmm.errors import DataError, SpecError
from symhmm.fitting import Fit
from symhmm.models.base import Model, Program, Start, assembled, whole_number
from symhmm.tables.data import SequenceData
from symhmm.tables.design import closest, design, group_labels, named_rows
from symhmm.tables.formula import Formula, parse

FAMILIES = {
    "gaussian": "dist.Normal({eta}, {sd})",
    "poisson": "dist.Poisson(({eta}).exp())",
    "bernoulli": "dist.Bernoulli(logits={eta})",
}
SCREENED = 20  # random partitions tried by their likelihood
ROUNDS = 10  # of regressions and reassignments for each of them


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
class HierarchicalRegression(Model):
    """Regression whose coefficients differ between groups: a (generalised) linear mixed model with one grouping.

    Args:
        formula: response and predictors, ``"Reaction ~ Days + (Days | Subject)"``; ``||`` for effects without correlation.
        family: ``gaussian`` (identity link), ``poisson`` (log link) or ``bernoulli`` (logit link).

    Raises:
        SpecError: a formula without response, or with none or several random parts; an unknown family.

    Data are tables (pandas, or `SequenceData`, whose streams and covariates are columns). ``fit`` integrates the effects by
    Laplace's method, which is exact for the Gaussian family.

    >>> HierarchicalRegression("y ~ x + (1 | id)").formula
    'y ~ x + (1 | id)'
    """

    formula: str
    family: Literal["gaussian", "poisson", "bernoulli"] = "gaussian"

    def __post_init__(self) -> None:
        _check_family(self.family)
        if len(self.parts[1].groups) != 1:
            raise SpecError(
                f"a hierarchical regression has one random part, and {self.formula!r} has {len(self.parts[1].groups)}.",
                suggestion="'y ~ x + (1 + x | id)'",
            )

    @property
    def parts(self) -> tuple[str, Formula]:
        """The response and the formula."""
        return _split(self.formula)

    @property
    def program(self) -> Program:
        """``fixed`` (P,), ``sd`` of the response, ``spread`` between groups (a Cholesky factor, or sds), ``own`` (G, Q)."""
        group = self.parts[1].groups[0]
        if group.correlated:
            spread = 'spread = pyro.param("spread", start["spread"], constraints.lower_cholesky)  # Cholesky factor'
            effects = "dist.MultivariateNormal(torch.zeros_like(spread[0]), scale_tril=spread)"
        else:
            spread = 'spread = pyro.param("spread", start["spread"], constraints.positive)  # standard deviations'
            effects = "dist.Normal(torch.zeros_like(spread), spread).to_event(1)"
        response = FAMILIES[self.family].format(eta="eta", sd="sd")
        return assembled(
            [
                'fixed = pyro.param("fixed", start["fixed"])',
                *(['sd = pyro.param("sd", start["sd"], constraints.positive)'] if self.family == "gaussian" else []),
                spread,
                f'with pyro.plate("{group.name}", data.y.shape[1], dim=-1):',
                f'    own = pyro.sample("own", {effects})',
                '    with pyro.plate("row", data.y.shape[0], dim=-2), pyro.poutine.mask(mask=data.seen):',
                "        eta = data.x @ fixed + (data.z * own).sum(-1)",
                f'        pyro.sample("y", {response}, obs=data.y)',
            ]
        )

    def rows(self, data: Any) -> Rows:
        """The table by groups. Raises `DataError`, `SpecError` for columns that are not there, missing or dependent."""
        response, formula = self.parts
        return _rows(_frame(data), response, formula, formula.groups[0].by, self.family)[0]

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The rows, and the start."""
        return (self.rows(data), start)

    def start(self, data: Any, seed: int = 0) -> Start:
        """Coefficients of one regression for all groups; effects that explain a third of what it leaves."""
        rows = self.rows(data)
        x, z, y = rows.x[rows.seen], rows.z[rows.seen], rows.y[rows.seen]
        fixed, sd = _regression(x, y, self.family)
        spread = 0.5 * sd / z.square().mean(0).sqrt().clamp_min(1e-8)
        out = {"fixed": fixed, "spread": spread.diag() if self.parts[1].groups[0].correlated else spread}
        return out | ({"sd": sd} if self.family == "gaussian" else {})

    def fit(self, data: Any, *, method: str = "laplace", seed: int = 0, **options: Any) -> Fit:
        """Fit the model; ``options`` are those of `symhmm.fit`."""
        return super().fit(data, method=method, seed=seed, **options)


@dataclass(frozen=True)
class MixtureOfRegressions(Model):
    """Regression with C kinds of coefficients; which kind a row follows is summed out.

    Args:
        components: C.
        formula: response and predictors, ``"y ~ x"``.
        family: ``gaussian`` (identity link), ``poisson`` (log link) or ``bernoulli`` (logit link).
        by: a column whose groups follow one kind as a whole; by default each row is a group of its own.

    Raises:
        SpecError: no such number of components, a formula without response or with random parts, an unknown family.

    >>> print(MixtureOfRegressions(2, "y ~ x").program_source().splitlines()[-2].strip())
    eta = (data.x * coefficients[component]).sum(-1)
    """

    components: int
    formula: str
    family: Literal["gaussian", "poisson", "bernoulli"] = "gaussian"
    by: str | None = None

    def __post_init__(self) -> None:
        whole_number("components", self.components, 1)
        _check_family(self.family)
        if self.parts[1].groups:
            raise SpecError(
                f"a mixture of regressions has no random parts, and {self.formula!r} has {self.parts[1].groups[0]}.",
                suggestion="HierarchicalRegression",
            )

    @property
    def parts(self) -> tuple[str, Formula]:
        """The response and the formula."""
        return _split(self.formula)

    @property
    def program(self) -> Program:
        """``weights`` (C,), ``coefficients`` (C, P), ``sd`` (C,) of the response."""
        response = FAMILIES[self.family].format(eta="eta", sd="sd[component]")
        return assembled(
            [
                'weights = pyro.param("weights", start["weights"], constraints.simplex)',
                'coefficients = pyro.param("coefficients", start["coefficients"])  # [component, column]',
                *(['sd = pyro.param("sd", start["sd"], constraints.positive)'] if self.family == "gaussian" else []),
                f'with pyro.plate("{self.by or "individual"}", data.y.shape[1], dim=-1):',
                '    component = pyro.sample("component", dist.Categorical(weights))',
                '    with pyro.plate("row", data.y.shape[0], dim=-2), pyro.poutine.mask(mask=data.seen):',
                "        eta = (data.x * coefficients[component]).sum(-1)",
                f'        pyro.sample("y", {response}, obs=data.y)',
            ]
        )

    def rows(self, data: Any) -> Rows:
        """The table by groups. Raises `DataError`, `SpecError` for columns that are not there, missing or dependent."""
        response, formula = self.parts
        return _rows(_frame(data), response, formula, (self.by,) if self.by else (), self.family)[0]

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The rows, and the start."""
        return (self.rows(data), start)

    def start(self, data: Any, seed: int = 0) -> Start:
        """Regressions within a random partition of the groups, which is mended by reassigning groups to them."""
        return self._partitioned(self.rows(data), seed)

    def fit(self, data: Any, *, method: str = "mle", seed: int = 0, **options: Any) -> Fit:
        """Fit the model from the most likely of several partitions; see `symhmm.fit` for ``options``."""
        rows = self.rows(data)
        starts = [self._partitioned(rows, seed + i) for i in range(SCREENED)]
        density = self.log_density(data, start=starts[0])
        with torch.no_grad():
            best = max(starts, key=lambda s: density.log_prob(s).nan_to_num(-torch.inf).item())
        options.setdefault("start", best)
        return fitting.fit(density, method=method, seed=seed, **options)

    def _partitioned(self, rows: Rows, seed: int) -> Start:
        generator = torch.Generator().manual_seed(seed)
        groups, count = rows.y.shape[1], self.components
        label = torch.randint(count, (groups,), generator=generator)
        for _ in range(ROUNDS):
            found = []
            for k in range(count):
                own = rows.seen & (label == k)
                # A kind with too few rows starts again from all of them.
                used = own if int(own.sum()) > rows.x.shape[-1] + 1 else rows.seen
                found.append(_regression(rows.x[used], rows.y[used], self.family))
            coefficients, sd = torch.stack([b for b, _ in found]), torch.stack([s for _, s in found])
            eta = rows.x @ coefficients.mT
            y = rows.y.unsqueeze(-1)
            score = {
                "gaussian": -0.5 * ((y - eta) / sd).square() - sd.log(),
                "poisson": y * eta - eta.exp(),
                "bernoulli": y * eta - torch.nn.functional.softplus(eta),
            }[self.family]
            label = (score * rows.seen.unsqueeze(-1)).sum(0).argmax(-1)
        shares = torch.bincount(label, minlength=count).to(rows.y) + 1
        out = {"weights": shares / shares.sum(), "coefficients": coefficients}
        return out | ({"sd": sd} if self.family == "gaussian" else {})


def _check_family(name: str) -> None:
    if name not in FAMILIES:
        raise SpecError(
            f"there is no regression of family {name!r}.",
            details=[f"families: {', '.join(FAMILIES)}"],
            suggestion=repr(closest(str(name), list(FAMILIES))),
        )


def _split(text: str) -> tuple[str, Formula]:
    response, tilde, right = text.partition("~") if isinstance(text, str) else ("", "", "")
    if not tilde or not response.strip():
        raise SpecError(f"the formula {text!r} has no response.", suggestion="'y ~ x'")
    return response.strip(), parse(f"~ {right}")


def _frame(data: Any) -> Any:
    """A pandas table with its index as it is."""
    import narwhals

    table = data.frame() if isinstance(data, SequenceData) else data
    try:
        return narwhals.from_native(table, eager_only=True).to_pandas()
    except TypeError as error:
        raise SpecError(f"a {type(data).__name__} is not a table.", suggestion="a pandas or polars table") from error


def _rows(frame: Any, response: str, formula: Formula, by: tuple[str, ...], family: str) -> tuple[Rows, list[Any]]:
    """Rows by group in the order of the table, and the groups' labels."""
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

    return Rows(placed(np.where(kept, y, 0.0)), placed(x), placed(z), placed(kept.astype(float)) > 0), levels


def _regression(x: Tensor, y: Tensor, family: str) -> tuple[Tensor, Tensor]:
    """Coefficients and residual standard deviation of one regression, on the scale of the link."""
    target = {
        "gaussian": y,
        "poisson": torch.log(y + 0.5),
        "bernoulli": torch.where(y > 0, 1.5, -1.5).to(y),
    }[family]
    coefficients = torch.linalg.lstsq(x, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
    sd = (target - x @ coefficients).square().mean().sqrt().clamp_min(1e-6)
    return coefficients, sd
