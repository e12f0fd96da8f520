import math

import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.fitting import fit


def test_summary_of_a_maximum_has_everything():
    y = cf.sample(50)
    f = fit(cf.gaussian, y)
    text = repr(f.summary())
    value = cf.gaussian_maximum(y)
    assert f"log-likelihood: {value:.4f} nats" in text
    assert f"AIC {4 - 2 * value:.2f}" in text
    assert "2 = loc 1 + sd 1; 50 observations" in text
    assert "central differences of the exact gradient" in text
    assert f.status.ok
    assert f.n_observations == 50
    assert f.objective == pytest.approx(value)
    assert f.aic == pytest.approx(4 - 2 * value)
    assert f.bic == pytest.approx(2 * math.log(50) - 2 * value)


def test_standard_errors_are_the_known_ones():
    y = cf.sample(50)
    table = fit(cf.gaussian, y).fixed_effects()
    sd = float(y.std(correction=0))
    assert table["name"] == ("loc", "sd")
    assert table["se"] == pytest.approx([sd / 50**0.5, sd / 100**0.5], rel=1e-4)
    low, high = table["2.5%"][1], table["97.5%"][1]
    assert low > 0
    assert low * high == pytest.approx(sd**2)


def test_standard_errors_of_a_simplex():
    def model(y):
        p = pyro.param("p", cf.real([0.2, 0.3, 0.5]), constraint=constraints.simplex)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Categorical(p), obs=y)

    f = fit(model, torch.tensor([0] * 10 + [1] * 30 + [2] * 60), restarts=1)
    table = f.fixed_effects()
    wanted = [(q * (1 - q) / 100) ** 0.5 for q in (0.1, 0.3, 0.6)]
    assert table["estimate"] == pytest.approx([0.1, 0.3, 0.6], abs=1e-4)
    assert table["se"] == pytest.approx(wanted, rel=1e-3)
    assert all(0 < low < high < 1 for low, high in zip(table["2.5%"], table["97.5%"], strict=True))
    assert f.estimate.n_parameters == 2


def test_flat_directions_have_no_standard_error_and_are_counted():
    def model(y):
        a = pyro.param("a", cf.real(0.0))
        b = pyro.param("b", cf.real(0.0))
        sd = pyro.param("sd", cf.real(1.0), constraint=constraints.positive)
        with pyro.plate("n", len(y)):
            pyro.sample("y", dist.Normal(a + b, sd), obs=y)

    f = fit(model, cf.sample())
    se = dict(zip(*(f.fixed_effects()[c] for c in ("name", "se")), strict=True))
    assert f.information.rank == 2
    assert se["a"] != se["a"]
    assert se["sd"] > 0
    assert "1 of 3 directions are flat" in repr(f.summary())
    assert "with the 2 values that the data determine" in repr(f.summary())


@pytest.fixture(scope="module")
def mixed():
    y = cf.balanced()
    return y, fit(cf.random_intercept, y, method="svi", steps=1500, cooldown=600)


def test_random_effects_by_member(mixed):
    y, f = mixed
    table = f.random_effects("group")
    mean, sd = cf.random_intercept_posterior(y, f.values["loc"].item(), f.values["tau"].item())
    assert len(table) == len(y)
    assert table["name"][0] == "d[0]"
    assert table["estimate"] == pytest.approx(mean.tolist(), abs=0.1)
    assert table["sd"] == pytest.approx([sd] * len(y), rel=0.15)
    assert all(low < e < high for low, e, high in zip(table["2.5%"], table["estimate"], table["97.5%"], strict=True))
    with pytest.raises(FitError, match=r"of plate 'herd'(.|\n)*group"):
        f.random_effects("herd")


def test_summary_of_a_bound_labels_it(mixed):
    _, f = mixed
    text = repr(f.summary())
    assert "ELBO (lower bound of the log-likelihood)" in text
    assert "importance-weighted" in text.split("AIC")[1].splitlines()[0]
    assert "group" in text
    assert f.estimate.n_parameters == 2


def test_joint_modes_give_no_information_criterion():
    f = fit(cf.with_prior, cf.sample(), method="map")
    assert "AIC" not in repr(f.summary())
    with pytest.raises(FitError, match="no marginal likelihood"):
        f.aic  # noqa: B018
    assert "log-posterior density" in repr(f.summary())


def test_masked_observations_do_not_count():
    def model(y, mask):
        loc = pyro.param("loc", cf.real(0.0))
        with pyro.plate("n", len(y)), pyro.poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    y = cf.sample(20)
    assert fit(model, y, torch.arange(20) < 13, restarts=1).n_observations == 13


def test_observations_of_a_chain_are_counted_over_time():
    assert fit(cf.one_state, cf.sample(9), restarts=1).n_observations == 9


def test_fixed_values_are_in_the_table():
    f = fit(cf.gaussian, cf.sample(), fix={"sd": 3.0})
    assert f.values["sd"].item() == 3.0
    assert f.fixed_effects()["role"] == ("fixed effect", "fixed")
    assert f.estimate.counts == {"loc": 1}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "mel"}, "method='mle'"),
        ({"method": "svii"}, "method='svi'"),
        ({"restart": 3}, "restarts="),
        ({"method": "svi", "learning_rate": 1}, "options: .*lr"),
        ({"restarts": 0}, "restarts=1"),
    ],
)
def test_unknown_methods_and_options_are_refused_before_any_work(options, text):
    def never(y):
        if options.get("restarts") is None:
            raise AssertionError("the program ran")
        cf.gaussian(y)

    with pytest.raises(FitError, match=text):
        fit(never, cf.sample(), **options)


def test_nothing_to_fit():
    def model(y):
        pyro.sample("y", dist.Normal(0.0, 1.0).expand([len(y)]).to_event(1), obs=y)

    with pytest.raises(FitError, match="no free values"):
        fit(model, cf.sample())


def test_density_can_be_given():
    density = compile(cf.gaussian, cf.sample())
    assert fit(density, restarts=1).density is density
