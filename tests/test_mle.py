import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from listeners import interrupt_after
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.distributions import stationary_distribution
from symhmm.errors import FitError
from symhmm.infer import mle
from symhmm.infer.lbfgs import ascend
from symhmm.tables.results import LOG_LIKELIHOOD, LOG_POSTERIOR


def test_gaussian_maximum_in_closed_form():
    y = cf.sample()
    estimate = mle.run(compile(cf.gaussian, y))
    assert estimate.status.ok
    assert estimate.objective_name == LOG_LIKELIHOOD
    assert estimate.objective == pytest.approx(cf.gaussian_maximum(y), abs=1e-8)
    assert estimate.values["loc"].item() == pytest.approx(y.mean().item(), abs=1e-4)
    assert estimate.values["sd"].item() == pytest.approx(y.std(correction=0).item(), abs=1e-4)
    assert estimate.counts == {"loc": 1, "sd": 1}
    assert estimate.optima.table["found"] == (4,)


def test_one_state_chain_is_a_sample():
    y = cf.sample(20)
    assert mle.run(compile(cf.one_state, y), restarts=2).objective == pytest.approx(cf.gaussian_maximum(y), abs=1e-8)


def test_states_that_start_equal_are_told_apart():
    y = cf.two_lumps()
    for restarts in (1, 3):
        estimate = mle.run(compile(cf.mixture, y), restarts=restarts)
        assert estimate.values["loc"].sort().values.tolist() == pytest.approx([-3.0, 4.0], abs=0.3)


def test_map_is_the_joint_mode():
    y = cf.sample(30)
    estimate = mle.run(compile(cf.with_prior, y), method="map")
    mean, _, _ = cf.with_prior_posterior(y)
    assert estimate.objective_name == LOG_POSTERIOR
    torch.testing.assert_close(estimate.values["b"], mean, rtol=1e-4, atol=1e-4)


def test_mle_refuses_latents_and_points_elsewhere():
    with pytest.raises(FitError, match=r"random effects: 'd' \(random effect of group\)(.|\n)*method='svi'"):
        mle.run(compile(cf.random_intercept, cf.balanced()))
    with pytest.raises(FitError, match=r"priors: 'b'(.|\n)*method='map'"):
        mle.run(compile(cf.with_prior, cf.sample()))


def test_joint_maximum_that_does_not_exist_says_so():
    # Without any difference between groups the density rises for ever as the spread and the effects go to zero.
    y = cf.balanced() - cf.balanced().mean(1, keepdim=True)
    estimate = mle.run(compile(cf.random_intercept, y), method="map", restarts=1)
    assert estimate.values["tau"] < 1e-3
    assert estimate.status.reason == "the log-density rises without end as tau goes to zero"
    assert "biased towards zero" in repr(estimate.status)


def test_fixed_values_are_bit_equal_and_others_fit_around_them():
    y, held = cf.sample(), cf.real(2.3456789)
    estimate = mle.run(compile(cf.gaussian, y), fix={"sd": held})
    assert torch.equal(estimate.values["sd"], held)
    assert estimate.values["loc"].item() == pytest.approx(y.mean().item(), abs=1e-4)
    assert estimate.counts == {"loc": 1}
    assert estimate.objective == pytest.approx(float(dist.Normal(y.mean(), held).log_prob(y).sum()), abs=1e-8)


def test_start_replaces_the_programs_own():
    density = compile(cf.mixture, cf.two_lumps())
    low, high = (
        mle.run(density, start={"loc": cf.real(s)}, restarts=1).values["loc"] for s in ([-1.0, 1.0], [1.0, -1.0])
    )
    assert low[0] < 0 < low[1]
    torch.testing.assert_close(low, high.flip(0), rtol=1e-3, atol=1e-3)
    with pytest.raises(FitError, match=r"starting values cannot be used\. unknown value 'mu'"):
        mle.run(density, start={"mu": 1.0})


def test_fix_may_lie_on_the_edge_of_the_support():
    def model(y):
        p = pyro.param("p", torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64), constraint=constraints.simplex)
        loc = pyro.param("loc", torch.zeros(3, dtype=torch.float64))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(p))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    p = cf.real([0.5, 0.5, 0.0])
    estimate = mle.run(compile(model, cf.two_lumps()), fix={"p": p}, restarts=2)
    assert torch.equal(estimate.values["p"], p)
    assert np.isfinite(estimate.objective)


@pytest.mark.parametrize(
    ("fix", "text"),
    [
        ({"sd": 1.0, "loc": 0.0}, "no free values"),
        ({"scale": 1.0}, "unknown value 'scale'"),
        ({"sd": torch.ones(2)}, "wrong shape"),
        ({"sd": float("nan")}, "not finite"),
    ],
)
def test_bad_fix_is_refused_before_any_work(fix, text):
    with pytest.raises(FitError, match=text):
        mle.run(compile(cf.gaussian, cf.sample()), fix=fix)


