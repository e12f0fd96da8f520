"""EM: closed-form maxima, no iteration that lowers the likelihood, published maxima, and every way to end."""

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from listeners import interrupt_after
from programs_em import (
    class_mixture,
    crossing,
    earthquakes,
    gamma_mixture,
    latent_class,
    lines,
    lumps,
    plain_hmm,
    sequences,
    touching,
)
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.infer import em, mle
from symhmm.tables.results import LOG_LIKELIHOOD, LOG_POSTERIOR


def test_gaussian_maximum_in_closed_form():
    y = cf.sample()
    estimate = em.run(compile(cf.gaussian, y))
    assert estimate.status.ok
    assert estimate.objective_name == LOG_LIKELIHOOD
    assert estimate.objective == pytest.approx(cf.gaussian_maximum(y), abs=1e-9)
    assert estimate.values["loc"].item() == pytest.approx(y.mean().item(), rel=1e-9)
    assert estimate.values["sd"].item() == pytest.approx(y.std(correction=0).item(), rel=1e-9)
    assert estimate.optima.table["found"] == (4,)
    # One step does it, and the next one sees that nothing is left.
    assert len(estimate.trace) <= 3


def test_one_state_chain_is_a_sample():
    y = cf.sample(20)
    assert em.run(compile(cf.one_state, y), restarts=2).objective == pytest.approx(cf.gaussian_maximum(y), abs=1e-9)


def test_states_that_start_equal_are_told_apart():
    estimate = em.run(compile(cf.mixture, cf.two_lumps()), restarts=1)
    assert estimate.values["loc"].sort().values.tolist() == pytest.approx([-3.0, 4.0], abs=0.3)


PROGRAMS = [
    (lumps, touching()),
    (gamma_mixture, torch.cat([torch.linspace(0.2, 2.0, 30), torch.linspace(4.0, 9.0, 30)]).double()),
    (lines, crossing()),
    (class_mixture, sequences()),
]


@pytest.mark.parametrize("memory", [0, 8])
@pytest.mark.parametrize(("program", "y"), PROGRAMS, ids=lambda x: getattr(x, "__name__", ""))
def test_no_iteration_lowers_the_likelihood(program, y, memory):
    density = compile(program, y)
    for seed in range(3):
        trace = em.run(density, seed=seed, restarts=1, memory=memory).trace
        assert len(trace) > 3
        assert trace.diff().min() >= -1e-9 * abs(float(trace[-1]))


@pytest.mark.parametrize(("program", "y"), PROGRAMS, ids=lambda x: getattr(x, "__name__", ""))
def test_same_maximum_as_lbfgs(program, y):
    density = compile(program, y)
    found, wanted = em.run(density), mle.run(density)
    assert found.status.ok
    assert found.objective == pytest.approx(wanted.objective, abs=1e-3)


def test_extrapolation_needs_fewer_steps_and_ends_where_plain_em_does():
    density = compile(lumps, touching())
    plain, quick = (em.run(density, restarts=1, memory=m, max_iterations=20000) for m in (0, 8))
    assert quick.n_evaluations < 0.5 * plain.n_evaluations
    assert quick.objective > plain.objective - 1e-6


def test_prior_makes_it_the_posterior_mode():
    def model(y):
        prob = pyro.sample("prob", dist.Beta(cf.real(3.0), cf.real(2.0)))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Bernoulli(prob), obs=y)

    y = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=cf.REAL)
    estimate = em.run(compile(model, y), restarts=1)
    assert estimate.objective_name == LOG_POSTERIOR
    assert estimate.values["prob"].item() == pytest.approx((3 + 2) / (3 + 2 + 4 - 3 + 1), rel=1e-6)


def test_prior_inside_a_mixture():
    def model(y):
        loc = pyro.sample("loc", dist.Normal(cf.real([0.0, 0.0]), cf.real(2.0)).to_event(1))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(cf.real([0.3, 0.7])))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    density = compile(model, cf.two_lumps())
    found, wanted = em.run(density), mle.run(density, method="map")
    assert found.objective == pytest.approx(wanted.objective, abs=1e-4)
    assert bool((found.trace.diff() >= -1e-9 * abs(found.objective)).all())


def test_random_effects_are_refused():
    with pytest.raises(FitError, match=r"random effects: 'd' \(random effect of group\)(.|\n)*method='laplace'"):
        em.run(compile(cf.random_intercept, cf.balanced()))


