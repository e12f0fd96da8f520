"""Fits of models: names in tables, states in order, effects carried to other data, programs as text."""

import linecache

import pyro.distributions as dist
import pytest
import torch

from symhmm import MixedHMM, load
from symhmm.errors import DataError, FitError
from symhmm.models.model_fit import ModelFit
from symhmm.models.order import moves, new_order
from symhmm.models.template import program
from symhmm.reorder import reordered
from symhmm.tables.data import Labels, SequenceData
from symhmm.tables.results import Estimate, Status

IDS = ("ann", "bo", "cy", "di", "eli", "fay")


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def simulated(ids=IDS, steps=60, seed=0, levels=(-2.0, 2.0)):
    """Two states whose leaving depends on x and on the individual."""
    g = torch.Generator().manual_seed(seed)
    n = len(ids)
    x, own = torch.randn(steps, n, generator=g), torch.randn(n, generator=g)
    z, path = torch.zeros(n, dtype=torch.long), []
    for t in range(steps):
        leave = (-1 + x[t] * torch.tensor([1.0, -1.0])[z] + own).sigmoid()
        z = torch.where(torch.rand(n, generator=g) < leave, 1 - z, z)
        path.append(z)
    y = torch.tensor(levels)[torch.stack(path)] + torch.randn(steps, n, generator=g)
    return SequenceData.from_tensors(
        {"y": y},
        covariates={"x": x},
        groups={"herd": torch.arange(n) % 2},
        levels={"herd": ("a", "b")},
        labels=Labels(ids, id="ID"),
    )


@pytest.fixture(scope="module")
def fit():
    torch.set_default_dtype(torch.float64)
    model = MixedHMM(["low", "high"], {"y": "gaussian"}, transitions="~ x + (1 | ID)")
    return model.fit(simulated(), restarts=1)


def test_tables_speak_of_states_moves_columns_and_groups(fit):
    assert fit.status.ok
    assert fit.fixed_effects()["name"] == (
        "transitions low>high Intercept", "transitions low>high x", "transitions high>low Intercept", "transitions high>low x",
        "sd transitions|ID low>high", "sd transitions|ID high>low", "y.mean low", "y.mean high", "y.sd low", "y.sd high",
    )  # fmt: skip
    assert "transitions|ID low>high bo" in fit.shrinkage("ID")["effect"]
    own = fit.random_effects("ID")
    assert own["name"][:3] == (
        "transitions|ID low>high ann",
        "transitions|ID high>low ann",
        "transitions|ID low>high bo",
    )
    text = str(fit.summary())
    assert "transitions low>high x" in text and "transitions[" not in text and "|ID[" not in text
    assert "sd transitions|ID low>high" in str(fit.variance_components())


def test_estimates_are_those_of_the_simulation(fit):
    found = dict(zip(fit.fixed_effects()["name"], fit.fixed_effects()["estimate"], strict=True))
    assert found["y.mean low"] == pytest.approx(-2, abs=0.4) and found["y.mean high"] == pytest.approx(2, abs=0.4)
    assert found["transitions low>high x"] == pytest.approx(1, abs=0.5)
    assert found["transitions high>low x"] == pytest.approx(-1, abs=0.5)


@pytest.mark.parametrize("initial", ["free", "stationary"])
def test_states_can_be_moved(initial):
    """A fit that starts with its states the wrong way round comes out in order, at the same objective."""
    data = simulated()
    model = MixedHMM(3, {"y": "gaussian"}, transitions="~ x", initial=initial)
    one = model.fit(data, restarts=1)
    mean = one.values["y.mean"]
    assert mean.tolist() == sorted(mean.tolist())
    for order in ([2, 0, 1], [1, 0, 2]):
        moved = reordered(one.estimate, one.density, moves(one.bound, torch.tensor(order)))
        torch.testing.assert_close(moved.values["y.mean"], mean[order])
        torch.testing.assert_close(one.density.log_prob(moved.values), one.density.log_prob(one.values))
        torch.testing.assert_close(one.density.pack(moved.values), moved.vector)
        assert new_order(one.bound, moved.values, None).tolist() == torch.tensor(order).argsort().tolist()


