import closed_forms as cf
import numpy as np
import pytest

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.infer.starts import draw_starts, jitter_sizes, scales, units
from symhmm.infer.target import target


def goal(program, *args):
    return target(compile(program, *args), {}, "mle")


def test_scale_is_the_standard_error_of_one_observation():
    y = cf.sample(50)
    g = goal(cf.gaussian, y)
    at = g.density.pack({"loc": y.mean(), "sd": y.std(correction=0)}).numpy()
    sd = float(y.std(correction=0))
    # Fisher information of a normal sample: 1 / sd^2 for the mean, 2 for log sd.
    assert scales(g.evaluate, at, 50).tolist() == pytest.approx([sd, 0.5**0.5], rel=1e-3)


def test_unknown_curvature_gives_one():
    assert scales(lambda x: (0.0, 0 * x), np.zeros(3), 10).tolist() == [1.0, 1.0, 1.0]


def height(g):
    return lambda x: g.evaluate(x)[0]


def test_starts_are_seeded_and_the_first_is_the_programs_own():
    g = goal(cf.gaussian, cf.sample())
    first, second, other = (draw_starts(height(g), g.x, np.ones(2), 4, seed=s) for s in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[1], other[1])
    assert np.abs(first[0] - g.x).max() < 0.1
    assert not np.array_equal(first[0], g.x)


def test_jittered_starts_are_the_best_of_many_and_take_turns_in_size():
    g = goal(cf.mixture, cf.two_lumps())
    few, many = (draw_starts(height(g), g.x, np.full(2, 3.0), 4, seed=0, screen=n) for n in (1, 40))
    values = [[g.evaluate(s)[0] for s in starts] for starts in (few, many)]
    assert all(m > f for f, m in zip(values[0][1:], values[1][1:], strict=True))
    free = draw_starts(lambda x: 0.0, np.zeros(2000), np.ones(2000), 4, seed=0, screen=1)
    assert [s.std() for s in free] == pytest.approx([0.01, 0.5, 1.0, 0.25], rel=0.1)


def test_points_that_are_not_finite_are_passed_over():
    def half(x):
        return -float(x @ x) if x[0] > 0.5 else float("nan")

    starts = draw_starts(half, np.zeros(2), np.ones(2), 3, seed=0)
    assert len(starts) >= 2
    assert all(np.isfinite(half(s)) for s in starts)
    none = draw_starts(lambda x: -np.inf, np.zeros(2), np.ones(2), 3, seed=0)
    assert len(none) == 1


def test_jitter_by_name():
    g = goal(cf.gaussian, cf.sample())
    assert jitter_sizes(g, 0.5).tolist() == [0.5, 0.5]
    assert jitter_sizes(g, {"sd": 2.0}).tolist() == [0.0, 2.0]
    with pytest.raises(FitError, match="fitted: loc, sd"):
        jitter_sizes(g, {"scale": 1.0})


def test_units_are_the_scale_of_real_values_and_at_most_one_of_logarithms():
    g = goal(cf.gaussian, cf.sample())
    assert units(g, np.array([30.0, 4.0])).tolist() == [30.0, 1.0]
    assert units(g, np.array([0.2, 0.3])).tolist() == [0.2, 0.3]
