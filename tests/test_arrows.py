import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

import symhmm
from symhmm.compiler.density import compile
from symhmm.infer import svi
from symhmm.infer.guide import blocks_by_role


def hierarchy(y):
    """Two population values with priors, two effects of each group about them; the posterior is normal."""
    x = torch.linspace(-1.0, 1.5, y.shape[1], dtype=cf.REAL)
    beta = pyro.sample("beta", dist.Normal(cf.real([0.0, 0.0]), 3.0).to_event(1))
    with pyro.plate("group", len(y), dim=-1):
        b = pyro.sample("b", dist.Normal(beta, cf.real([0.3, 0.7])).to_event(1))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(b[..., 0] + b[..., 1] * x[:, None], 2.0), obs=y.T)


def hierarchy_posterior(y):
    """Covariance of (beta, b of the first group, ...) from its precision, and the log-evidence."""
    n, t = y.shape
    x = torch.linspace(-1.0, 1.5, t, dtype=cf.REAL)
    design = torch.stack([torch.ones_like(x), x], 1)
    within, eye = torch.diag(cf.real([0.3, 0.7]).square().reciprocal()), torch.eye(n, dtype=cf.REAL)
    precision = torch.zeros(2 * n + 2, 2 * n + 2, dtype=cf.REAL)
    precision[:2, :2] = torch.eye(2, dtype=cf.REAL) / 9.0 + n * within
    precision[2:, 2:] = torch.kron(eye, within + design.T @ design / 4.0)
    precision[:2, 2:] = -within.repeat(1, n)
    precision[2:, :2] = precision[:2, 2:].T
    own = design @ torch.diag(cf.real([0.09, 0.49])) @ design.T + 4.0 * torch.eye(t, dtype=cf.REAL)
    marginal = torch.kron(eye, own) + torch.kron(torch.ones(n, n, dtype=cf.REAL), 9.0 * design @ design.T)
    evidence = MultivariateNormal(torch.zeros(n * t, dtype=cf.REAL), marginal).log_prob(y.reshape(-1))
    return torch.linalg.inv(precision), float(evidence)


def test_a_linear_hierarchy_has_its_exact_posterior():
    y = cf.balanced(10, 5)
    covariance, evidence = hierarchy_posterior(y)
    estimate = svi.run(compile(hierarchy, y), steps=1500, cooldown=600, evaluate=50)
    assert estimate.objective == pytest.approx(evidence, abs=0.01)
    sd = covariance.diagonal().sqrt()
    assert estimate.posterior.sd[:2].tolist() == pytest.approx(sd[:2].tolist(), rel=0.02)
    # Given the effects, the population's values vary less than half as much: what independent blocks would have.
    alone = torch.linalg.inv(covariance)[:2, :2].diagonal().rsqrt()
    assert bool((alone < 0.6 * sd[:2]).all())
    drawn = torch.cov(estimate.posterior.sample(20_000).T)
    assert bool(((drawn - covariance).abs() < 0.06 * sd * sd[:, None]).all())
    assert estimate.posterior.sd[2:].tolist() == pytest.approx(sd[2:].tolist(), rel=0.07)


