"""NUTS against closed forms, its seeds, its failures, and what is kept of a run."""

import os
import signal
import threading

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from interrupts import stopped_at
from torch.distributions import constraints

import symhmm
from symhmm.errors import FitError
from symhmm.infer import nuts
from symhmm.infer.nuts import run
from symhmm.infer.target import Target

pytest.importorskip("nutpie")
Y = torch.tensor([[1.0, 1.4, 0.8], [-0.3, 0.1, 0.4], [2.0, 2.2, 2.9], [0.5, 0.7, -0.2]], dtype=torch.float64)


def one_way(y):
    """Groups around a common mean, all variances known: the posterior is normal."""
    one = torch.ones((), dtype=y.dtype)
    mu = pyro.sample("mu", dist.Normal(0 * one, 2 * one))
    with pyro.plate("group", 4, dim=-2):
        d = pyro.sample("d", dist.Normal(mu, 0.7 * one))
        with pyro.plate("unit", 3, dim=-1):
            pyro.sample("y", dist.Normal(d, 0.5 * one), obs=y)


PAIR = torch.tensor([[0.9, 0.2, 0.6, 0.7], [0.4, -0.3, 0.1, 0.6]], dtype=torch.float64)


def pair(y):
    """Two unknown means, each of four numbers."""
    one = torch.ones((), dtype=y.dtype)
    m = pyro.sample("m", dist.Normal(0 * one, one).expand([2]).to_event(1))
    with pyro.plate("n", 4):
        pyro.sample("y", dist.Normal(m, one).to_event(1), obs=y.T)


def exact():
    """Mean and covariance of (mu, d) given Y."""
    precision = np.zeros((5, 5))
    precision[0, 0] = 1 / 4 + 4 / 0.49
    precision[0, 1:] = precision[1:, 0] = -1 / 0.49
    precision[np.arange(1, 5), np.arange(1, 5)] = 1 / 0.49 + 3 / 0.25
    shift = np.concatenate([[0.0], Y.sum(1).numpy() / 0.25])
    covariance = np.linalg.inv(precision)
    return covariance @ shift, covariance


@pytest.fixture(scope="module")
def density():
    return symhmm.compile(one_way, Y)


@pytest.fixture(scope="module")
def fit(density):
    return symhmm.fit(density, method="nuts", chains=2, draws=600, tune=100, seed=1)


def test_a_normal_posterior(fit):
    mean, covariance = exact()
    x = fit.estimate.posterior.all.numpy()
    ess = np.array(fit.estimate.posterior.table["ess"])
    sd = np.sqrt(np.diag(covariance))
    assert fit.status.ok, fit.status
    assert ess.min() > 250
    assert (np.abs(x.mean(0) - mean) < 4.5 * sd / np.sqrt(ess)).all()
    assert np.allclose(x.std(0), sd, rtol=0.12)
    assert np.allclose(np.corrcoef(x.T), covariance / np.outer(sd, sd), atol=0.12)


def test_the_fit_answers_with_draws(fit):
    mean, covariance = exact()
    fixed, random = fit.fixed_effects(), fit.random_effects("group")
    assert fixed["estimate"][0] == pytest.approx(mean[0], abs=0.1)
    assert fixed["se"][0] == pytest.approx(np.sqrt(covariance[0, 0]), rel=0.15)
    assert np.allclose(random["estimate"], mean[1:], atol=0.1)
    assert "log-posterior density, mean of the draws" in repr(fit.summary())
    assert fit.estimate.objective == pytest.approx(expected_height(), abs=6 * fit.estimate.error)
    with pytest.raises(FitError, match="no marginal likelihood after method='nuts'"):
        _ = fit.aic


def expected_height():
    """Mean of the log joint density under its own normal posterior: its maximum less half the dimension."""
    mean, _ = exact()
    mu, d = torch.tensor(mean[0]), torch.tensor(mean[1:])
    top = dist.Normal(0.0, 2.0).log_prob(mu) + dist.Normal(mu, 0.7).log_prob(d).sum()
    return float(top + dist.Normal(d[:, None], 0.5).log_prob(Y).sum()) - 5 / 2


def test_same_seed_same_numbers_and_checkpoint(density, tmp_path, monkeypatch):
    options = {"chains": 3, "draws": 30, "tune": 20, "restarts": 1}
    whole = run(density, seed=5, **options)
    again = run(density, seed=5, **options, cores=3)
    other = run(density, seed=6, **options)
    assert torch.equal(whole.posterior.chains, again.posterior.chains)
    assert not torch.equal(whole.posterior.chains, other.posterior.chains)

    class Killed(Exception):
        pass

    written = nuts.Checkpoint.write

    def die_after_two(self, arrays):
        written(self, arrays)
        if len(arrays["chains"]) == 2:
            raise Killed

    file = tmp_path / "run.npz"
    monkeypatch.setattr(nuts.Checkpoint, "write", die_after_two)
    with pytest.raises(Killed):
        run(density, seed=5, checkpoint=file, **options)
    monkeypatch.undo()
    resumed = run(density, seed=5, checkpoint=file, **options)
    assert torch.equal(whole.posterior.chains, resumed.posterior.chains)
    assert resumed.objective == whole.objective
    with pytest.raises(FitError, match="belongs to another fit"):
        run(density, seed=6, checkpoint=file, **options)


