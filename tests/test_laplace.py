import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal, constraints

import symhmm
from symhmm.compiler.density import compile
from symhmm.errors import FitError, GraphError
from symhmm.infer import laplace_fit, mle
from symhmm.infer.laplace import laplace
from symhmm.infer.laplace_exact import integral, integral_and_gradient, nodes
from symhmm.infer.laplace_members import members
from symhmm.infer.metric import climb
from symhmm.tables.results import LAPLACE, LAPLACE_POSTERIOR

REAL = torch.float64


def switching(y):
    """Shape of y: (T, N). Two hidden states; each individual has its own two logits of leaving."""
    mu = pyro.param("mu", cf.real([-1.0, -1.5]))
    tau = pyro.param("tau", cf.real([0.6, 0.4]), constraint=constraints.positive)
    loc = pyro.param("loc", cf.real([-1.0, 1.0]))
    with pyro.plate("individual", y.shape[1], dim=-1):
        d = pyro.sample("d", dist.Normal(torch.zeros(2, dtype=REAL), tau).to_event(1))
        leave = torch.sigmoid(mu + d)
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            p = leave[..., 0] * (z == 0) + (1 - leave[..., 1]) * (z == 1)
            z = pyro.sample(f"z_{t}", dist.Bernoulli(p))
            pyro.sample(f"y_{t}", dist.Normal(loc[z.long()], 1.0), obs=y[t])
            z = z.long()


def counts(y):
    """Poisson counts with a normal effect of each group on the log scale, and a prior outside the plate."""
    b = pyro.sample("b", dist.Normal(cf.real(0.0), 2.0))
    tau = pyro.param("tau", cf.real(0.7), constraint=constraints.positive)
    with pyro.plate("group", y.shape[1], dim=-1):
        d = pyro.sample("d", dist.Normal(cf.real(0.0), tau))
        with pyro.plate("repeat", y.shape[0], dim=-2):
            pyro.sample("y", dist.Poisson(torch.exp(b + d)), obs=y)


def slopes(y, x):
    """Random intercept and slope, shape of y and x (groups, repeats); the marginal is normal."""
    beta = pyro.param("beta", cf.real([0.0, 0.0]))
    tau = pyro.param("tau", cf.real([1.0, 1.0]), constraint=constraints.positive)
    sd = pyro.param("sd", cf.real(1.0), constraint=constraints.positive)
    with pyro.plate("group", len(y), dim=-1):
        d = pyro.sample("d", dist.Normal(torch.zeros(2, dtype=REAL), tau).to_event(1))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            b = beta + d
            pyro.sample("y", dist.Normal(b[..., 0] + b[..., 1] * x.T, sd), obs=y.T)


def slopes_marginal(y, x, beta, tau, sd):
    total = 0.0
    for yi, xi in zip(y, x, strict=True):
        design = torch.stack([torch.ones_like(xi), xi], 1)
        covariance = design @ torch.diag(tau**2) @ design.T + sd**2 * torch.eye(len(xi), dtype=REAL)
        total += float(MultivariateNormal(design @ beta, covariance).log_prob(yi))
    return total


def slopes_data(groups=15, repeats=8):
    noise = torch.randn(groups, repeats + 2, generator=cf.generator(3), dtype=REAL)
    x = torch.linspace(0.0, 2.0, repeats, dtype=REAL).expand(groups, repeats)
    return 1.0 + noise[:, :1] + (0.5 + 0.7 * noise[:, 1:2]) * x + 0.8 * noise[:, 2:], x


def chain_data(steps=40, individuals=4):
    generator = cf.generator(4)
    z = torch.zeros(individuals, dtype=torch.long)
    rows = []
    for _ in range(steps):
        z = torch.where(torch.rand(individuals, generator=generator) < 0.25, 1 - z, z)
        rows.append(2.0 * z - 1 + torch.randn(individuals, generator=generator, dtype=REAL))
    return torch.stack(rows)


def differences(f, x, h=1e-4):
    out = []
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e[i] = h
        out.append((f(x + e) - f(x - e)) / (2 * h))
    return torch.stack(out)


