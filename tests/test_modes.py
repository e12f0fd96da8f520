import closed_forms as cf
import pyro
import pyro.distributions as dist
import torch

from symhmm.compiler.density import compile
from symhmm.infer import svi
from symhmm.infer.arrows import following, spreads
from symhmm.infer.guide import blocks_by_role
from symhmm.infer.modes import settled


def regressions(y):
    """Two effects of each group about two population values, with spreads of their own; normal data."""
    x = torch.linspace(-1.0, 1.5, y.shape[1], dtype=cf.REAL)
    beta = pyro.sample("beta", dist.Normal(cf.real([0.0, 0.0]), 3.0).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(cf.real([0.0, 0.0]), 0.5).to_event(1))
    with pyro.plate("group", len(y), dim=-1):
        b = pyro.sample("b", dist.Normal(beta, tau).to_event(1))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(b[..., 0] + b[..., 1] * x[:, None], 2.0), obs=y.T)


def built():
    y = cf.balanced(6, 5)
    density = compile(regressions, y)
    goal = svi.target(density, {}, "svi")
    return y, goal, blocks_by_role(goal.entries, density.graph)


def test_likelihoods_of_a_linear_model_are_exact():
    y, goal, blocks = built()
    goal = goal.at(goal.start + 0.3 * torch.randn(goal.start.shape, generator=cf.generator(1), dtype=cf.REAL))
    effects = following(goal, blocks, torch.full_like(goal.start, 0.5), None)[0][1]
    x = torch.linspace(-1.0, 1.5, 5, dtype=cf.REAL)
    design = torch.stack([torch.ones_like(x), x], 1)
    precision = design.T @ design / 4
    found = effects.prior.root @ effects.prior.root.mT
    torch.testing.assert_close(found, precision.expand(6, 2, 2), rtol=1e-5, atol=1e-5)
    wanted = torch.linalg.lstsq(design, y.T).solution.T
    torch.testing.assert_close(effects.prior.own, wanted, rtol=1e-4, atol=1e-4)


def test_the_start_is_the_mode_with_the_spreads_held():
    _, goal, blocks = built()
    assert spreads(goal, blocks) == {"tau"}
    found, evaluations = settled(goal, {"tau"})
    assert 1 < evaluations <= 150
    e = goal.density.layout["tau"]
    assert torch.equal(found.start[e.start : e.stop], goal.start[e.start : e.stop])
    gradient = goal.density.value_and_grad(found.start)[1]
    gradient[e.start : e.stop] = 0
    assert gradient.abs().max() < 0.3
    assert gradient.abs().max() < 0.05 * goal.density.value_and_grad(goal.start)[1].abs().max()


def test_what_only_moves_a_location_is_no_spread():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(cf.real(0.0), 1.0))
        with pyro.plate("group", len(y)):
            b = pyro.sample("b", dist.Normal(mu, 1.0))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    density = compile(model, cf.real([0.0, 1.0, 2.0]))
    goal = svi.target(density, {}, "svi")
    assert spreads(goal, blocks_by_role(goal.entries, density.graph)) == set()


def test_effects_that_are_not_normal_hold_all_that_their_prior_depends_on():
    def model(y):
        mu = pyro.sample("mu", dist.LogNormal(cf.real(0.0), 1.0))
        with pyro.plate("group", len(y)):
            b = pyro.sample("b", dist.Gamma(2.0, mu))
            pyro.sample("y", dist.Normal(b, 1.0), obs=y)

    density = compile(model, cf.real([0.5, 1.0, 2.0]))
    goal = svi.target(density, {}, "svi")
    assert spreads(goal, blocks_by_role(goal.entries, density.graph)) == {"mu"}