def test_ctrl_c_returns_the_draws_so_far(density):
    def listen(progress):
        if progress.done == nuts.WARM_UP + nuts.DRAWS + 220 + 150:
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    found = run(density, chains=4, draws=200, tune=20, seed=1, progress=listen)
    assert not found.status.ok
    assert found.status.reason == "stopped by Ctrl-C"
    assert found.status.causes[0].endswith("of 4 chains, 200 draws each")
    assert found.posterior.chains.shape[0] < 4


def interrupted(monkeypatch, density, when, what=KeyboardInterrupt):
    """A run in which the density raises ``what`` at its evaluation number ``when``, and the number of evaluations."""

    def short():
        return run(density, chains=2, draws=40, tune=20, restarts=1, seed=1, max_depth=4)

    return stopped_at(monkeypatch, nuts.Moving, "__call__", when, short, what)


def test_ctrl_c_anywhere_returns_the_draws_before_it(density, monkeypatch):
    """In the climb, the pilot, the whitening, a warm-up or a chain, which all evaluate the density."""
    whole, total = interrupted(monkeypatch, density, 0)
    without = 0
    for when in np.unique(np.geomspace(1, total, 16).astype(int)):
        found, _ = interrupted(monkeypatch, density, when)
        assert found.status.reason == "stopped by Ctrl-C"
        assert all(bool(torch.isfinite(v).all()) for v in found.values.values())
        if found.posterior is None:
            without += 1
            assert found.status.causes[0].startswith("before there were any draws: values are ")
            continue
        chains, kept = found.posterior.chains.shape[:2]
        assert torch.equal(found.posterior.chains, whole.posterior.chains[:chains, :kept])
        assert found.status.causes[0] == f"{chains} of 2 chains, {kept} draws each"
    assert 0 < without < 16


@pytest.mark.parametrize("when", [1, 8, 20])
def test_ctrl_c_before_the_pilot(monkeypatch, when):
    """Where starts are made and where they climb."""
    count, evaluate = 0, Target.evaluate
    density = symhmm.compile(pair, PAIR)

    def counted(self, x):
        nonlocal count
        count += 1
        if count == when:
            raise KeyboardInterrupt
        return evaluate(self, x)

    monkeypatch.setattr(Target, "evaluate", counted)
    found = run(density, chains=2, draws=40, tune=20, restarts=8)
    assert found.status.causes == ("before there were any draws: values are those of the start",)
    assert found.posterior is None
    assert count == when
    assert torch.equal(found.values["m"], density.initial()["m"])


def test_what_a_program_raises_in_a_chain_is_raised(density, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        interrupted(monkeypatch, density, 300, ZeroDivisionError)


def test_parameters_without_a_prior_get_a_flat_one_on_their_natural_scale():
    """Of the spread of n normal numbers with mean zero: p(s) is s^-n exp(-S / 2 s^2), so that S / s^2 is chi-squared, n - 1."""
    y = torch.tensor([0.4, -1.0, 0.3, 2.0, -0.7, 1.1, -0.2, 0.9], dtype=torch.float64)

    def model(y):
        s = pyro.param("s", torch.ones((), dtype=y.dtype), constraints.positive)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(torch.zeros((), dtype=y.dtype), s), obs=y)

    fit = symhmm.fit(model, y, method="nuts", chains=2, draws=800, tune=100, seed=2)
    s = torch.stack([fit.density.unpack(v)["s"] for v in fit.estimate.posterior.all])
    assert fit.status.causes[-1] == "no prior, so flat on the natural scale: s"
    assert float((y.square().sum() / s.square()).mean()) == pytest.approx(7.0, abs=0.8)
    assert fit.fixed_effects()["se"][0] == pytest.approx(float(s.std()), rel=0.1)


def test_fixed_values_stay(density):
    found = run(density, chains=1, draws=40, tune=20, fix={"mu": 0.25})
    assert found.values["mu"].item() == 0.25
    assert found.fixed == ("mu",)
    precision = 1 / 0.49 + 3 / 0.25
    mean = (0.25 / 0.49 + Y.sum(1).numpy() / 0.25) / precision
    assert np.allclose([found.values["d"].reshape(-1).numpy()], mean, atol=0.35)