def test_exact_where_effects_are_normal():
    y = cf.balanced()
    marginal = laplace(compile(cf.random_intercept, y))
    for loc, tau in ((4.0, 0.5), (5.5, 2.0), (5.0, 1e-3)):
        value = marginal.log_prob({"loc": cf.real(loc), "tau": cf.real(tau)})
        assert value.item() == pytest.approx(cf.random_intercept_marginal(y, loc, tau), abs=1e-8)
    values = {"loc": cf.real(4.0), "tau": cf.real(0.5)}
    assert marginal.per("group", values).sum().item() == pytest.approx(marginal.log_prob(values).item(), abs=1e-10)
    mean, sd = cf.random_intercept_posterior(y, 4.0, 0.5)
    modes = marginal.modes(values)
    torch.testing.assert_close(modes.u[:, 0], mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(modes.root[:, 0, 0].abs(), torch.full_like(mean, sd), rtol=1e-7, atol=0)


def test_two_effects_against_the_normal_marginal():
    y, x = slopes_data()
    marginal = laplace(compile(slopes, y, x))
    values = {"beta": cf.real([0.8, 0.4]), "tau": cf.real([0.9, 0.2]), "sd": cf.real(0.7)}
    assert marginal.log_prob(values).item() == pytest.approx(slopes_marginal(y, x, **values), abs=1e-7)


@pytest.mark.parametrize("program", [switching, counts])
def test_gradient_is_that_of_the_value(program):
    y = chain_data() if program is switching else torch.poisson(torch.full((5, 6), 2.0, dtype=REAL), cf.generator(5))
    marginal = laplace(compile(program, y))
    x = marginal.pack(marginal.initial())
    value, gradient = marginal.value_and_grad(x)
    wanted = differences(lambda v: marginal.log_prob(marginal.unpack(v)), x)
    assert value.item() == pytest.approx(marginal.log_prob(marginal.unpack(x)).item(), abs=1e-9)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-4)


# torch's own decompositions are scripted when functorch first asks for a second derivative.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_against_the_twice_differentiable_path():
    density = compile(switching, chain_data(), strategy="scan")
    values = density.initial()
    modes = laplace(density).modes({n: values[n] for n in ("mu", "tau", "loc")})

    def total(u):
        return density.log_prob({**values, "d": u})

    slope = torch.func.grad(total)(modes.u)
    assert slope.abs().max() < 1e-4
    hessian = -torch.func.hessian(total)(modes.u)
    wanted = total(modes.u)
    for m in range(len(modes.u)):
        block = hessian[m, :, m]
        torch.testing.assert_close(torch.linalg.inv(block), modes.root[m] @ modes.root[m].T, rtol=1e-5, atol=1e-7)
        wanted = wanted + np.log(2 * np.pi) - 0.5 * torch.logdet(block)
    kernel = laplace(compile(switching, chain_data()))
    assert kernel.log_prob({n: values[n] for n in ("mu", "tau", "loc")}).item() == pytest.approx(
        wanted.item(), abs=1e-6
    )


def test_maximum_modes_and_their_errors():
    y = cf.balanced()
    loc, tau = cf.random_intercept_maximum(y)
    fit = symhmm.fit(cf.random_intercept, y, method="laplace", restarts=1)
    assert fit.status.ok
    assert fit.estimate.objective_name == LAPLACE
    assert fit.values["loc"].item() == pytest.approx(loc, abs=1e-3)
    assert fit.values["tau"].item() == pytest.approx(tau, abs=1e-3)
    assert fit.estimate.objective == pytest.approx(cf.random_intercept_marginal(y, loc, tau), abs=1e-6)
    assert fit.estimate.marginal == pytest.approx((fit.estimate.objective, 0.0), abs=1e-6)
    mean, sd = cf.random_intercept_posterior(y, loc, tau)
    block = fit.estimate.posterior.blocks[0]
    torch.testing.assert_close(block.loc[:, 0], mean, rtol=0, atol=1e-3)
    assert block.scale_tril[:, 0, 0].tolist() == pytest.approx([sd] * len(y), rel=1e-3)
    # In a balanced design loc has the variance of the mean of group means.
    rows = fit.fixed_effects()
    assert rows["se"][0] == pytest.approx(((tau**2 + 4 / y.shape[1]) / len(y)) ** 0.5, rel=1e-3)
    assert len(fit.random_effects("group")) == len(y)
    assert "log-likelihood (Laplace)" in repr(fit.summary())


