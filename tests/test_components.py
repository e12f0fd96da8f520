import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.components import observations_by, populations
from symhmm.errors import FitError
from symhmm.fitting import fit

REAL = cf.REAL


def correlated(y, x):
    """Shape of y and x: (groups, repeats). Correlated intercepts and slopes."""
    beta = pyro.param("beta", cf.real([0.0, 0.0]))
    tau = pyro.param("tau", cf.real([1.0, 1.0]), constraint=constraints.positive)
    root = pyro.param("root", torch.eye(2, dtype=REAL), constraint=constraints.corr_cholesky)
    sd = pyro.param("sd", cf.real(1.0), constraint=constraints.positive)
    with pyro.plate("group", len(y), dim=-1):
        d = pyro.sample("d", dist.MultivariateNormal(beta, scale_tril=tau[:, None] * root))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(d[..., 0] + d[..., 1] * x.T, sd), obs=y.T)


def standardised(y):
    """The random intercept of `closed_forms`, its effects of standard deviation one."""
    loc = pyro.param("loc", cf.real(0.0))
    tau = pyro.param("tau", cf.real(1.0), constraint=constraints.positive)
    with pyro.plate("group", len(y), dim=-1):
        d = pyro.sample("d", dist.Normal(cf.real(0.0), 1.0))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(loc + tau * d, 2.0), obs=y.T)


@pytest.fixture(scope="module")
def centred():
    y = cf.balanced()
    return y, fit(cf.random_intercept, y, method="laplace", restarts=1)


def test_spread_and_its_error_are_those_of_the_parameter(centred):
    _, f = centred
    table, fixed = f.variance_components(), f.fixed_effects()
    assert table["component"] == ("sd d",)
    assert table["estimate"][0] == pytest.approx(f.values["tau"].item(), rel=1e-6)
    where = fixed["name"].index("tau")
    for column in ("se", "2.5%", "97.5%"):
        assert table[column][0] == pytest.approx(fixed[column][where], rel=1e-5)
    assert table["between"][0] < table["estimate"][0]
    assert table["members"] == (12,)


def test_a_standardised_effect_has_the_same_components(centred):
    y, f = centred
    table = fit(standardised, y, method="laplace", restarts=1).variance_components()
    assert table["estimate"][0] == pytest.approx(f.variance_components()["estimate"][0], abs=1e-3)
    assert table["se"][0] == pytest.approx(f.variance_components()["se"][0], rel=1e-2)


def test_shrinkage_is_the_weight_of_the_population(centred):
    y, f = centred
    tau, loc = f.values["tau"].item(), f.values["loc"].item()
    table = f.shrinkage("group")
    wanted = (4.0 / y.shape[1]) / (tau**2 + 4.0 / y.shape[1])
    assert table["shrinkage"] == pytest.approx([wanted] * len(y), rel=1e-5)
    assert table["observations"] == (y.shape[1],) * len(y)
    own = y.mean(1) - loc
    assert table["estimate"] == pytest.approx(((1 - wanted) * own).tolist(), abs=1e-4)


def test_members_with_little_data_are_pooled_more():
    y = cf.balanced(6, 8)
    seen = torch.arange(8) < torch.tensor([1, 2, 3, 4, 6, 8])[:, None]

    def model(y, seen):
        loc = pyro.param("loc", cf.real(5.0))
        tau = pyro.param("tau", cf.real(1.0), constraint=constraints.positive)
        with pyro.plate("group", len(y), dim=-1):
            d = pyro.sample("d", dist.Normal(loc, tau))
            with pyro.plate("repeat", y.shape[1], dim=-2), pyro.poutine.mask(mask=seen.T):
                pyro.sample("y", dist.Normal(d, 2.0), obs=y.T)

    table = fit(model, y, seen, method="laplace", restarts=1, fix={"tau": 1.5}).shrinkage()
    assert table["observations"] == (1, 2, 3, 4, 6, 8)
    assert table["shrinkage"] == pytest.approx([(4 / n) / (1.5**2 + 4 / n) for n in (1, 2, 3, 4, 6, 8)], rel=1e-6)


def test_correlation_of_effects():
    noise = torch.randn(20, 14, generator=cf.generator(3), dtype=REAL)
    x = torch.linspace(0.0, 2.0, 12, dtype=REAL).expand(20, 12)
    intercept, slope = noise[:, :1], 0.8 * noise[:, :1] + 0.6 * noise[:, 1:2]
    f = fit(correlated, 1.0 + intercept + slope * x + 0.5 * noise[:, 2:], x, method="laplace", restarts=1)
    table = f.variance_components()
    assert table["component"] == ("sd d[0]", "sd d[1]", "correlation d[0], d[1]")
    root = f.values["root"]
    assert table["estimate"] == pytest.approx([*f.values["tau"].tolist(), root[1, 0].item()], rel=1e-6)
    assert table["2.5%"][2] < table["estimate"][2] < table["97.5%"][2] < 1
    assert 0 < table["se"][2] < 0.4


def test_spread_at_zero_is_said():
    y = cf.balanced() - cf.balanced().mean(1, keepdim=True)
    row = fit(cf.random_intercept, y, method="laplace", restarts=1).variance_components()
    assert row["remark"] == ("at zero",)
    assert row["2.5%"] == (0.0,)
    assert row["se"][0] != row["se"][0]


def test_what_is_not_normal_has_no_spread_here():
    def model(y):
        shape = pyro.param("shape", cf.real(2.0), constraint=constraints.positive)
        with pyro.plate("group", len(y)):
            rate = pyro.sample("rate", dist.Gamma(shape, 1.0))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    density = compile(model, cf.real([1.0, 4.0, 2.0]))
    assert not populations(density, density.initial())[0].normal


def test_spread_with_a_prior_has_the_posterior_of_it():
    y = cf.balanced(8, 4)

    def model(y):
        tau = pyro.sample("tau", dist.LogNormal(cf.real(0.0), 0.2))
        with pyro.plate("group", len(y), dim=-1):
            d = pyro.sample("d", dist.Normal(cf.real(5.0), tau))
            with pyro.plate("repeat", y.shape[1], dim=-2):
                pyro.sample("y", dist.Normal(d, 2.0), obs=y.T)

    f = fit(model, y, method="svi", steps=600, cooldown=300, evaluate=50)
    row, tau = f.variance_components(), f.fixed_effects()
    assert row["se"][0] == pytest.approx(tau["se"][0], rel=0.3)


def test_observations_of_ragged_sequences():
    y = torch.zeros(5, 3, dtype=REAL)

    def model(y, lengths):
        with pyro.plate("animal", 3, dim=-1):
            z = 0
            for t in pyro.markov(range(len(y))):
                with pyro.poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2, dtype=REAL)[z]))
                    pyro.sample(f"y_{t}", dist.Normal(z.to(REAL) + 0.1, 1.0), obs=y[t])

    density = compile(model, y, torch.tensor([2, 5, 3]))
    assert observations_by(density, ("animal",)).tolist() == [2, 5, 3]


def test_a_joint_mode_does_not_know_its_uncertainty():
    f = fit(cf.random_intercept, cf.balanced(), method="map", fix={"tau": 1.0})
    with pytest.raises(FitError, match="method='laplace'"):
        f.shrinkage()
    with pytest.raises(FitError, match="no random effects of plate 'herd'"):
        f.shrinkage("herd")