def test_tied_parameters_are_one_with_one_flat_prior():
    """As for one spread of all numbers: p(s) is s^-n exp(-S / 2 s^2), so that S / s^2 is chi-squared, n - 1."""
    y = torch.tensor([[0.4, -1.0, 0.3, 2.0], [-0.7, 1.1, -0.2, 0.9]], dtype=torch.float64)

    def model(y):
        s = pyro.param("s", torch.ones(2, dtype=y.dtype), constraints.positive)
        with pyro.plate("n", 4):
            pyro.sample("y", dist.Normal(torch.zeros(2, dtype=y.dtype), s).to_event(1), obs=y.T)

    fit = symhmm.fit(model, y, method="nuts", chains=2, draws=600, seed=2, tie=[("s[0]", "s[1]")])
    s = torch.stack([fit.density.unpack(v)["s"] for v in fit.estimate.posterior.all])
    assert torch.equal(s[:, 0], s[:, 1])
    assert float((y.square().sum() / s[:, 0].square()).mean()) == pytest.approx(7.0, abs=0.8)
    assert fit.estimate.counts == {"s": 1}
    assert fit.estimate.tie == (("s[0]", "s[1]"),)
    assert fit.fixed_effects()["estimate"][0] == fit.fixed_effects()["estimate"][1]


def test_ordered_values_have_the_posterior_where_they_are_in_order():
    """Two independent normal posteriors, the first one the higher; their difference is normal, cut off at zero."""
    density, y = symhmm.compile(pair, PAIR), PAIR
    fit = symhmm.fit(density, method="nuts", chains=2, draws=1000, seed=2, order="m")
    m = fit.estimate.posterior.all
    assert bool((m.diff() > 0).all())
    shift, spread = float(y.sum(1).diff()) / 5, (2 / 5) ** 0.5
    z = torch.tensor(shift / spread, dtype=torch.float64)
    below = dist.Normal(torch.zeros_like(z), 1.0)
    expected = shift + spread * float(below.log_prob(z).exp() / below.cdf(z))
    # The mean of two normal variables is independent of their difference, and its middle that of the data.
    assert float(m.diff().mean()) == pytest.approx(expected, abs=0.04)
    assert float(m.mean()) == pytest.approx(float(y.sum() / 10), abs=0.05)
    assert fit.estimate.order == (("m", -1),)
    values = fit.values["m"]
    assert float(fit.density.log_prob({"m": values})) == pytest.approx(float(density.log_prob({"m": values})))
    assert values[0] < values[1]


def test_the_order_of_states_keeps_chains_in_one_permutation():
    """States that are alike but for their order, from starts of which some are the other way round."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.full((30,), c, dtype=torch.float64) for c in (-1.0, 1.0, -1.0)])
    y += 0.5 * torch.randn(90, generator=generator, dtype=torch.float64)

    def model(y):
        one = torch.ones((), dtype=y.dtype)
        loc = pyro.sample("loc", dist.Normal(torch.tensor([0.5, -0.5], dtype=y.dtype), 2 * one).to_event(1))
        stay = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=y.dtype)
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(stay[0] * 0 + 0.5 if z is None else stay[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 0.5 * one), obs=y[t])

    fit = symhmm.fit(model, y, method="nuts", chains=2, draws=200, seed=0, order="loc")
    loc = fit.estimate.posterior.chains
    assert bool((loc[..., 0] < loc[..., 1]).all())
    assert torch.allclose(loc.mean((0, 1)), torch.tensor([-1.0, 1.0], dtype=torch.float64), atol=0.25)
    assert "the order of the others" not in repr(fit.status)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"chains": 0}, "chains=0 must be at least 1"),
        ({"draws": 0}, "draws=0 must be at least 1"),
        ({"target_accept": 1.0}, "target_accept=1.0 must lie between 0 and 1"),
        ({"noncentred": "mu"}, "'mu' has no non-centred form"),
        ({"tie": [("d[0, 0]", "d[1, 0]")]}, "tie= is for parameters, and 'd' is a latent"),
        ({"order": {"d": 0}}, "order= is for values of the states, and 'd' is in the plate 'group'"),
        ({"order": "sd"}, "order= names 'sd', which is not fitted"),
        ({"order": "mu"}, "order= cannot order 'mu'"),
    ],
)
def test_wrong_options_are_named(density, options, words):
    with pytest.raises(FitError, match=words):
        run(density, **options)


def test_float32_and_supports_without_volume_are_refused():
    def model(y):
        pyro.sample("y", dist.Normal(pyro.sample("m", dist.Normal(torch.tensor(0.0), 1.0)), 1.0), obs=y)

    with pytest.raises(FitError, match="needs float64"):
        symhmm.fit(model, torch.tensor(1.0), method="nuts")


def test_nothing_finite_is_a_status():
    def model(y):
        m = pyro.sample("m", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
        pyro.factor("f", torch.where(m > 5.0, 0.0, -torch.inf))
        pyro.sample("y", dist.Normal(m, 1.0), obs=y)

    fit = symhmm.fit(model, torch.tensor(1.0, dtype=torch.float64), method="nuts", chains=1)
    assert not fit.status.ok
    assert fit.status.reason == "the density is not finite at any start"
    assert fit.status.causes == ("site 'f'",)
