"""Published and independently computed fits, from the table to the maximum through `SequenceData` and `MixedHMM` alone."""

import numpy as np
import pandas as pd
import pytest
import torch

from symhmm import MixedHMM
from symhmm.errors import DataError
from symhmm.models.glm_hmm import GLMHMM, weights
from symhmm.tables.data import SequenceData

BINARY = ["GR.tight", "dive.CS.pres", "dive.SS.pres", "presurf", "postsurf"]
WHALES = {
    "dive.dur": "weibull", "dive.depth": "gamma", "GR.speed2": "gamma", "dive.pitchvar2": "beta",
    "breath.headchange": "vonmises", "GR.size": "poisson", **dict.fromkeys(BINARY, "bernoulli"),
}  # fmt: skip


@pytest.fixture
def speed(data_file):
    table = pd.read_csv(data_file("speed.csv"))
    table["corr"] = (table["corr"] == "cor").astype(float)
    return SequenceData.from_frame(table, id="series", streams=["rt", "corr"], covariates=["Pacc"])


@pytest.mark.parametrize(
    "emissions, transitions, size, wanted",
    [
        ({"rt": "gaussian"}, None, 7, -84.3417),
        ({"rt": "gaussian", "corr": "bernoulli"}, None, 9, -296.1078),
        # Visser and Speekenbrink (2010), Journal of Statistical Software 36(7), section 4.2: -248.97 with 11 parameters.
        ({"rt": "gaussian", "corr": "bernoulli"}, "~ Pacc", 11, -248.97),
    ],
)
def test_speed_and_accuracy(speed, emissions, transitions, size, wanted):
    model = MixedHMM(2, emissions, transitions=transitions, initial="free", timing="from")
    fit = model.fit(speed, restarts=2)
    assert fit.estimate.n_parameters == size
    assert fit.objective == pytest.approx(wanted, abs=6e-3 if transitions else 1e-4)


@pytest.mark.parametrize(
    "states, initial, wanted",
    [(1, "stationary", -391.9189), (2, "stationary", -342.3183), (3, "stationary", -329.4603), (2, "free", -341.8787),
     (3, "free", -328.5275)],
)  # fmt: skip
def test_earthquakes(data_file, states, initial, wanted):
    data = SequenceData.from_frame(data_file("earthquakes.csv"), time="year", streams=["count"])
    fit = MixedHMM(states, {"count": "poisson"}, initial=initial).fit(data)
    assert fit.objective == pytest.approx(wanted, abs=1e-4)
    assert fit.values["count.rate"].tolist() == sorted(fit.values["count.rate"].tolist())


@pytest.fixture
def simulated(data_file):
    return SequenceData.from_frame(data_file("sim_mixed.csv"), id="ID", time="time", streams=["y"])


@pytest.mark.parametrize(
    "transitions, wanted, exact", [(None, -17605.3620, None), ({"0>1": "~ (1 | ID)"}, -17539.6614, -17539.4439)]
)
def test_simulated_mixed_effects(simulated, transitions, wanted, exact):
    fit = MixedHMM(3, {"y": "gaussian"}, transitions=transitions, initial="uniform").fit(simulated, restarts=1)
    assert fit.objective == pytest.approx(wanted, abs=2e-4)
    if exact is not None:
        # The integral without Laplace's approximation, at the same values.
        assert fit.estimate.marginal[0] == pytest.approx(exact, abs=2e-3)


@pytest.mark.slow
def test_six_random_intercepts(simulated, data_file):
    fit = MixedHMM(3, {"y": "gaussian"}, transitions="~ (1 | ID)", initial="uniform").fit(simulated, restarts=1)
    assert fit.objective == pytest.approx(-17495.4286, abs=1e-3)
    truth = pd.read_csv(data_file("sim_mixed_truth_re.csv")).drop(columns="ID").to_numpy()
    effects = np.array(fit.random_effects("ID")["estimate"]).reshape(20, 6)
    assert np.corrcoef(effects[:, 0], truth[:, 0])[0, 1] > 0.9


@pytest.mark.slow
def test_pilot_whales(data_file):
    data = SequenceData.from_frame(data_file("pilot_whales.csv"), id="ID", streams=list(WHALES), support=WHALES)
    fit = MixedHMM(4, WHALES, fixed={"breath.headchange.mean": 0.0}).fit(data, restarts=2)
    assert fit.estimate.n_parameters == 72
    assert fit.objective == pytest.approx(-18510.4012, abs=1e-3)
    assert fit.aic == pytest.approx(37164.80, abs=0.01)