def test_density_not_finite_at_the_start_names_the_site():
    def model(y):
        loc = pyro.param("loc", cf.real(0.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Exponential(torch.exp(loc)), obs=y)
            pyro.factor("wall", torch.where(loc.abs() < 1e9, -torch.inf, 0.0 * loc))

    estimate = mle.run(compile(model, cf.sample()), restarts=2)
    assert not estimate.status.ok
    assert "site 'wall'" in repr(estimate.status)
    assert estimate.objective == -np.inf


def test_line_search_that_meets_a_cliff_walks_back():
    # Finite only below 2, with the maximum at 1.9; the first step would go far beyond the cliff.
    def cliff(x):
        if x[0] >= 2.0:
            return float("nan"), np.array([np.nan])
        return float(-50 * (x[0] - 1.9) ** 2), -100 * (x - 1.9)

    ascent = ascend(cliff, np.array([-30.0]))
    assert ascent.converged
    assert ascent.x[0] == pytest.approx(1.9, abs=1e-4)


def test_not_converged_says_how_many_evaluations():
    estimate = mle.run(compile(cf.gaussian, cf.sample()), restarts=1, max_evaluations=4)
    assert not estimate.status.ok
    assert "all 4 evaluations used" in repr(estimate.status)
    assert "max_evaluations" in estimate.status.try_


@pytest.mark.parametrize(("allowed", "last"), [(1, 0), (4, 3), (11, 10)])
def test_what_the_last_evaluations_gained_is_said_where_the_next_step_is_not_known(allowed, last):
    density = compile(cf.mixture, cf.two_lumps())
    estimate = mle.run(density, restarts=1, max_evaluations=allowed, tolerance=0.0)
    said = repr(estimate.status)
    assert "inf" not in said
    assert "next step" not in said
    assert len(estimate.trace) == allowed
    gained = estimate.objective - float(estimate.trace[: allowed - last].max())
    assert (f", the last {last} evaluations gained {gained:.2g} nats" in said) == (last > 0)


def test_flat_density_is_reported():
    def model(y):
        loc = pyro.param("loc", cf.real(0.0))
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(0.0 * loc, cf.real(1.0)), obs=y)

    assert "flat" in mle.run(compile(model, cf.sample()), restarts=1).status.reason


def test_variance_at_zero_is_an_edge():
    def model(y):
        extra = pyro.param("extra", cf.real(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(cf.real(20.0), (9.0 + extra**2).sqrt() * 2), obs=y)

    estimate = mle.run(compile(model, cf.sample()))
    assert "extra" in repr(estimate.status)
    assert estimate.values["extra"] < 1e-2


def test_ctrl_c_returns_the_best_so_far():
    y = cf.sample()
    estimate = mle.run(compile(cf.gaussian, y), progress=interrupt_after(5))
    assert not estimate.status.ok
    assert "Ctrl-C" in estimate.status.reason
    assert np.isfinite(estimate.objective)


@pytest.mark.parametrize("after", [3, 30])
def test_resume_gives_the_same_numbers(tmp_path, after):
    density = compile(cf.gaussian, cf.sample())
    whole = mle.run(density, seed=3)
    path = tmp_path / "fit.npz"
    mle.run(density, seed=3, checkpoint=path, progress=interrupt_after(after))
    resumed = mle.run(density, seed=3, checkpoint=path)
    assert torch.equal(resumed.vector, whole.vector)
    assert resumed.objective == whole.objective
    assert resumed.optima == whole.optima
    assert resumed.n_evaluations == whole.n_evaluations
    with pytest.raises(FitError, match="belongs to another fit"):
        mle.run(density, seed=4, checkpoint=path)


def test_same_seed_same_numbers():
    density = compile(cf.mixture, cf.two_lumps())
    first, second = (mle.run(density, seed=5) for _ in range(2))
    assert torch.equal(first.vector, second.vector)


def test_progress_counts_and_knows_the_time_left():
    seen = []
    mle.run(compile(cf.gaussian, cf.sample()), restarts=2, progress=seen.append)
    assert {p.stage for p in seen} == {"mle, start 1 of 2", "mle, start 2 of 2"}
    assert all(p.seconds_left >= 0 for p in seen)
    assert seen[-1].objective >= seen[0].objective


def earthquakes(y, m):
    rate = pyro.param("rate", lambda: torch.full((m,), 15.0, dtype=cf.REAL), constraint=constraints.positive)
    rows = pyro.param("rows", lambda: torch.full((m, m), 1 / m, dtype=cf.REAL), constraint=constraints.simplex)
    start = stationary_distribution(rows)
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(start if t == 0 else rows[z]))
        pyro.sample(f"y_{t}", dist.Poisson(rate[z]), obs=y[t])


@pytest.mark.parametrize(("m", "wanted"), [(1, -391.9189), (2, -342.3183), (3, -329.4603)])
def test_earthquakes(data_file, m, wanted):
    y = torch.from_numpy(np.genfromtxt(data_file("earthquakes.csv"), delimiter=",", skip_header=1)[:, -1])
    estimate = mle.run(compile(earthquakes, y, m))
    assert estimate.status.ok
    assert estimate.objective == pytest.approx(wanted, abs=1e-4)
    assert estimate.n_parameters == m * m


def plain_hmm(y):
    beta = pyro.param("beta", lambda: torch.full((3, 2), -2.0, dtype=cf.REAL))
    loc = pyro.param("loc", lambda: torch.zeros(3, dtype=cf.REAL))
    scale = pyro.param("scale", lambda: torch.ones(3, dtype=cf.REAL), constraint=constraints.positive)
    zero = torch.zeros(3, 1, dtype=cf.REAL)
    a, b = beta[:, :1], beta[:, 1:]
    # The diagonal is the reference category of each row.
    rows = torch.stack([torch.cat(r) for r in ((zero[0], a[0], b[0]), (a[1], zero[1], b[1]), (a[2], b[2], zero[2]))])
    with pyro.plate("individual", y.shape[0], dim=-1):
        z = 0
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=torch.zeros(3, dtype=cf.REAL) if t == 0 else rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[:, t])


def test_simulated_individuals_from_a_symmetric_start(data_file):
    table = np.genfromtxt(data_file("sim_mixed.csv"), delimiter=",", skip_header=1, usecols=2)
    estimate = mle.run(compile(plain_hmm, torch.from_numpy(table).reshape(20, 500)), restarts=2)
    assert estimate.status.ok
    assert estimate.objective == pytest.approx(-17605.3620, abs=1e-4)
    assert estimate.n_parameters == 12
