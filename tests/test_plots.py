"""Pictures show the numbers they should: densities integrate to the time in each state, panels hold every member."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import symhmm
from symhmm import plots
from symhmm.datasets import simulate_mixed_hmm
from symhmm.errors import DataError, FitError
from symhmm.models import MixedHMM
from symhmm.tables.data import SequenceData


def program(data):
    loc = pyro.param("loc", lambda: torch.tensor([-1.5, 1.5], dtype=torch.float64))
    rate = pyro.param("rate", lambda: torch.tensor([1.0, 4.0], dtype=torch.float64), constraints.positive)
    stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    with pyro.plate("animal", data.num_sequences, dim=-1):
        own = pyro.sample("own", dist.Normal(torch.zeros((), dtype=torch.float64), 0.3))
        z = 0
        for t in pyro.markov(range(data.num_steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(stay[z]))
            with pyro.poutine.mask(mask=data.observed["y"][t]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z] + own, 1.0), obs=data.y[t])
            with pyro.poutine.mask(mask=data.observed["count"][t]):
                pyro.sample(f"count_{t}", dist.Poisson(Vindex(rate)[z]), obs=data["count"][t])


@pytest.fixture(scope="module")
def fit():
    generator = torch.Generator().manual_seed(0)
    data, truth = simulate_mixed_hmm(4, 60, 2, shortest=30, missing=0.1, dtype=torch.float64, generator=generator)
    count = torch.poisson(torch.tensor([1.0, 4.0]).double()[truth.states.clamp_min(0)], generator=generator)
    streams = {"y": data.y, "count": count}
    whole = SequenceData.from_tensors(
        streams, observed=data.observed["y"], lengths=data.lengths, ids=["a", "b", "c", "d"]
    )
    return symhmm.fit(program, whole, method="laplace")


def test_densities_are_those_of_the_model(fit):
    curves = plots.emission_curves(fit, "y")
    p, seen = fit.smooth()["z_{time}"].values[1:], fit.data.mask[1:]
    own, loc = fit.values["own"], fit.values["loc"]
    at = torch.as_tensor(curves.at)[:, None, None, None]
    each = dist.Normal(loc + own[:, None], 1.0).log_prob(at).exp()
    weight = p * seen[..., None]
    wanted = (each * weight).sum((1, 2)) / weight.sum()
    np.testing.assert_allclose(curves.density, wanted.numpy(), rtol=1e-10, atol=1e-12)


def test_shares_of_counts_sum_to_one(fit):
    curves = plots.emission_curves(fit, "count")
    assert curves.discrete and 0.9 < curves.density.sum() <= 1.0 + 1e-12


def test_every_picture_is_drawn(fit, tmp_path):
    figures = {
        "states": plots.plot_states(fit, ["d", "a"], stream="count"),
        "emissions": plots.plot_emissions(fit),
        "effects": plots.plot_random_effects(fit),
        "moves": plots.plot_transitions(fit),
        "residuals": plots.plot_residuals(fit, "y"),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
    titles = [a.get_title(loc="right") for a in figures["states"].axes]
    assert titles[::2] == ["id d", "id a"]
    assert sorted(x.get_text() for x in figures["effects"].axes[0].get_yticklabels()) == ["a", "b", "c", "d"]
    shares = [float(x.get_text()) for x in figures["moves"].axes[0].texts]
    counts = fit.transition_counts()["z_{time}"].values.sum(0)
    np.testing.assert_allclose(shares, (counts / counts.sum(-1, keepdim=True)).reshape(-1), atol=5e-4)


def test_what_cannot_be_drawn_is_said(fit):
    with pytest.raises(FitError, match="no observed site is called after stream 'z'"):
        plots.plot_residuals(fit, "z")
    with pytest.raises(FitError, match="'z' is no argument"):
        plots.emission_curves(fit, "z")

    def plain(y):
        pyro.sample("y", dist.Normal(pyro.param("loc", torch.tensor(0.0)), 1.0), obs=y)

    with pytest.raises(FitError, match="no SequenceData"):
        plots.plot_states(symhmm.fit(plain, torch.tensor(1.0)))


@pytest.fixture(scope="module")
def sessions():
    generator = torch.Generator().manual_seed(1)
    y = torch.randn(20, 2, 3, generator=generator, dtype=torch.float64)
    rows = [
        {"id": who, "day": f"day {s}", "y": float(y[t, s, i])}
        for i, who in enumerate("abc")
        for s in range(2 if who != "b" else 1)
        for t in range(15 + 5 * s)
    ]
    data = SequenceData.from_frame(pd.DataFrame(rows), id="id", session="day", streams=["y"])
    return MixedHMM(2, {"y": "gaussian"}).fit(data, restarts=1, max_evaluations=5)


def drawn(figure):
    return [a.get_title(loc="right") for a in figure.axes][::2]


def test_sequences_are_chosen_by_individual_and_session(sessions):
    everyone = ["id a, day day 0", "id a, day day 1", "id b, day day 0", "id c, day day 0", "id c, day day 1"]
    assert drawn(plots.plot_states(sessions)) == everyone
    # Of few sequences, each individual's first.
    assert drawn(plots.plot_states(sessions, most=3)) == [everyone[0], everyone[2], everyone[3]]
    assert drawn(plots.plot_states(sessions, ["c"])) == everyone[3:]
    figure = plots.plot_states(sessions, [("a", "day 1")])
    assert drawn(figure) == everyone[1:2]
    points = figure.axes[1].collections[0].get_offsets()
    wanted = sessions.data["y"][:20, 1, 0]
    np.testing.assert_allclose(points[:, 1], wanted.numpy())
    assert figure.axes[1].get_xlim() == (0, 20)
    with pytest.raises(DataError, match="no id 'z'"):
        plots.plot_states(sessions, ["z"])
    with pytest.raises(DataError, match=r"'b' has no session 'day 1'[\s\S]*known: 'day 0'"):
        plots.plot_states(sessions, [("b", "day 1")])


def test_single_values_are_bars_beside_the_curves(tmp_path):
    generator = torch.Generator().manual_seed(2)
    y = torch.rand(50, 2, generator=generator, dtype=torch.float64)
    data = SequenceData.from_tensors({"y": torch.where(y < 0.3, 0.0, y)})
    fit = MixedHMM(2, {"y": "zero_inflated_gamma"}).fit(data, restarts=1, max_evaluations=5)
    figure = plots.plot_emissions(fit)
    figure.savefig(tmp_path / "emissions.png")
    curves, bars = figure.axes
    share = float((data["y"] == 0).double().mean())
    assert bars.get_ylabel() == "share that is 0"
    assert [b.get_height() for b in bars.patches] == pytest.approx([share, *plots.emission_curves(fit, "y").shares[0]])
    # The histogram is of the other values: with the bar it makes one.
    heights, edges, _ = curves.patches[0].get_data()
    assert (heights * np.diff(edges)).sum() == pytest.approx(1 - share)


def test_streams_of_vectors_have_points_but_no_curves():
    def pairs(data):
        loc = pyro.param("loc", torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
        with pyro.plate("animal", data.num_sequences, dim=-1):
            z = torch.tensor(0)
            for t in pyro.markov(range(data.num_steps)):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]]).double()[z]))
                with pyro.poutine.mask(mask=data.mask[t]):
                    pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0).to_event(1), obs=data.y[t])

    y = torch.randn(12, 2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    fit = symhmm.fit(pairs, SequenceData.from_tensors({"y": y}, lengths=[12, 9]), restarts=1, max_evaluations=3)
    clouds = plots.plot_states(fit, [1]).axes[1].collections
    np.testing.assert_allclose(np.stack([c.get_offsets()[:, 1] for c in clouds], -1), y[:9, 1].numpy())
    with pytest.raises(FitError, match="no stream has one number per step"):
        plots.plot_emissions(fit)