def test_elk(data_file):
    """One step of exactly zero: a gamma refuses it by row; distance to water moves the switching."""
    data = SequenceData.from_frame(
        data_file("elk_steps.csv"), id="ID", streams=["step", "angle"], covariates=["dist_water"]
    )
    emissions = {"step": "zero_inflated_gamma", "angle": "vonmises"}
    with pytest.raises(DataError, match=r"'step'(.|\n)*row 729"):
        MixedHMM(2, {**emissions, "step": "gamma"}).fit(data)
    free = {"angle.mean": "~ 1"}
    plain = MixedHMM(2, emissions, formulas=free).fit(data, restarts=2)
    water = MixedHMM(2, emissions, formulas=free, transitions="~ dist_water").fit(data, restarts=2)
    found = dict(zip(water.fixed_effects()["name"], water.fixed_effects()["estimate"], strict=True))
    assert water.objective > plain.objective + 5
    assert found["step.mean 0"] < 0.6 < 2 < found["step.mean 1"]
    assert found["step.zero 1"] < 1e-3 < found["step.zero 0"]


@pytest.mark.slow
def test_haggis(data_file):
    """Simulated by moveHMM's authors with slope on the switching: slow haggises turn round, fast ones go straight."""
    data = SequenceData.from_frame(
        data_file("haggis_steps.csv"), id="ID", streams=["step", "angle"], covariates=["slope", "temp"]
    )
    emissions, free = {"step": "gamma", "angle": "vonmises"}, {"angle.mean": "~ 1"}
    fits = {
        f: MixedHMM(2, emissions, formulas=free, transitions=f).fit(data, restarts=2)
        for f in ("~ 1", "~ slope", "~ slope + temp")
    }
    values = [fits[f].objective for f in fits]
    assert values == sorted(values) and values[1] > values[0] + 10
    assert fits["~ slope"].values["angle.mean"][0].abs() > 2.5 and fits["~ slope"].values["angle.mean"][1].abs() < 0.5
    # A constant moved into the covariate changes its coefficients and nothing else.
    centred = MixedHMM(2, emissions, formulas=free, transitions="~ center(slope)").fit(data, restarts=2)
    assert centred.objective == pytest.approx(fits["~ slope"].objective, abs=1e-3)
    torch.testing.assert_close(
        centred.values["transitions"][..., 1], fits["~ slope"].values["transitions"][..., 1], atol=1e-3, rtol=0
    )


@pytest.mark.slow
def test_elephant_seals_with_random_effects(data_file):
    data = SequenceData.from_frame(data_file("elephant_seals_steps.csv"), id="ID", streams=["step", "angle"])
    emissions = {"step": "gamma", "angle": "vonmises"}
    alike = MixedHMM(3, emissions, transitions="~ 1").fit(data, restarts=2)
    apart = MixedHMM(3, emissions, transitions="~ (1 | ID)").fit(data, restarts=1)
    assert apart.objective > alike.objective
    assert len(apart.random_effects("ID")) == 6 * data.num_sequences


@pytest.mark.slow
def test_a_rat_that_listens_or_not(data_file):
    """20000 trials, a chain each day; the best of several starts has an attentive state and two biased ones."""
    table = pd.read_csv(data_file("psytrack_rat_W053.csv")).assign(right=lambda t: t.y - 1)
    data = SequenceData.from_frame(
        table, session="session", streams=["right"], covariates=["s1", "s2", "h_prev", "c_prev"]
    )
    assert data.num_sessions == 80 and int(data.mask.sum()) == 20000
    fit = GLMHMM(3, "right", "~ s1 + s2 + h_prev + c_prev").fit(data, "map", priors=True, restarts=5)
    table = weights(fit)
    best = int(np.argmax(np.array(table["s1"]) - np.array(table["s2"])))
    assert table["s1"][best] > 1.5 and table["s2"][best] < -1.5
    assert min(table["Intercept"]) < -0.5 < 0.5 < max(table["Intercept"])
    share = fit.occupancy().only.values.reshape(-1, 3).sum(0) / 20000
    assert float(share.min()) > 0.1


def test_tables_in_any_order_give_the_same_model():
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "id": np.repeat(["a", "b", "c"], 8),
            "t": np.tile(np.arange(8), 3),
            "y": rng.normal(size=24),
            "x": rng.normal(size=24),
            "site": np.repeat(["sea", "ice", "sea"], 8),
        }
    )
    model = MixedHMM(2, {"y": "gaussian"}, transitions="~ x * site + (1 | id)")
    found = []
    for rows in (table, table.sample(frac=1, random_state=1)):
        data = SequenceData.from_frame(rows, id="id", time="t", streams=["y"], covariates=["x", "site"])
        density = model.log_density(data)
        found.append(density.log_prob(density.initial()))
    torch.testing.assert_close(found[0], found[1])
    columns = model.bind(data).blocks["transitions"][0].design.columns
    assert columns == ("Intercept", "x", "site[sea]", "x:site[sea]")
