"""Effects: tables of fixed and random effects, made from what a fit knows of its values and their uncertainty."""

from collections.abc import Callable, Mapping
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributions import constraints

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.infer.information import Information, interval
from symhmm.tables.results import Drawable, Estimate, Table, label


class Fitted(Protocol):
    """What the tables read of a fit."""

    @property
    def estimate(self) -> Estimate:
        """Values, objective, posterior."""

    @property
    def density(self) -> Density:
        """What was fitted."""

    @property
    def information(self) -> Information | None:
        """Observed information of the points, where it is known."""

    @property
    def standard_errors(self) -> Mapping[str, Tensor]:
        """Of the points by name, from the information; empty without one."""

    @property
    def posterior_draws(self) -> Mapping[str, Tensor]:
        """Constrained values by name, shape (draws, *shape); empty without a posterior."""

    @property
    def effect_errors(self) -> Tensor | None:
        """Standard errors of integrated effects, unconstrained, shape (size,)."""

    @property
    def n_observations(self) -> int:
        """Observed values."""

    def delta(self, f: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """Standard errors of a function of the values, from the information."""


def fixed_effects(fit: Fitted) -> Table:
    """Parameters and latents outside every plate: estimate, standard error, 95 percent interval, natural scale."""
    errors, draws, values = fit.standard_errors, fit.posterior_draws, fit.estimate.values
    rows: list[tuple[Any, ...]] = []
    for e in fit.density.layout.entries:
        if e.plates:
            continue
        value, names = values[e.name].reshape(-1).tolist(), label(e.name, e.shape)
        if e.name in fit.estimate.fixed:
            rows += [(n, v, nan, nan, nan, "fixed") for n, v in zip(names, value, strict=True)]
        elif e.name in draws and bool((draws[e.name] != draws[e.name][0]).any()):
            rows += [(n, *row, e.role) for n, row in zip(names, _describe(draws[e.name]), strict=True)]
        else:
            se = errors[e.name].reshape(-1).tolist() if e.name in errors else [nan] * len(value)
            rows += [(n, v, s, *interval(v, s, e.constraint), e.role) for n, v, s in zip(names, value, se, strict=True)]
    return Table(("name", "estimate", "se", "2.5%", "97.5%", "role"), tuple(rows))


def random_effects(fit: Fitted, plate: str | None = None) -> Table:
    """Effects of each member of ``plate`` (of all plates if None) with their uncertainty, one row per number.

    Raises:
        FitError: the program has no random effects of that plate.
    """
    rows: list[tuple[Any, ...]] = []
    for e in _effects(fit, plate):
        names, posterior = label(e.name, e.shape), fit.estimate.posterior
        numbers: list[tuple[float, ...]]
        if e.name in fit.estimate.fixed or posterior is None:
            numbers = [(v, nan, nan, nan) for v in fit.estimate.values[e.name].reshape(-1).tolist()]
        elif _is_real(e.constraint) and fit.estimate.integrated:
            # Normal around the mode, so that nothing needs to be drawn.
            sd = posterior.sd if fit.effect_errors is None else fit.effect_errors
            at = zip(posterior.vector[e.start : e.stop].tolist(), sd[e.start : e.stop].tolist(), strict=True)
            numbers = [(v, s, *interval(v, s, e.constraint)) for v, s in at]
        else:
            numbers = _describe(fit.posterior_draws[e.name])
        rows += [(n, *row, ", ".join(e.plates)) for n, row in zip(names, numbers, strict=True)]
    return Table(("name", "estimate", "sd", "2.5%", "97.5%", "plate"), tuple(rows))


def uncertain_effects(fit: Fitted, plate: str | None = None) -> Drawable:
    """The posterior of the effects of ``plate``.

    Raises:
        FitError: there are no such effects, or the fit does not know how uncertain they are.
    """
    _effects(fit, plate)
    if fit.estimate.posterior is None:
        raise FitError(
            f"method={fit.estimate.method!r} does not say how uncertain the random effects are.",
            suggestion="method='laplace' or method='svi'",
        )
    return fit.estimate.posterior


def _effects(fit: Fitted, plate: str | None) -> list[Entry]:
    entries = [e for e in fit.density.layout.entries if e.plates and (plate is None or plate in e.plates)]
    if not entries:
        plates = sorted({p for e in fit.density.layout.entries for p in e.plates})
        raise FitError(
            f"there are no random effects{f' of plate {plate!r}' if plate else ''}.",
            details=[f"plates with random effects: {', '.join(plates) or 'none'}"],
            suggestion="a continuous pyro.sample inside a pyro.plate is one",
        )
    return entries


def _is_real(constraint: constraints.Constraint) -> bool:
    """Whether any numbers may stand in each place, so that coordinates are values."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real


def _describe(draws: Tensor) -> list[tuple[float, ...]]:
    flat = draws.reshape(draws.shape[0], -1)
    low, high = flat.quantile(torch.tensor([0.025, 0.975], dtype=flat.dtype), dim=0)
    return list(zip(*(x.tolist() for x in (flat.mean(0), flat.std(0), low, high)), strict=True))
