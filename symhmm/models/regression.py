"""Regressions without time: with random effects of one grouping, and with coefficients of several kinds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from symhmm import fitting
from symhmm.errors import SpecError
from symhmm.fitting import Fit
from symhmm.models.base import Model, Program, Start, assembled, whole_number
from symhmm.models.rows import FAMILIES, Names, Rows, as_frame, check_family, one_regression, read_rows, split_formula
from symhmm.summary import Summary
from symhmm.tables.formula import Formula
from symhmm.tables.results import Table

SCREENED = 20  # random partitions tried by their likelihood
ROUNDS = 10  # of regressions and reassignments for each of them


@dataclass(frozen=True, eq=False)
class RegressionFit(Fit):
    """A fit whose tables call numbers by the names of columns and groups.

    Args:
        names: by the number's name in the program, ``fixed[1]``.
    """

    names: Mapping[str, str] = field(default_factory=dict, repr=False)

    def fixed_effects(self) -> Table:
        """As `Fit.fixed_effects`, with the names of columns."""
        table = self._renamed(super().fixed_effects())
        # Factors of correlations say nothing by themselves: `variance_components` has the correlations.
        return replace(table, rows=tuple(r for r in table.rows if not r[0].startswith("corr[")))

    def random_effects(self, plate: str | None = None) -> Table:
        """As `Fit.random_effects`, with the names of groups and columns."""
        return self._renamed(super().random_effects(plate))

    def summary(self) -> Summary:
        """As `Fit.summary`, with names."""
        text = super().summary().text.replace(repr(super().fixed_effects()), repr(self.fixed_effects()))
        if any(e.plates for e in self.density.layout.entries):
            text = text.replace(repr(super().variance_components()), repr(self.variance_components()))
        return Summary(text)

    def variance_components(self) -> Table:
        """As `Fit.variance_components`, with the names of columns."""
        return self._renamed(super().variance_components())

    def _renamed(self, table: Table) -> Table:
        def new(text: str) -> str:
            return self.names.get(text) or re.sub(r"own\[\d+\]", lambda m: self.names.get(m[0], m[0]), text)

        return replace(table, rows=tuple((new(row[0]), *row[1:]) for row in table.rows))


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
        check_family(self.family)
        if len(self.parts[1].groups) != 1:
            raise SpecError(
                f"a hierarchical regression has one random part, and {self.formula!r} has {len(self.parts[1].groups)}.",
                suggestion="'y ~ x + (1 + x | id)'",
            )

    @property
    def parts(self) -> tuple[str, Formula]:
        """The response and the formula."""
        return split_formula(self.formula)

    @property
    def _correlated(self) -> bool:
        """Whether a group's effects may be correlated; the formula alone tells whether there are several."""
        group = self.parts[1].groups[0]
        alone = re.fullmatch(r"1|(0|-\s*1)\s*\+\s*[\w.]+", group.expr.strip())
        return group.correlated and not alone

    @property
    def program(self) -> Program:
        """``fixed`` (P,), ``sd`` of the response, ``spread`` (Q,) between groups, ``corr`` of the effects, ``own`` (G, Q)."""
        group = self.parts[1].groups[0]
        spread = ['spread = pyro.param("spread", start["spread"], constraints.positive)  # standard deviations']
        if self._correlated:
            spread.append('corr = pyro.param("corr", start["corr"], constraints.corr_cholesky)  # of correlations')
            effects = "dist.MultivariateNormal(torch.zeros_like(spread), scale_tril=spread[:, None] * corr)"
        else:
            effects = "dist.Normal(torch.zeros_like(spread), spread).to_event(1)"
        response = FAMILIES[self.family].format(eta="eta", sd="sd")
        return assembled(
            [
                'fixed = pyro.param("fixed", start["fixed"])',
                *(['sd = pyro.param("sd", start["sd"], constraints.positive)'] if self.family == "gaussian" else []),
                *spread,
                f'with pyro.plate("{group.name}", data.y.shape[1], dim=-1):',
                f'    own = pyro.sample("own", {effects})',
                '    with pyro.plate("row", data.y.shape[0], dim=-2), pyro.poutine.mask(mask=data.seen):',
                "        eta = data.x @ fixed + (data.z * own).sum(-1)",
                f'        pyro.sample("y", {response}, obs=data.y)',
            ]
        )

    def rows(self, data: Any) -> Rows:
        """The table by groups. Raises `DataError`, `SpecError` for columns that are not there, missing or dependent."""
        return self._read(data)[0]

    def _read(self, data: Any) -> tuple[Rows, Names]:
        response, formula = self.parts
        return read_rows(as_frame(data), response, formula, formula.groups[0].by, self.family)

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The rows, and the start."""
        return (self.rows(data), start)

    def start(self, data: Any, seed: int = 0) -> Start:
        """Coefficients of one regression for all groups; effects that explain a third of what it leaves."""
        rows = self.rows(data)
        x, z, y = rows.x[rows.seen], rows.z[rows.seen], rows.y[rows.seen]
        fixed, sd = one_regression(x, y, self.family)
        spread = 0.5 * sd / z.square().mean(0).sqrt().clamp_min(1e-8)
        out = {"fixed": fixed, "spread": spread}
        if self._correlated:
            out["corr"] = torch.eye(len(spread), dtype=torch.float64)
        return out | ({"sd": sd} if self.family == "gaussian" else {})

    def fit(self, data: Any, *, method: str = "laplace", seed: int = 0, **options: Any) -> Fit:
        """Fit the model; ``options`` are those of `symhmm.fit`. Tables of the fit name columns and groups."""
        found, names = super().fit(data, method=method, seed=seed, **options), self._read(data)[1]
        renamed = {f"fixed[{i}]": c for i, c in enumerate(names.fixed)}
        renamed |= {f"spread[{q}]": f"sd of {c}" for q, c in enumerate(names.random)}
        renamed |= {f"own[{q}]": c for q, c in enumerate(names.random)}
        renamed |= {
            f"own[{g}, {q}]": f"{group} {c}" for g, group in enumerate(names.groups) for q, c in enumerate(names.random)
        }
        return RegressionFit(found.estimate, found.density, renamed)


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
        check_family(self.family)
        if self.parts[1].groups:
            raise SpecError(
                f"a mixture of regressions has no random parts, and {self.formula!r} has {self.parts[1].groups[0]}.",
                suggestion="HierarchicalRegression",
            )

    @property
    def parts(self) -> tuple[str, Formula]:
        """The response and the formula."""
        return split_formula(self.formula)

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
        return self._read(data)[0]

    def _read(self, data: Any) -> tuple[Rows, Names]:
        response, formula = self.parts
        return read_rows(as_frame(data), response, formula, (self.by,) if self.by else (), self.family)

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The rows, and the start."""
        return (self.rows(data), start)

    def start(self, data: Any, seed: int = 0) -> Start:
        """Regressions within a random partition of the groups, which is mended by reassigning groups to them."""
        return self._partitioned(self.rows(data), seed)

    def fit(self, data: Any, *, method: str = "mle", seed: int = 0, **options: Any) -> Fit:
        """Fit the model from the most likely of several partitions; see `symhmm.fit` for ``options``."""
        rows, names = self._read(data)
        starts = [self._partitioned(rows, seed + i) for i in range(SCREENED)]
        density = self.log_density(data, start=starts[0])
        with torch.no_grad():
            best = max(starts, key=lambda s: density.log_prob(s).nan_to_num(-torch.inf).item())
        options.setdefault("start", best)
        found = fitting.fit(density, method=method, seed=seed, **options)
        renamed = {
            f"coefficients[{k}, {i}]": f"{c}, component {k}"
            for k in range(self.components)
            for i, c in enumerate(names.fixed)
        }
        return RegressionFit(found.estimate, found.density, renamed)

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
                found.append(one_regression(rows.x[used], rows.y[used], self.family))
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
