"""Errors of effects beside estimates, against the joint posterior of a normal model."""

import closed_forms as cf
import pytest
import torch
from test_laplace_modes import centred

import symhmm


def test_errors_of_effects_are_those_of_the_mixed_model_equations():
    """Means known up to their common one: the inverse of the joint precision of all of them (Henderson 1975)."""
    y, tau = cf.balanced(), 1.3
    groups, repeats = y.shape
    fit = symhmm.fit(centred, y, method="laplace", restarts=1, fix={"tau": tau})
    precision = torch.zeros(groups + 1, groups + 1, dtype=cf.REAL)
    precision.diagonal()[:groups] = repeats / 4 + tau**-2
    precision[groups, groups] = groups * tau**-2
    precision[:groups, groups] = precision[groups, :groups] = -(tau**-2)
    wanted = torch.linalg.inv(precision).diagonal().sqrt()
    assert fit.random_effects("group")["sd"] == pytest.approx(wanted[:groups].tolist(), rel=1e-6)
    assert float(fit.standard_errors["loc"]) == pytest.approx(float(wanted[groups]) / 1.7, rel=1e-6)
    # What the posterior holds, and shrinkage is measured by, is the error given the rest.
    given = (repeats / 4 + tau**-2) ** -0.5
    assert fit.estimate.posterior.sd[fit.density.layout["d"].start] == pytest.approx(given, rel=1e-6)


def test_a_spread_that_is_estimated_makes_effects_less_certain():
    y = cf.balanced()
    fit = symhmm.fit(centred, y, method="laplace", restarts=1)
    loc, tau = 1.7 * float(fit.values["loc"]), float(fit.values["tau"])
    held = symhmm.fit(centred, y, method="laplace", restarts=1, fix={"tau": tau})
    # The mode moves with the logarithm of the spread by 2 s (1 - s) times the group's distance from the mean.
    share = (4 / y.shape[1]) / (tau**2 + 4 / y.shape[1])
    slope = 2 * share * (1 - share) * (y.mean(1) - loc)
    more = slope * float(fit.standard_errors["tau"]) / tau
    wanted = (torch.tensor(held.random_effects("group")["sd"], dtype=cf.REAL) ** 2 + more**2).sqrt()
    assert fit.random_effects("group")["sd"] == pytest.approx(wanted.tolist(), rel=1e-3)


def test_effects_of_a_spread_at_zero_are_as_uncertain_as_their_mean():
    y = cf.balanced()
    fit = symhmm.fit(centred, y - y.mean(1, keepdim=True) + 5.0, method="laplace", restarts=1)
    wanted = 2.0 / y.numel() ** 0.5
    assert fit.random_effects("group")["sd"] == pytest.approx([wanted] * len(y), rel=1e-4)
