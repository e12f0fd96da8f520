import os
import signal
import subprocess
import sys

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.infer import svi
from symhmm.infer.amortised import Amortised
from symhmm.infer.objective import objective
from symhmm.tables.results import ELBO, ELBO_EVIDENCE


@pytest.fixture(scope="module")
def fitted():
    y = cf.balanced()
    return y, svi.run(compile(cf.random_intercept, y), steps=2000, cooldown=800)


def test_random_intercept_reaches_the_marginal_maximum(fitted):
    y, estimate = fitted
    loc, tau = cf.random_intercept_maximum(y)
    assert estimate.status.ok
    assert estimate.objective_name == ELBO
    assert estimate.values["loc"].item() == pytest.approx(loc, abs=0.05)  # an eighth of its standard error
    assert estimate.values["tau"].item() == pytest.approx(tau, rel=0.02)


def test_bound_is_the_exact_marginal_where_the_guide_is_the_posterior(fitted):
    y, estimate = fitted
    exact = cf.random_intercept_marginal(y, estimate.values["loc"].item(), estimate.values["tau"].item())
    assert exact - 0.01 < estimate.objective <= exact + 3 * estimate.error
    assert estimate.marginal[0] == pytest.approx(exact, abs=1e-3)
    assert estimate.marginal[1] < 1e-2


def test_guide_is_the_conditional_posterior(fitted):
    y, estimate = fitted
    mean, sd = cf.random_intercept_posterior(y, estimate.values["loc"].item(), estimate.values["tau"].item())
    block = estimate.posterior.blocks[0]
    torch.testing.assert_close(block.loc[:, 0], mean, rtol=0, atol=0.02)
    assert block.scale_tril[:, 0, 0].tolist() == pytest.approx([sd] * len(y), rel=0.03)
    assert block.plates == ("group",)


def test_priors_get_a_joint_normal_and_the_evidence():
    y = cf.sample(30)
    mean, covariance, evidence = cf.with_prior_posterior(y)
    estimate = svi.run(compile(cf.with_prior, y))
    block = estimate.posterior.blocks[0]
    assert estimate.objective_name == ELBO_EVIDENCE
    torch.testing.assert_close(block.loc[0], mean, rtol=0, atol=0.02)
    torch.testing.assert_close(block.scale_tril[0] @ block.scale_tril[0].T, covariance, rtol=0.05, atol=0.01)
    assert estimate.objective == pytest.approx(evidence, abs=0.01)


def test_meanfield_is_too_narrow_where_latents_are_correlated_and_its_bound_is_lower():
    y = cf.sample(30)
    _, covariance, evidence = cf.with_prior_posterior(y)
    estimate = svi.run(compile(cf.with_prior, y), guide="meanfield")
    conditional = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert estimate.posterior.sd.tolist() == pytest.approx(conditional.tolist(), rel=0.05)
    assert estimate.objective < evidence - 0.1


def positive_effects(y):
    scale = pyro.sample("scale", dist.LogNormal(cf.real(0.0), cf.real(0.5)))
    with pyro.plate("group", len(y)):
        rate = pyro.sample("rate", dist.Gamma(cf.real(2.0), 2.0 / scale))
        weights = pyro.sample("weights", dist.Dirichlet(cf.real([2.0, 2.0, 2.0])))
        pyro.sample("y", dist.Poisson(rate * (1 + weights[..., 0])), obs=y)


def test_bound_counts_the_volume_of_constrained_latents():
    """The same weights, from a quadrature-free identity: the importance-weighted bound does not depend on the guide."""
    y = cf.real([3.0, 1.0, 4.0])
    full, mean = (
        svi.run(compile(positive_effects, y), guide=g, steps=700, cooldown=300, evaluate=1500) for g in FAMILIES
    )
    assert abs(full.marginal[0] - mean.marginal[0]) < 0.05
    draws = 200_000
    generator = torch.Generator().manual_seed(0)
    scale = torch.exp(0.5 * torch.randn(draws, 1, generator=generator, dtype=cf.REAL))
    gamma = torch._standard_gamma(torch.full((draws, 3), 2.0, dtype=cf.REAL), generator=generator)
    beta = [torch._standard_gamma(torch.full((draws, 3), a, dtype=cf.REAL), generator=generator) for a in (2.0, 4.0)]
    rate = gamma * scale / 2 * (1 + beta[0] / (beta[0] + beta[1]))
    exact = dist.Poisson(rate).log_prob(y).sum(-1).logsumexp(0).item() - np.log(draws)
    assert full.marginal[0] == pytest.approx(exact, abs=0.05)
    assert full.objective <= exact + 3 * full.error


