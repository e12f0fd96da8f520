"""What an iteration of EM reads, replayed from a recording, against derivatives of the program's own expected log-density."""

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_em import class_mixture, crossing, gamma_mixture, lines, lumps, plain_hmm, sequences, touching
from torch.distributions import constraints

from symhmm.compiler import density as densities
from symhmm.compiler.density import compile
from symhmm.infer import em
from symhmm.infer.expectation import RECORDED, expectation, measured
from symhmm.infer.target import target

POSITIVE = torch.linspace(0.2, 9.0, 40, dtype=cf.REAL)


def depends_on_values(y):
    """The program runs at each evaluation."""
    loc = pyro.param("loc", cf.real([-1.0, 2.0]))
    sd = pyro.param("sd", cf.real(1.5), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(cf.real([0.4, 0.6])))
        pyro.sample("y", dist.Normal(loc[z] if loc[0] < 100 else loc[z] ** 2, sd), obs=y)


CASES = [
    (lumps, touching(), {}),
    (lumps, touching(), {"fix": {"loc": cf.real([-1.0, 1.5])}}),
    (lumps, touching(), {"tie": [("scale[0]", "scale[1]")]}),
    (lumps, touching(), {"order": "loc"}),
    (gamma_mixture, POSITIVE, {}),
    (lines, crossing(), {}),
    (class_mixture, sequences(), {}),
    (plain_hmm, touching().reshape(10, 20), {}),
]


def both(goal, count):
    """At a point near the start, along directions at random; measured, and directly."""
    generator = np.random.default_rng(0)
    u = goal.x + 0.3 * generator.standard_normal(goal.size)
    directions = generator.standard_normal((count, goal.size))
    return measured(goal, u, directions), expectation(goal, u), directions


@pytest.mark.parametrize("count", [0, 1, 3, RECORDED + 1])
@pytest.mark.parametrize(("program", "y", "options"), CASES, ids=lambda x: getattr(x, "__name__", ""))
def test_replayed_and_direct_agree(program, y, options, count):
    goal = target(compile(program, y), options.get("fix", {}), "em", tie=options.get("tie"), order=options.get("order"))
    seen, wanted, directions = both(goal, count)
    assert seen.value == pytest.approx(wanted.value, rel=1e-12)
    np.testing.assert_allclose(seen.gradient, wanted.gradient, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(seen.curvature, wanted.curvature(directions), rtol=1e-10, atol=1e-9)


def test_a_program_that_runs_each_time():
    with pytest.warns(UserWarning, match="runs at each evaluation"):
        density = compile(depends_on_values, touching())
    seen, wanted, directions = both(target(density, {}, "em"), 2)
    assert seen.value == pytest.approx(wanted.value, rel=1e-12)
    np.testing.assert_allclose(seen.curvature, wanted.curvature(directions), rtol=1e-10, atol=1e-9)


def test_recorded_once_for_all_fits_of_a_program(monkeypatch):
    em.run(compile(lumps, touching()), restarts=1)
    monkeypatch.setattr(densities, "trace", lambda *args, **kwargs: pytest.fail("recorded again"))
    other = compile(lumps, touching() + 1.0)
    moved = em.run(other, restarts=1, start={"loc": cf.real([0.0, 3.0])})
    # The recording reads the data of the density that is asked, not those it was made with.
    assert moved.objective == pytest.approx(other.log_prob(moved.values).item(), rel=1e-12)


def test_other_fixed_numbers_are_read_by_one_recording():
    density = compile(lumps, touching())
    for loc in ([-1.0, 1.5], [0.0, 3.0]):
        goal = target(density, {"loc": cf.real(loc)}, "em")
        assert measured(goal, goal.x, np.eye(goal.size)[:1]).value == pytest.approx(expectation(goal, goal.x).value)
