"""L-BFGS on hills whose top is known, on cliffs, under rounding, and cut short."""

import numpy as np
import pytest

from symhmm.infer.lbfgs import ascend


def rosenbrock(x):
    a, b = x[1:] - x[:-1] ** 2, 1 - x[:-1]
    slope = np.zeros_like(x)
    slope[:-1] += 400 * x[:-1] * a + 2 * b
    slope[1:] -= 200 * a
    return -float(100 * a @ a + b @ b), slope


def counts(x):
    """Poisson counts k * 1000 with log rates x; the top is at log(1000 k)."""
    k = 1e3 * np.arange(1, x.size + 1)
    return float((k * x - np.exp(x)).sum()), k - np.exp(x)


def bounded(x):
    """Gamma with a natural scale: nothing is defined at negative x."""
    return (float(np.log(x[0]) - x[0]), 1 / x - 1) if x[0] > 0 else (float("nan"), np.full(1, np.nan))


@pytest.mark.parametrize(
    ("hill", "start", "top", "most"),
    [
        (rosenbrock, np.array([-1.2, 1.0]), np.ones(2), 60),
        (rosenbrock, np.full(10, -1.0), np.ones(10), 110),
        (counts, np.zeros(6), np.log(1e3 * np.arange(1, 7)), 40),
        (counts, np.full(6, -30.0), np.log(1e3 * np.arange(1, 7)), 80),
        (bounded, np.array([30.0]), np.ones(1), 30),
        (bounded, np.array([1e-3]), np.ones(1), 30),
    ],
)
def test_the_top_is_found_in_few_evaluations(hill, start, top, most):
    ascent = ascend(hill, start)
    assert ascent.converged
    assert ascent.gain <= 1e-5
    assert ascent.x == pytest.approx(top, rel=1e-4)
    assert len(ascent.trace) <= most
    assert ascent.value == max(v for v in ascent.trace if np.isfinite(v))


def test_units_take_the_place_of_scales():
    scale = 10.0 ** np.arange(-4, 5)
    ascent = ascend(lambda x: (-0.5 * float(((x / scale) ** 2).sum()), -x / scale**2), scale.copy(), unit=scale)
    assert ascent.converged
    assert len(ascent.trace) <= 6
    assert np.abs(ascent.x / scale).max() < 1e-6


@pytest.mark.parametrize("digits", [3, 5, 7])
def test_rounding_ends_a_climb_and_is_no_failure(digits):
    def rough(x):
        value, slope = counts(x)
        return float(np.round(value, digits)), slope

    value = counts(np.log(1e3 * np.arange(1, 7)))[0]
    ascent = ascend(rough, np.zeros(6), precision=10.0**-digits / value)
    assert ascent.converged
    assert ascent.value == pytest.approx(value, abs=64 * 10.0**-digits)
    assert len(ascent.trace) < 150


def test_a_plain_and_an_endless_slope():
    flat = ascend(lambda x: (0.0, 0 * x), np.ones(2))
    assert flat.converged
    assert len(flat.trace) <= 2
    endless = ascend(lambda x: (float(x.sum()), np.ones_like(x)), np.zeros(2), max_evaluations=50)
    assert not endless.converged
    assert len(endless.trace) == 50


def test_a_start_that_is_not_finite_and_one_cut_short():
    nowhere = ascend(bounded, np.array([-1.0]))
    assert not nowhere.converged
    assert nowhere.value == -np.inf
    seen = []

    def interrupted(x):
        seen.append(x)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return rosenbrock(x)

    cut = ascend(interrupted, np.array([-1.2, 1.0]))
    assert cut.interrupted
    assert len(cut.trace) == 3
    assert cut.value == max(cut.trace)