def test_variance_at_zero_is_reported():
    y = cf.balanced() - cf.balanced().mean(1, keepdim=True)
    estimate = laplace_fit.run(compile(cf.random_intercept, y), restarts=1)
    assert estimate.status.ok
    assert "at the edge" in repr(estimate.status)
    assert "tau = " in repr(estimate.status)
    assert estimate.objective == pytest.approx(cf.random_intercept_marginal(y, 0.0, 0.0), abs=1e-5)


def test_crossed_effects_are_integrated_together():
    def model(y):
        tau = pyro.param("tau", cf.real([1.0, 0.5]), constraint=constraints.positive)
        with pyro.plate("row", y.shape[0], dim=-2):
            a = pyro.sample("a", dist.Normal(cf.real(0.0), tau[0]))
        with pyro.plate("column", y.shape[1], dim=-1):
            b = pyro.sample("b", dist.Normal(cf.real(0.0), tau[1]))
        with pyro.plate("row", y.shape[0], dim=-2), pyro.plate("column", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    y = torch.randn(3, 4, generator=cf.generator(6), dtype=REAL)
    marginal = laplace(compile(model, y))
    assert marginal.members.plate is None
    ones = torch.ones
    rows = torch.kron(torch.eye(3, dtype=REAL), ones(4, 4, dtype=REAL))
    columns = torch.kron(ones(3, 3, dtype=REAL), torch.eye(4, dtype=REAL))
    covariance = torch.eye(12, dtype=REAL) + rows + 0.25 * columns
    wanted = MultivariateNormal(torch.zeros(12, dtype=REAL), covariance).log_prob(y.reshape(-1))
    x = marginal.pack(marginal.initial())
    value, gradient = marginal.value_and_grad(x)
    assert value.item() == pytest.approx(wanted.item(), abs=1e-7)
    torch.testing.assert_close(
        gradient, differences(lambda v: marginal.log_prob(marginal.unpack(v)), x), rtol=1e-5, atol=1e-6
    )


def test_nested_effects_belong_to_the_outer_plate():
    def model(y):
        tau = pyro.param("tau", cf.real([1.0, 0.5]), constraint=constraints.positive)
        with pyro.plate("herd", y.shape[1], dim=-1):
            a = pyro.sample("a", dist.Normal(cf.real(0.0), tau[0]))
            with pyro.plate("whale", y.shape[0], dim=-2):
                b = pyro.sample("b", dist.Normal(cf.real(0.0), tau[1]))
                pyro.sample("y", dist.Normal(a + b, 1.0), obs=y)

    y = torch.randn(3, 4, generator=cf.generator(7), dtype=REAL)
    marginal = laplace(compile(model, y))
    assert marginal.members.plate == "herd"
    assert marginal.members.index.shape == (4, 4)
    covariance = 1.25 * torch.eye(3, dtype=REAL) + 1.0
    wanted = MultivariateNormal(torch.zeros(3, dtype=REAL), covariance).log_prob(y.T).sum()
    assert marginal.log_prob(marginal.initial()).item() == pytest.approx(wanted.item(), abs=1e-8)


def test_members_that_look_at_each_other_are_one_block():
    def model(y):
        with pyro.plate("group", len(y)):
            d = pyro.sample("d", dist.Normal(torch.zeros(len(y), dtype=REAL), 1.0))
            pyro.sample("y", dist.Normal(d - d.mean(), 1.0), obs=y)

    assert members(compile(model, cf.real([1.0, 2.0, 0.0]))).plate is None


def negative_binomial(y):
    with pyro.plate("group", len(y)):
        rate = pyro.sample("rate", dist.Gamma(torch.full_like(y, 3.0), 0.7))
        pyro.sample("y", dist.Poisson(rate), obs=y)


def test_quadrature_of_a_positive_effect_is_exact():
    y = cf.real([0.0, 3.0, 9.0])
    wanted = torch.distributions.NegativeBinomial(3.0, probs=cf.real(1 / 1.7)).log_prob(y).sum().item()
    density = compile(negative_binomial, y)
    marginal = laplace(density)
    assert marginal.log_prob({}).item() == pytest.approx(wanted, abs=0.1)
    modes = marginal.modes({})
    theta = torch.zeros(0, dtype=REAL)
    assert integral(marginal.members, theta, nodes(modes, grid=31))[0] == pytest.approx(wanted, abs=1e-5)


def test_importance_sampling_agrees_with_quadrature_within_its_error():
    marginal = laplace(compile(switching, chain_data()))
    values = marginal.initial()
    theta, modes = marginal.members.flat(values), marginal.modes(values)
    exact = integral(marginal.members, theta, nodes(modes, grid=21))[0]
    value, error = integral(marginal.members, theta, nodes(modes, draws=1000, seed=1, quadrature=0))
    assert error < 0.05
    assert value == pytest.approx(exact, abs=4 * error)


def test_gradient_of_the_corrected_marginal():
    marginal = laplace(compile(switching, chain_data()))
    values = marginal.initial()
    theta, at = marginal.members.flat(values), nodes(marginal.modes(values), grid=9)
    value, gradient = integral_and_gradient(marginal.members, theta, at)
    assert value.item() == pytest.approx(integral(marginal.members, theta, at)[0], abs=1e-9)
    wanted = differences(lambda v: torch.tensor(integral(marginal.members, v, at)[0], dtype=REAL), theta, 1e-5)
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_corrected_maximum_of_poisson_counts():
    y = torch.poisson(2 * torch.rand(3, 12, generator=cf.generator(8), dtype=REAL) + 0.5, cf.generator(9))
    estimate = laplace_fit.run(compile(counts, y), correct=True, restarts=1)
    assert estimate.status.ok
    assert estimate.objective_name == "log-posterior density (adaptive Gauss-Hermite)"
    assert estimate.error < 1e-4
    plain = laplace_fit.run(compile(counts, y), restarts=1)
    assert plain.objective_name == LAPLACE_POSTERIOR
    assert estimate.objective >= plain.marginal[0] - 1e-6


def test_drivers_take_it_for_a_density():
    y = cf.balanced()
    marginal = laplace(compile(cf.random_intercept, y))
    estimate = mle.run(marginal, restarts=1)
    loc, tau = cf.random_intercept_maximum(y)
    assert estimate.values["tau"].item() == pytest.approx(tau, abs=1e-3)
    held = mle.run(marginal, restarts=1, fix={"tau": 1.0})
    assert held.values["loc"].item() == pytest.approx(loc, abs=1e-3)
    assert "12 members of group" in repr(marginal)
    assert "tau" in repr(marginal.roles())
    with pytest.raises(GraphError, match="'repeat'"):
        marginal.per("repeat", marginal.initial())


def test_fixed_values_are_bit_equal():
    y, held = cf.balanced(), cf.real(1.23456789)
    estimate = laplace_fit.run(compile(cf.random_intercept, y), fix={"tau": held}, restarts=1)
    assert torch.equal(estimate.values["tau"], held)
    assert estimate.counts == {"loc": 1}


def test_tied_spreads_have_the_maximum_of_one_spread():
    y, x = slopes_data()
    estimate = laplace_fit.run(compile(slopes, y, x), tie=[("tau[0]", "tau[1]")], restarts=1)
    assert estimate.status.ok
    assert estimate.counts == {"beta": 2, "tau": 1, "sd": 1}
    tau = estimate.values["tau"]
    assert torch.equal(tau[0], tau[1])

    def at(beta, one, sd):
        return slopes_marginal(y, x, beta, torch.stack([one, one]), sd)

    best = estimate.values["beta"], tau[0], estimate.values["sd"]
    top = at(*best)
    assert estimate.objective == pytest.approx(top, abs=1e-6)
    for k in range(3):
        for h in (-0.02, 0.02):
            moved = [v + h if i == k else v for i, v in enumerate(best)]
            # Nothing to first order, in either direction.
            assert 0 < top - at(*moved) < 1.0
            gap = at(*[v - h if i == k else v for i, v in enumerate(best)]) - at(*moved)
            assert abs(gap) < 0.2 * (top - at(*moved))


def test_ordered_values_and_what_is_held_beside_them():
    y = chain_data()
    density = compile(switching, y)
    free = laplace_fit.run(density, restarts=1)
    start = {"loc": cf.real([1.0, -1.0]), "mu": cf.real([-1.5, -1.0])}
    turned = laplace_fit.run(density, restarts=1, start=start, order="loc")
    assert turned.values["loc"][0] < turned.values["loc"][1]
    assert turned.objective == pytest.approx(free.objective, abs=1e-4)
    held = cf.real([0.5, 0.5])
    both = laplace_fit.run(density, restarts=1, fix={"tau": held}, tie=[("mu[0]", "mu[1]")], order="loc")
    assert torch.equal(both.values["tau"], held)
    assert torch.equal(both.values["mu"][0], both.values["mu"][1])
    assert both.counts == {"mu": 1, "loc": 2}
    assert both.objective < free.objective
    # Questions asked afterwards keep what was tied, ordered and held.
    found = symhmm.fit(density, method="laplace", restarts=1, fix={"tau": held}, tie=[("mu[0]", "mu[1]")], order="loc")
    errors = found.standard_errors
    assert errors["mu"][0].item() == pytest.approx(errors["mu"][1].item(), rel=1e-9)
    assert set(errors) == {"mu", "loc"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie": [("d", "tau")]}, "tie= names 'd', which is not fitted"),
        ({"order": "d"}, "order= names 'd', which is not fitted"),
        ({"tie": [("mu[0]", "tau[0]")]}, "cannot make 'mu"),
        ({"fix": {"tau": [0.0, 1.0]}}, r"'tau' lies outside of its support(.|\n)*1e-4"),
        ({"fix": {"nu": 1.0}}, "unknown value 'nu'"),
    ],
)
def test_restrictions_that_cannot_be_meant_say_so(options, message):
    with pytest.raises(FitError, match=message):
        symhmm.fit(switching, chain_data(), method="laplace", **options)