FAMILIES = ("full", "meanfield")


@pytest.mark.parametrize("weighted", [False, True])
def test_several_draws_are_the_mean_of_single_ones(weighted):
    goal = svi.target(compile(cf.random_intercept, cf.balanced(6, 4)), {}, "svi")
    state = svi.init(goal, svi.Options(restarts=1))
    noise = torch.randn(3, state.guide.noise_size, generator=cf.generator(1), dtype=cf.REAL)
    value, gradient = objective(state.goal, state.guide, 3, weighted=weighted, batches=None)(state.phi, noise)
    one = objective(state.goal, state.guide, 1, weighted=False, batches=None)
    singles = [one(state.phi, n[None]) for n in noise]
    values = torch.stack([v for v, _ in singles])
    if not weighted:
        torch.testing.assert_close(value, values.mean())
        torch.testing.assert_close(gradient, torch.stack([g for _, g in singles]).mean(0))
        return
    share, points = values.softmax(0), state.guide.points.size
    factor = torch.where(torch.arange(state.guide.size) < points, share[:, None], share[:, None].square())
    torch.testing.assert_close(value, values.logsumexp(0) - np.log(3))
    torch.testing.assert_close(gradient, (factor * torch.stack([g for _, g in singles])).sum(0))


def test_weighted_gradient_is_that_of_the_bound():
    """Over many draws the doubly reparameterised gradient is the derivative of the mean of the weighted bound."""
    goal = svi.target(compile(cf.random_intercept, cf.balanced(2, 3)), {}, "svi")
    state = svi.init(goal, svi.Options(restarts=1))
    bound = objective(state.goal, state.guide, 3, weighted=True, batches=None)
    phi = 0.2 * torch.randn(state.guide.size, generator=cf.generator(2), dtype=cf.REAL)
    noise = torch.randn(400, 3, state.guide.noise_size, generator=cf.generator(3), dtype=cf.REAL)
    gradients = torch.stack([bound(phi, n)[1] for n in noise])
    for i in (0, 1, 2, 4):  # a point, the logarithm of a spread, a mean, a deviation
        e = torch.zeros_like(phi)
        e[i] = 1e-5
        slopes = torch.stack([(bound(phi + e, n)[0] - bound(phi - e, n)[0]) / 2e-5 for n in noise])
        away = gradients[:, i] - slopes
        assert away.mean().abs() < 4 * away.std() / 20 + 1e-6
        assert i < 2 or gradients[:, i].std() < slopes.std()


def test_refuses_a_program_without_latents_and_unknown_guides():
    with pytest.raises(FitError, match="method='mle'"):
        svi.run(compile(cf.gaussian, cf.sample()))
    with pytest.raises(FitError, match="no guide 'diagonal'"):
        svi.run(compile(cf.random_intercept, cf.balanced()), guide="diagonal")
    with pytest.raises(FitError, match="cooldown=2000 is longer"):
        svi.run(compile(cf.random_intercept, cf.balanced()), steps=1000, cooldown=2000)


def interrupt_after(n):
    def listener(progress):
        if progress.done == n:
            raise KeyboardInterrupt

    return listener


def test_ctrl_c_returns_the_fit_so_far():
    estimate = svi.run(compile(cf.random_intercept, cf.balanced()), progress=interrupt_after(50), evaluate=20)
    assert "Ctrl-C" in estimate.status.reason
    assert len(estimate.trace) == 50
    assert np.isfinite(estimate.objective)


@pytest.mark.parametrize("after", [70, 260])
def test_resume_follows_the_same_trajectory(tmp_path, after):
    density = compile(cf.random_intercept, cf.balanced())
    options = {"seed": 2, "steps": 350, "cooldown": 120, "restarts": 2, "evaluate": 20}
    whole = svi.run(density, **options)
    path = tmp_path / "fit.npz"
    svi.run(density, **options, checkpoint=path, progress=interrupt_after(after))
    resumed = svi.run(density, **options, checkpoint=path)
    assert torch.equal(resumed.trace, whole.trace)
    assert torch.equal(resumed.vector, whole.vector)
    assert resumed.objective == whole.objective
    assert resumed.status == whole.status