def test_the_posterior_of_the_effects_moves_with_the_states(fit):
    moved = reordered(fit.estimate, fit.density, moves(fit.bound, torch.tensor([1, 0])))
    entry = fit.density.layout["transitions|ID"]
    for before, after in (
        (fit.estimate.posterior.vector, moved.posterior.vector),
        (fit.estimate.posterior.sd, moved.posterior.sd),
    ):
        one, other = (v[entry.start : entry.stop].reshape(len(IDS), 2) for v in (before, after))
        torch.testing.assert_close(other, one.flip(-1))
    draws = moved.posterior.sample(4000, seed=1)
    torch.testing.assert_close(
        draws[:, entry.start : entry.stop].mean(0), moved.posterior.vector[entry.start : entry.stop], atol=0.1, rtol=0
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"transitions": {"0>1": "~ x"}},
        {"fixed": {"y.sd": [1.0, 2.0]}},
        {"initial": "~ x"},
        {"formulas": {"y.mean": {"0": "~ x"}}},
    ],
)
def test_states_that_are_not_alike_stay(arguments):
    model = MixedHMM(2, {"y": "gaussian"}, **arguments)
    bound = model.bind(simulated())
    density = model.log_density(simulated())
    assert new_order(bound, density.initial(), None) is None


def test_other_data(fit):
    """The same data again give the same; others keep the effects of those they share, and 0 for the rest."""
    same = fit.on(simulated())
    torch.testing.assert_close(same.density.log_prob(same.values), fit.density.log_prob(fit.values))
    data = simulated(("new", "di"), steps=20, seed=5)
    new = fit.on(data)
    torch.testing.assert_close(
        new.values["transitions|ID"], torch.stack([torch.zeros(2, 1), fit.values["transitions|ID"][3]])
    )
    assert new.smooth().only.values.shape == (20, 2, 2)
    assert "transitions|ID high>low di" in new.random_effects("ID")["name"]


def test_the_coding_of_the_first_data_holds_for_others():
    data, other = simulated(), simulated(steps=30, seed=9)
    fit = MixedHMM(2, {"y": "gaussian"}, transitions="~ scale(x) + herd").fit(data, restarts=1)
    plain = MixedHMM(2, {"y": "gaussian"}, transitions="~ x + herd").fit(data, restarts=1)
    # Scaled by the mean and standard deviation of the first data, both are the same model.
    one, two = fit.on(other), plain.on(other)
    torch.testing.assert_close(one.density.log_prob(one.values), two.density.log_prob(two.values), rtol=1e-6, atol=1e-3)
    with pytest.raises(DataError, match="herd"):
        fit.on(SequenceData.from_tensors(other.streams, covariates=other.covariates))


def test_the_program_is_text_that_runs(fit):
    text = fit.program_source()
    model = program(text)
    assert program(text) is model
    assert fit.density.program is model
    assert "pyro.markov" in "".join(linecache.getlines(model.__code__.co_filename))
    # What is printed, run as a file of its own, is the same density.
    space: dict = {}
    exec(text.replace("def model", "def copied"), space)
    from symhmm import compile

    density = compile(space["copied"], fit.bound.inputs, dict(fit.start))
    torch.testing.assert_close(density.log_prob(fit.values), fit.density.log_prob(fit.values), rtol=1e-13, atol=1e-10)


def test_names_of_columns_cannot_become_code():
    g = torch.Generator().manual_seed(0)
    evil = 'y"); import os; ("\n"""{t}\\'
    data = SequenceData.from_tensors({evil: torch.randn(5, 3, generator=g)}, labels=Labels("abc", id='i"d'))
    model = MixedHMM(["a\n#", 'b"""'], {evil: "gaussian"})
    density = model.log_density(data)
    assert density.size == 6
    assert "import os" not in [line.strip() for line in model.program_source(data).splitlines()]


def test_a_maximum_with_priors():
    fit = MixedHMM(2, {"y": "gaussian"}, transitions="~ x", priors={}).fit(simulated(), method="map", restarts=1)
    assert fit.values["y.mean"].tolist() == pytest.approx([-2, 2], abs=0.4)
    assert 'pyro.sample("y.mean", dist.Normal(*prior["y.mean"])' in fit.program_source()