def test_fixed_values_are_bit_equal_and_others_fit_around_them():
    y, held = cf.sample(), cf.real(2.3456789)
    estimate = em.run(compile(cf.gaussian, y), fix={"sd": held})
    assert torch.equal(estimate.values["sd"], held)
    assert estimate.values["loc"].item() == pytest.approx(y.mean().item(), rel=1e-9)
    assert estimate.counts == {"loc": 1}


def test_fix_may_lie_on_the_edge_of_the_support():
    weights = cf.real([1.0, 0.0])
    estimate = em.run(compile(lumps, cf.two_lumps()), fix={"weights": weights}, restarts=1)
    assert torch.equal(estimate.values["weights"], weights)
    assert np.isfinite(estimate.objective)


def test_moves_that_are_impossible_stay_so():
    def model(y):
        loc = pyro.param("loc", lambda: cf.real([0.0, 1.0]))
        stay = pyro.param("stay", lambda: cf.real(0.6), constraint=constraints.unit_interval)
        rows = torch.stack([torch.stack([stay, 1 - stay]), cf.real([0.0, 1.0])])
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=rows.log()[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])

    y = torch.cat([torch.zeros(20), 4 + torch.zeros(10)]).double() + 0.1 * torch.arange(30) % 3
    found, wanted = (driver.run(compile(model, y), restarts=2) for driver in (em, mle))
    assert found.status.ok
    assert found.objective == pytest.approx(wanted.objective, abs=1e-4)


def test_density_not_finite_at_the_start_names_the_site():
    def model(y):
        loc = pyro.param("loc", cf.real(0.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Exponential(torch.exp(loc)), obs=y)
            pyro.factor("wall", torch.where(loc.abs() < 1e9, -torch.inf, 0.0 * loc))

    estimate = em.run(compile(model, cf.sample()), restarts=2)
    assert "site 'wall'" in repr(estimate.status)
    assert estimate.objective == -np.inf


def test_not_converged_says_how_many_steps():
    estimate = em.run(compile(lumps, cf.two_lumps()), restarts=1, max_iterations=2)
    assert not estimate.status.ok
    assert "max_iterations=" in estimate.status.try_


def test_flat_density_is_reported():
    def model(y):
        loc = pyro.param("loc", cf.real(0.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0 * loc, cf.real(1.0)), obs=y)

    assert "flat" in em.run(compile(model, cf.sample()), restarts=1).status.reason


def test_ctrl_c_returns_the_best_so_far():
    estimate = em.run(compile(lumps, cf.two_lumps()), progress=interrupt_after(3))
    assert "Ctrl-C" in estimate.status.reason
    assert np.isfinite(estimate.objective)


@pytest.mark.parametrize("after", [2, 15])
def test_resume_gives_the_same_numbers(tmp_path, after):
    density = compile(lumps, cf.two_lumps())
    whole = em.run(density, seed=3)
    path = tmp_path / "fit.npz"
    em.run(density, seed=3, checkpoint=path, progress=interrupt_after(after))
    resumed = em.run(density, seed=3, checkpoint=path)
    assert torch.equal(resumed.vector, whole.vector)
    assert torch.equal(resumed.trace, whole.trace)
    assert resumed.optima == whole.optima
    assert resumed.n_evaluations == whole.n_evaluations
    with pytest.raises(FitError, match="belongs to another fit"):
        em.run(density, seed=4, checkpoint=path)


@pytest.mark.parametrize("driver", [em, mle])
def test_likelihood_without_bound_is_no_optimum(driver):
    # One observation far out, on which a component with a spread of its own collapses.
    y = torch.cat([torch.linspace(-1.0, 1.0, 40, dtype=cf.REAL), cf.real([9.0])])
    start = {"loc": cf.real([0.0, 9.0]), "scale": cf.real([0.5, 0.1])}
    estimate = driver.run(compile(lumps, y), start=start, restarts=1, jitter=0.0)
    assert not estimate.status.ok
    assert "scale[1]" in repr(estimate.status)
    if driver is em:
        assert "rises without end as scale[1] goes to zero" in estimate.status.reason
        assert len(estimate.trace) < 50


def test_an_optimum_is_preferred_to_a_higher_singularity():
    density = compile(lumps, torch.cat([touching(), cf.real([30.0])]))
    goal = em.target(density, {}, "em")

    proper = em.run(
        density, start={"loc": cf.real([0.0, 30.0]), "scale": cf.real([2.0, 3.0])}, restarts=1, max_iterations=1
    )
    optimum = em.Ascent(proper.vector.numpy(), proper.objective, np.zeros(5), 0.0, True, [proper.objective])
    scale = torch.stack([proper.values["scale"][0], cf.real(1e-60)])
    x = density.pack(
        {**proper.values, "loc": torch.stack([proper.values["loc"][0], cf.real(30.0)]), "scale": scale}
    ).numpy()
    singular = em.Ascent(x, *goal.evaluate(x), 0.0, True)
    assert singular.value > optimum.value
    best = em.assemble(goal, "em", [singular, optimum], 2, 10, False, 0.0)
    assert best.objective == optimum.value
    only = em.assemble(goal, "em", [singular], 1, 10, False, 0.0)
    assert "rises without end as scale[1] goes to zero" in only.status.reason


class Killed(Exception):
    """Stands for the end of the process."""


@pytest.mark.parametrize("driver", [em, mle])
@pytest.mark.parametrize("after", [1, 7, 30])
def test_killed_at_any_point_and_resumed(tmp_path, monkeypatch, driver, after):
    monkeypatch.setattr("symhmm.infer.checkpoint.EVERY", 0.0)
    density, path, seen = compile(lumps, touching()), tmp_path / "fit.npz", []

    def kill(progress):
        seen.append(progress)
        if len(seen) == after:
            raise Killed

    whole = driver.run(density, seed=1)
    with pytest.raises(Killed):
        driver.run(density, seed=1, checkpoint=path, progress=kill)
    resumed = driver.run(density, seed=1, checkpoint=path)
    assert torch.equal(resumed.vector, whole.vector)
    assert torch.equal(resumed.trace, whole.trace)
    assert resumed.optima == whole.optima
    assert resumed.n_evaluations == whole.n_evaluations


def test_ctrl_c_inside_an_m_step_is_not_lost(monkeypatch):
    def model(y):
        p = pyro.param("p", lambda: torch.zeros(50, dtype=cf.REAL))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(cf.real([0.5, 0.5])))
            pyro.sample("y", dist.Normal(p.sin().sum() * z, 1.0), obs=y)

    density = compile(model, cf.two_lumps())
    inside = em.Expectation.evaluate

    def stopped(self, free, held):
        assert len(free) == 50  # a block too large for a curvature
        inside(self, free, held)
        raise KeyboardInterrupt

    monkeypatch.setattr(em.Expectation, "evaluate", stopped)
    assert "Ctrl-C" in em.run(density, restarts=1).status.reason