@pytest.mark.parametrize("within", ["_gradient", "_noise", "_move", "_factor", "_level"])
@pytest.mark.parametrize("when", [1, 60, 290])
def test_ctrl_c_within_a_step_continues_to_the_same_numbers(tmp_path, monkeypatch, within, when):
    """Before a step has moved anything, in the middle of its moves and after them."""
    density = compile(cf.random_intercept, cf.balanced())
    options = {"seed": 2, "steps": 350, "cooldown": 120, "restarts": 1, "evaluate": 20}
    count, own = 0, getattr(svi, within)

    def cut(*args):
        nonlocal count
        count += 1
        out = own(*args)
        if count == when:
            raise KeyboardInterrupt
        return out

    path = tmp_path / "fit.npz"
    with monkeypatch.context() as patch:
        patch.setattr(svi, within, cut)
        stopped = svi.run(density, **options, checkpoint=path)
    whole = svi.run(density, **options)
    assert "Ctrl-C" in stopped.status.reason or count < when
    resumed = svi.run(density, **options, checkpoint=path)
    assert torch.equal(resumed.trace, whole.trace)
    assert torch.equal(resumed.vector, whole.vector)


def test_same_seed_same_numbers():
    density = compile(cf.random_intercept, cf.balanced())
    options = {"steps": 150, "cooldown": 50, "evaluate": 20, "restarts": 2}
    first, second, other = (svi.run(density, seed=s, **options) for s in (1, 1, 2))
    assert torch.equal(first.vector, second.vector)
    assert not torch.equal(first.vector, other.vector)


def test_density_that_is_never_finite_is_a_result():
    def model(y):
        with pyro.plate("group", len(y)):
            d = pyro.sample("d", dist.Normal(cf.real(0.0), cf.real(1.0)))
            pyro.factor("wall", torch.where(d.abs() < 1e9, -torch.inf, 0.0 * d))

    estimate = svi.run(compile(model, cf.sample(5)))
    assert not estimate.status.ok
    assert "site 'wall'" in repr(estimate.status)


def test_spread_at_zero_is_said():
    y = cf.balanced() - cf.balanced().mean(1, keepdim=True) + 5.0
    estimate = svi.run(compile(cf.random_intercept, y), steps=1500, cooldown=500)
    assert "spread at or near zero" in repr(estimate.status)
    assert "group" in repr(estimate.status)


def test_fixed_latents_and_parameters_stay_bit_equal():
    y = cf.balanced(5, 4)
    held = {"tau": cf.real(1.2345678)}
    estimate = svi.run(compile(cf.random_intercept, y), fix=held, steps=800, cooldown=300)
    assert torch.equal(estimate.values["tau"], held["tau"])
    assert estimate.counts == {"loc": 1}
    _, sd = cf.random_intercept_posterior(y, 0.0, 1.2345678)
    assert estimate.posterior.sd[-5:].tolist() == pytest.approx([sd] * 5, rel=0.05)


def mixed_hmm(y):
    def column(x):
        return x[..., None]

    beta = pyro.param("beta", lambda: torch.full((6,), -2.0, dtype=cf.REAL))
    tau = pyro.param("tau", lambda: torch.full((6,), 0.5, dtype=cf.REAL), constraint=constraints.positive)
    loc = pyro.param("loc", lambda: cf.real([-1.0, 0.0, 1.0]))
    scale = pyro.param("scale", lambda: torch.ones(3, dtype=cf.REAL), constraint=constraints.positive)
    with pyro.plate("individual", y.shape[0], dim=-1):
        d = pyro.sample("d", dist.Normal(torch.zeros(6, dtype=cf.REAL), 1.0).to_event(1))
        b = beta + tau * d
        o = torch.zeros_like(b[..., 0])
        rows = torch.stack([o, b[..., 0], b[..., 1], b[..., 2], o, b[..., 3], b[..., 4], b[..., 5], o], -1)
        rows = rows.reshape(*b.shape[:-1], 3, 3)
        z = 0
        for t in pyro.markov(range(y.shape[1])):
            logits = torch.zeros(3, dtype=cf.REAL) if t == 0 else pyro.ops.indexing.Vindex(rows)[..., z, :]
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[:, t])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_six_random_intercepts_reach_the_marginal_maximum(data_file, family):
    table = np.genfromtxt(data_file("sim_mixed.csv"), delimiter=",", skip_header=1, usecols=2)
    estimate = svi.run(compile(mixed_hmm, torch.from_numpy(table).reshape(20, 500)), guide=family)
    assert estimate.status.ok
    assert "spread at or near zero" in repr(estimate.status)
    # Marginal maximum likelihood, in some order of the states; the smallest is exactly zero there.
    wanted = [0.380, 0.490, 0.504, 0.538, 1.007]
    # Independent effects are too narrow a family here, and the spreads are drawn down with them.
    within = 0.1 if family == "meanfield" else 0.05
    assert estimate.values["tau"].sort().values[1:].tolist() == pytest.approx(wanted, rel=within)
    assert estimate.objective > -17497.5
    assert estimate.marginal[0] == pytest.approx(-17494.95, abs=0.3)


