"""Effects: tables of fixed and random effects, made from what a fit knows of its values and their uncertainty."""

from collections.abc import Mapping
from math import nan
from typing import Any, Protocol

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.infer.information import Information, interval
from symhmm.tables.results import Estimate, Table, label


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
    def n_observations(self) -> int:
        """Observed values."""


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
        elif e.name in draws and not e.is_param:
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
        names = label(e.name, e.shape)
        if e.name in fit.posterior_draws and e.name not in fit.estimate.fixed:
            numbers = _describe(fit.posterior_draws[e.name])
        else:
            numbers = [(v, nan, nan, nan) for v in fit.estimate.values[e.name].reshape(-1).tolist()]
        rows += [(n, *row, ", ".join(e.plates)) for n, row in zip(names, numbers, strict=True)]
    return Table(("name", "estimate", "sd", "2.5%", "97.5%", "plate"), tuple(rows))


def variances(fit: Fitted) -> Table:
    """Spread of the random effects between members, one row per effect."""
    rows: list[tuple[Any, ...]] = []
    for e in fit.density.layout.entries:
        if not e.plates:
            continue
        event = fit.density.graph.latents[e.name].event_dim
        members = [len(e.shape) - event + d for d in e.plates.values()]
        n = torch.Size(e.shape[i] for i in members).numel()
        draws = fit.posterior_draws.get(e.name, fit.estimate.values[e.name][None])
        mean = draws.mean(0)
        between = mean.var(members, correction=0).reshape(-1)
        total = (between + draws.var(0, correction=0).mean(members).reshape(-1)).sqrt()
        left = [s for i, s in enumerate(e.shape) if i not in members]
        for name, b, t in zip(label(e.name, left), between.sqrt().tolist(), total.tolist(), strict=True):
            rows.append((name, ", ".join(e.plates), n, b, t if fit.estimate.posterior else nan))
    return Table(("effect", "plate", "members", "sd of estimates", "total sd"), tuple(rows))


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


def _describe(draws: Tensor) -> list[tuple[float, ...]]:
    flat = draws.reshape(draws.shape[0], -1)
    low, high = flat.quantile(torch.tensor([0.025, 0.975], dtype=flat.dtype), dim=0)
    return list(zip(*(x.tolist() for x in (flat.mean(0), flat.std(0), low, high)), strict=True))