def test_a_block_too_large_for_a_curvature_is_left_to_lbfgs():
    def model(y):
        p = pyro.param("p", lambda: torch.linspace(-0.1, 0.1, 50, dtype=cf.REAL))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(cf.real([0.5, 0.5])))
            pyro.sample("y", dist.Normal(p.sin().sum() + 5.0 * z, 1.0), obs=y)

    found, wanted = (driver.run(compile(model, cf.two_lumps()), restarts=1) for driver in (em, mle))
    assert found.status.ok
    assert found.objective == pytest.approx(wanted.objective, abs=1e-3)


def test_same_seed_same_numbers():
    density = compile(lumps, cf.two_lumps())
    first, second = (em.run(density, seed=5) for _ in range(2))
    assert torch.equal(first.vector, second.vector)


def test_progress_counts():
    seen = []
    em.run(compile(lumps, cf.two_lumps()), restarts=2, progress=seen.append)
    assert {p.stage for p in seen} == {"em, start 1 of 2", "em, start 2 of 2"}


@pytest.mark.parametrize(("m", "wanted"), [(1, -391.9189), (2, -342.3183), (3, -329.4603)])
def test_earthquakes_with_a_start_that_is_not_free(data_file, m, wanted):
    y = torch.from_numpy(np.genfromtxt(data_file("earthquakes.csv"), delimiter=",", skip_header=1)[:, -1])
    estimate = em.run(compile(earthquakes, y, m))
    assert estimate.status.ok
    assert estimate.objective == pytest.approx(wanted, abs=1e-4)


def test_latent_classes_without_chains(data_file):
    y = np.genfromtxt(data_file("balance.csv"), delimiter=",", names=True)
    items = torch.from_numpy(np.stack([y[f"d{i}"] for i in range(1, 5)], 1))
    estimate = em.run(compile(latent_class, items))
    assert estimate.objective == pytest.approx(-1083.0363, abs=1e-3)
    assert estimate.n_parameters == 9


def test_simulated_individuals_from_a_symmetric_start(data_file):
    table = np.genfromtxt(data_file("sim_mixed.csv"), delimiter=",", skip_header=1, usecols=2)
    estimate = em.run(compile(plain_hmm, torch.from_numpy(table).reshape(20, 500)), restarts=1)
    assert estimate.status.ok
    assert estimate.objective == pytest.approx(-17605.3620, abs=1e-4)
    assert estimate.n_evaluations < 60