def programs():
    def correlated(y):
        """A full covariance in the population, and an effect without a normal prior."""
        beta = pyro.sample("beta", dist.Normal(torch.zeros(2, dtype=cf.REAL), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(torch.zeros(2, dtype=cf.REAL), 1.0).to_event(1))
        root = torch.linalg.cholesky(cf.real([[1.0, 0.6], [0.6, 1.0]]))
        with pyro.plate("group", len(y)):
            b = pyro.sample("b", dist.MultivariateNormal(beta, scale_tril=tau[:, None] * root))
            g = pyro.sample("g", dist.Gamma(2.0, tau[0]))
            k = pyro.sample("k", dist.LogNormal(beta[0], tau[1]))
            pyro.sample("y", dist.Normal(b.sum(-1) + g + k, 1.0), obs=y)

    return correlated, torch.zeros(4, dtype=cf.REAL)


def test_priors_are_read_off_the_density():
    program, y = programs()
    goal = svi.target(compile(program, y), {}, "svi")
    state = svi.assemble(goal, svi.Options(), torch.full_like(goal.start, 0.5), svi.Optima(), 0)
    population, effects = state.guide.blocks
    assert population.names == ("beta", "tau")
    law = state.guide.moments(state.phi)[1]
    generator = cf.generator(3)
    t = 0.5 * torch.randn(4, generator=generator, dtype=cf.REAL)
    away = t - law.centre
    tau = t[2:].exp()
    corr = cf.real([[1.0, 0.6], [0.6, 1.0]])
    wanted = torch.zeros(4, 4, dtype=cf.REAL)
    wanted[:2, :2] = torch.linalg.inv(tau[:, None] * corr * tau)
    wanted[3, 3] = tau[1] ** -2  # the logarithm of k; nothing for g
    s = (law.log_scale + law.log_scale_slope @ away).exp()
    precision = s[..., None] * law.correlation * s[..., None, :]
    torch.testing.assert_close(precision, wanted.expand(4, 4, 4), rtol=1e-6, atol=1e-6)
    loc = law.prior + law.prior_slope @ away
    torch.testing.assert_close(loc[:, [0, 1, 3]], t[[0, 1, 0]].expand(4, 3), rtol=1e-6, atol=1e-6)
    assert effects.names == ("b", "g", "k")


def test_drawn_as_evaluated():
    """The mean of q at draws of q over any function is the function's integral: here of a shifted density, which is one."""
    program, y = programs()
    goal = svi.target(compile(program, y), {}, "svi")
    state = svi.assemble(goal, svi.Options(), torch.full_like(goal.start, 0.5), svi.Optima(), 0)
    g, phi = state.guide, state.phi
    phi = phi + 0.2 * torch.randn(phi.shape, generator=cf.generator(1), dtype=cf.REAL)
    other = phi + 0.02 * torch.randn(phi.shape, generator=cf.generator(2), dtype=cf.REAL)
    noise = torch.randn(4000, g.noise_size, generator=cf.generator(4), dtype=cf.REAL)

    def log_ratio(e):
        vector = g.draw(phi, e)
        return (torch.cat(g.log_densities(other, vector)) - torch.cat(g.log_densities(phi, vector))).sum()

    ratio = torch.func.vmap(log_ratio)(noise).exp()
    assert (ratio.mean() - 1).abs() < 4 * ratio.std() / 4000**0.5
    assert ratio.std() > 0.1
    # And the result draws like the guide.
    posterior = g.posterior(phi)
    drawn, own = posterior.sample(4000), torch.func.vmap(lambda e: g.draw(phi, e))(noise)
    torch.testing.assert_close(drawn.mean(0), own.mean(0), rtol=0, atol=0.1 * float(own.std(0).max()))
    torch.testing.assert_close(drawn.std(0) / own.std(0), torch.ones(len(g.origin)).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(posterior.sd / own.std(0), torch.ones(len(g.origin)).double(), rtol=0, atol=0.1)
    torch.testing.assert_close(posterior.vector, g.mean(phi))


def test_programs_without_population_values_are_as_they_were():
    density = compile(cf.random_intercept, cf.balanced(4, 3))
    goal = svi.target(density, {}, "svi")
    state = svi.assemble(goal, svi.Options(), torch.full_like(goal.start, 0.3), svi.Optima(), 0)
    assert [b.prior for b in state.guide.blocks] == [None]
    assert blocks_by_role(density.layout.entries, density.graph)[0].sizes == (4, 4, 0, 0, 0, 0)


def test_coordinates_can_be_permuted():
    y = cf.balanced(3, 4)
    posterior = svi.run(compile(hierarchy, y), steps=60, cooldown=20, evaluate=5, restarts=1).posterior
    source = torch.tensor([2, 0, 1, 7, 6, 5, 4, 3])
    other = posterior.permuted(source)
    torch.testing.assert_close(other.sample(30), posterior.sample(30)[:, source])
    torch.testing.assert_close(other.sd, posterior.sd[source])


def test_a_saved_fit_draws_as_before(tmp_path):
    y = cf.balanced(3, 4)
    options = {"steps": 60, "cooldown": 20, "evaluate": 5, "restarts": 1}
    fit = symhmm.fit(hierarchy, y, method="svi", **options)
    fit.save(tmp_path)
    loaded = symhmm.load(tmp_path, hierarchy, y)
    before, after = fit.estimate.posterior, loaded.estimate.posterior
    assert torch.equal(after.sample(5), before.sample(5))
    assert torch.equal(after.sd, before.sd)
    assert str(loaded.fixed_effects()) == str(fit.fixed_effects())


def test_a_prior_whose_slope_is_not_finite_is_a_result():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(cf.real(0.0), 1.0))
        with pyro.plate("group", len(y)):
            b = pyro.sample("b", dist.Normal(mu, 1.0, validate_args=False))
            pyro.sample("c", dist.Normal(mu * torch.nan, 1.0, validate_args=False))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    assert not svi.run(compile(model, cf.real([0.0, 1.0, 2.0]))).status.ok


def test_an_interrupted_fit_continues_to_the_same_numbers(tmp_path):
    """The start at the mode and the likelihoods there are found again."""

    def stop(progress):
        if progress.done == 25:
            raise KeyboardInterrupt

    density = compile(*programs())
    options = {"seed": 3, "steps": 50, "cooldown": 20, "restarts": 1, "evaluate": 10}
    svi.run(density, **options, checkpoint=tmp_path / "fit.npz", progress=stop)
    resumed, whole = svi.run(density, **options, checkpoint=tmp_path / "fit.npz"), svi.run(density, **options)
    assert torch.equal(resumed.trace, whole.trace)
    assert torch.equal(resumed.vector, whole.vector)
    assert torch.equal(resumed.posterior.sample(20), whole.posterior.sample(20))