@pytest.mark.slow
def test_variational_fits_and_groups_above_the_individuals():
    model = MixedHMM(2, {"y": "gaussian"}, transitions="~ x + (1 | herd/ID)")
    fit = model.fit(simulated(), method="svi", restarts=1)
    assert fit.values["y.mean"].tolist() == pytest.approx([-2, 2], abs=0.4)
    assert fit.random_effects("herd")["name"][-1] == "transitions|herd 1>0 b"
    assert fit.random_effects("ID")["name"][0] == "transitions|herd:ID 0>1 ann"
    new = fit.on(simulated(("new", "di"), steps=20, seed=5))
    torch.testing.assert_close(new.values["transitions|herd"], fit.values["transitions|herd"])


def test_correlations_stand_among_the_components():
    data = simulated()
    model = MixedHMM(2, {"y": "gaussian"}, transitions={"0>1": "~ x + (x | ID)"})
    bound, density = model.bind(data), model.log_density(data)
    own = "transitions[0>1]|ID"
    values = density.initial() | {f"{own}.corr": torch.tensor([[1.0, 0.0], [0.6, 0.8]])}
    estimate = Estimate("map", values, density.pack(values), 0.0, "", torch.zeros(1), Status(True, ""), 0, 0.0, {})
    fit = ModelFit(estimate, density, model, bound, {})
    assert not any("corr" in n for n in fit.fixed_effects()["name"])
    components = fit.variance_components()["component"]
    assert components == (f"sd {own} Intercept", f"sd {own} x", f"correlation {own} Intercept, {own} x")


def test_saved_and_loaded(fit, tmp_path):
    fit.save(tmp_path / "fit")
    back = load(tmp_path / "fit", fit.model, simulated())
    assert str(back.summary()) == str(fit.summary())
    assert back.program_source() == fit.program_source()
    torch.testing.assert_close(back.on(simulated(seed=3)).values, fit.on(simulated(seed=3)).values)
    with pytest.raises(DataError, match="other data"):
        load(tmp_path / "fit", fit.model, simulated(seed=3))


def test_priors_are_saved(tmp_path):
    model = MixedHMM(2, {"y": "gaussian"}, priors={"y.sd": dist.LogNormal(0.0, 1.0)})
    fit = model.fit(simulated(), method="map", restarts=1)
    fit.save(tmp_path / "fit")
    back = load(tmp_path / "fit", model, simulated())
    torch.testing.assert_close(back.density.log_prob(back.values), fit.density.log_prob(fit.values))


def test_states_are_ordered_by_a_parameter_or_refused(fit):
    by_spread = fit.ordered(by="y.sd")
    spread = by_spread.values["y.sd"]
    assert spread.tolist() == sorted(spread.tolist())
    mean = by_spread.ordered(by="y").values["y.mean"]
    assert mean.tolist() == sorted(mean.tolist())
    with pytest.raises(FitError, match=r"(?s)order of 'z.mean'.*parameters: .*y.mean, y.sd"):
        fit.ordered(by="z.mean")
    with pytest.raises(FitError, match=r"(?s)have names from the start.*low, high"):
        fit.with_states("a", "b")


def test_the_summary_says_what_is_held_and_how_to_fit_it():
    angle = dist.VonMises(torch.tensor(2.0), 3.0).sample((30, 2))
    data = SequenceData.from_tensors({"angle": angle})
    short = {"restarts": 1, "max_evaluations": 3}
    held = MixedHMM(2, {"angle": "vonmises"}).fit(data, **short).summary().text
    assert "held fixed      angle.mean = 0; formulas={'angle.mean': '~ 1'} fits it\n\n" in held
    free = MixedHMM(2, {"angle": "vonmises"}, formulas={"angle.mean": "~ 1"}).fit(data, **short).summary().text
    assert "held fixed" not in free and "angle.mean 0" in free
    both = MixedHMM(2, {"angle": "vonmises"}, fixed={"angle.mean": [0.0, 3.0]}).fit(data, **short).summary().text
    assert "angle.mean = 0, 3;" in both