KILLED = """
import os, signal, sys, torch
import os
import signal
import subprocess
import sys

import closed_forms as cf
from symhmm.compiler.density import compile
from symhmm.infer import checkpoint, svi

checkpoint.EVERY = 0.0  # written at each step

def die(progress):
    if progress.done == 40:
        os.kill(os.getpid(), signal.SIGKILL)

density = compile(cf.random_intercept, cf.balanced())
svi.run(density, seed=2, steps=90, cooldown=60, restarts=2, evaluate=20, checkpoint=sys.argv[1], progress=die)
"""


def test_a_killed_fit_continues_to_the_same_numbers(tmp_path):
    path = tmp_path / "fit.npz"
    here = os.path.dirname(cf.__file__)
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=here, check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    density = compile(cf.random_intercept, cf.balanced())
    options = {"seed": 2, "steps": 90, "cooldown": 60, "restarts": 2, "evaluate": 20}
    with np.load(path) as saved:
        assert 35 < len(saved["trace"]) < 90
    resumed, whole = svi.run(density, **options, checkpoint=path), svi.run(density, **options)
    assert torch.equal(resumed.trace, whole.trace)
    assert torch.equal(resumed.vector, whole.vector)
    assert resumed.objective == whole.objective


@pytest.mark.parametrize("schedule", ["cosine", "constant", lambda step: 1.0 / (1.0 + step / 100)])
def test_schedules_take_all_steps_and_arrive(schedule):
    y = cf.balanced()
    estimate = svi.run(compile(cf.random_intercept, y), schedule=schedule, steps=700, evaluate=50)
    assert len(estimate.trace) == 700
    assert estimate.values["tau"].item() == pytest.approx(cf.random_intercept_maximum(y)[1], rel=0.05)


def test_weighted_bound_is_tighter():
    y = cf.sample(30)
    _, _, evidence = cf.with_prior_posterior(y)
    options = {"guide": "meanfield", "steps": 500, "cooldown": 200, "evaluate": 20}
    plain = svi.run(compile(cf.with_prior, y), **options)
    weighted = svi.run(compile(cf.with_prior, y), objective="iwelbo", particles=16, **options)
    assert plain.trace[-100:].mean() < weighted.trace[-100:].mean() - 0.2
    assert weighted.trace[-100:].mean() < evidence + 0.05
    # It pays the guide to cover the posterior, which the plain bound makes it too narrow for.
    assert bool((weighted.posterior.sd > plain.posterior.sd).all())


def test_a_gradient_out_of_all_proportion_is_clipped():
    goal = svi.target(compile(cf.random_intercept, cf.balanced()), {}, "svi")
    state = svi.init(goal, svi.Options(restarts=1))
    unit = torch.ones_like(state.phi)
    state.gradients[1] = lambda phi, noise: (torch.zeros(()), unit * (1e6 if state.done == 20 else 1.0))
    for _ in range(21):
        svi.step(state, svi.Options())
    assert state.first.abs().max() < 2.1  # nine tenths of one, and a tenth of at most ten times the mean norm