def test_what_cannot_be_integrated_says_so():
    with pytest.raises(FitError, match=r"no random effects(.|\n)*method='mle'"):
        laplace(compile(cf.gaussian, cf.sample()))
    density = compile(cf.random_intercept, cf.balanced())
    with pytest.raises(FitError, match="nothing called 'delta'"):
        laplace(density, over="delta")
    with pytest.raises(FitError, match="'d' cannot be held and integrated"):
        laplace_fit.run(density, fix={"d": torch.zeros(12, dtype=REAL)})

    def single(y):
        with pyro.plate("n", len(y)):
            d = pyro.sample("d", dist.Normal(torch.zeros(len(y)), 1.0))
            pyro.sample("y", dist.Normal(d, 1.0), obs=y)

    with pytest.raises(FitError, match="needs float64"):
        laplace(compile(single, torch.zeros(3)))


def test_climb_learns_a_narrow_valley_from_its_curvature():
    valley = np.array([[1.0, 0.999], [0.999, 1.0]]) * 1e3
    ascent = climb(lambda x: (-0.5 * float(x @ valley @ x), -valley @ x), np.array([3.0, -1.0]))
    assert ascent.converged
    assert np.abs(ascent.x).max() < 1e-4
    assert len(ascent.trace) < 12
    quadrant = lambda x: (-float(x @ x), -2 * x) if (x > -1).all() else (np.nan, x * np.nan)
    assert climb(quadrant, np.array([0.5, 3.0])).converged


def test_climb_leaves_a_valley_without_end():
    """As a spread goes to zero: always a little higher, and nothing to gain."""

    def falling(x):
        return -50 * float(x[0] - 1) ** 2 - float(np.exp(2 * x[1])), np.array(
            [-100 * (x[0] - 1), -2 * np.exp(2 * x[1])]
        )

    ascent = climb(falling, np.array([0.0, 1.0]), noise=1e-7)
    assert ascent.converged
    assert ascent.value > -1e-4
    assert len(ascent.trace) < 80
    nowhere = climb(lambda x: (np.nan, x * np.nan), np.array([0.5, 3.0]))
    assert not nowhere.converged
    assert len(nowhere.trace) < 5


def test_same_seed_same_numbers():
    density = compile(switching, chain_data())
    one, two = (laplace_fit.run(density, restarts=1, seed=3) for _ in range(2))
    assert one.objective == two.objective
    assert torch.equal(one.vector, two.vector)