def test_a_guide_that_shrinks_to_a_point_is_said():
    """The likelihood rises without end as the effects approach one number."""

    def model(y):
        with pyro.plate("group", len(y)):
            d = pyro.sample("d", dist.Normal(cf.real(0.0), 1.0))
            pyro.sample("y", dist.Normal(d, 1e-6), obs=y)

    estimate = svi.run(compile(model, torch.zeros(4, dtype=cf.REAL)), steps=900, cooldown=200, lr=0.2, evaluate=20)
    assert "the guide of 'd' collapsed to a point in 4 of 4 coordinates" in repr(estimate.status)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"objective": "elb"}, "objective='elbo', or iwelbo"),
        ({"schedule": "cos"}, "schedule='plateau', or cosine or constant"),
        ({"particles": 0}, "particles=0 must be at least 1"),
        ({"guide": {"group": "diagonal"}}, "no guide 'diagonal'"),
    ],
)
def test_options_that_do_not_exist(options, text):
    with pytest.raises(FitError, match=text):
        svi.run(compile(cf.random_intercept, cf.balanced()), **options)


def halves(y):
    """`closed_forms.random_intercept` with a mean and a spread for each half of the groups."""
    loc = pyro.param("loc", cf.real([1.0, 0.0]))
    tau = pyro.param("tau", cf.real([1.0, 2.0]), constraint=constraints.positive)
    half = (torch.arange(len(y)) >= len(y) // 2).long()
    with pyro.plate("group", len(y), dim=-1):
        d = pyro.sample("d", dist.Normal(cf.real(0.0), tau[half]))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(loc[half] + d, 2.0), obs=y.T)


def test_tied_and_ordered_parameters():
    y = cf.balanced(12, 6)
    options = {"steps": 1500, "cooldown": 600, "evaluate": 50}
    tied = svi.run(compile(halves, y), tie=[("loc[0]", "loc[1]"), ("tau[0]", "tau[1]")], **options)
    loc, tau = cf.random_intercept_maximum(y)
    assert tied.counts == {"loc": 1, "tau": 1}
    assert tied.tie == (("loc[0]", "loc[1]"), ("tau[0]", "tau[1]"))
    for name, wanted, within in (("loc", loc, 0.05), ("tau", tau, 0.03)):
        first, second = tied.values[name].tolist()
        assert first == second
        assert first == pytest.approx(wanted, abs=within)
    assert tied.marginal[0] == pytest.approx(cf.random_intercept_marginal(y, loc, tau), abs=0.02)


def test_an_order_is_kept_where_the_data_have_another():
    y = cf.balanced(12, 6)
    y[:6] += 4.0
    estimate = svi.run(compile(halves, y), order="loc", steps=1500, cooldown=600, evaluate=50)
    low, high = estimate.values["loc"].tolist()
    assert 0 < high - low < 0.3
    assert estimate.order == (("loc", -1),)
    y = y.flip(0)
    right = svi.run(compile(halves, y), order="loc", steps=1500, cooldown=600, evaluate=50)
    means = y.mean(1)
    wanted = [float(means[:6].mean()), float(means[6:].mean())]
    assert right.values["loc"].tolist() == pytest.approx(wanted, abs=0.1)


@pytest.mark.parametrize("option", [{"order": "d"}, {"tie": [("d[0]", "d[1]")]}])
def test_latents_cannot_be_tied_or_ordered(option):
    with pytest.raises(FitError, match=r"'d' is a latent, whose prior(.|\n)*in the program"):
        svi.run(compile(cf.random_intercept, cf.balanced()), **option)


def test_tied_parameters_of_a_pyro_guide_and_of_a_network():
    y = cf.balanced(12, 6)

    def own(y):
        at = pyro.param("at", torch.zeros(12, dtype=cf.REAL))
        sd = pyro.param("sd", torch.ones(12, dtype=cf.REAL), constraint=constraints.positive)
        with pyro.plate("group", 12, dim=-1):
            pyro.sample("d", dist.Normal(at, sd))

    network = torch.nn.Linear(1, 2, dtype=cf.REAL)
    for guide in (own, Amortised(network, y.mean(1, keepdim=True) - y.mean())):
        found = svi.run(
            compile(halves, y), guide=guide, tie=[("tau[0]", "tau[1]")], steps=60, cooldown=30, evaluate=5, restarts=1
        )
        assert found.values["tau"][0] == found.values["tau"][1]
        assert found.counts == {"loc": 2, "tau": 1}
