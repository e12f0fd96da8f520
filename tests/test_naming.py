"""Answers speak of the user's individuals, times, sessions and states, in the kind of frame that came in."""

import numpy as np
import pandas as pd
import polars as pl
import pyro
import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.errors import DataError
from symhmm.tables.data import SequenceData


def program(data):
    loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.0], dtype=torch.float64))
    stay = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    with pyro.plate("animal", data.num_sequences, dim=-1):
        if data.mask.dim() == 3:
            sessions = pyro.plate("day", data.num_sessions, dim=-2)
        else:
            sessions = pyro.poutine.mask(mask=torch.tensor(True))
        with sessions:
            z = 0
            for t in pyro.markov(range(data.num_steps)):
                z = pyro.sample(f"z_{t}", dist.Categorical(stay[z]))
                with pyro.poutine.mask(mask=data.mask[t]):
                    pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=data.y[t])


def table():
    rng = np.random.default_rng(0)
    rows = [(i, f"d{d}", 10 * d + t, rng.normal()) for i in ("eve", "ann") for d in range(2) for t in range(3 + d)]
    return pd.DataFrame(rows, columns=["who", "visit", "minute", "y"])[:-1]


@pytest.mark.parametrize("kind", [pd.DataFrame, pl.DataFrame])
def test_frames_have_ids_and_times_and_join_the_table(kind):
    df = table()
    native = df if kind is pd.DataFrame else pl.from_pandas(df)
    data = SequenceData.from_frame(native, id="who", time="minute", streams=["y"], step="order")
    fit = symhmm.fit(program, data)
    path = fit.viterbi()["z_{time}"]
    frame = path.to_frame()
    assert isinstance(frame, kind) and set(frame.columns) == {"time", "animal", "minute", "value"}
    joined = df.merge(path.to_frame("pandas"), left_on=["who", "minute"], right_on=["animal", "minute"])
    assert len(joined) == len(df) == len(frame)
    one = fit.smooth()["z_{time}"].sel(animal="ann")
    assert one.to_frame("pandas")["minute"].tolist() == df[df.who == "ann"].minute.tolist()
    assert fit.log_likelihood_by("animal").labels["animal"] == ("ann", "eve")
    assert fit.residuals("y_{time}").labels["animal"] == ("ann", "eve")
    assert "minute" not in fit.predict(2)["z_{time}"].along
    with pytest.raises(DataError, match="no animal 'bob'"):
        path.sel(animal="bob")


def test_sessions_have_their_names():
    df = table()
    data = SequenceData.from_frame(df, id="who", time="minute", session="visit", streams=["y"])
    frame = symhmm.fit(program, data).viterbi()["z_{time}"].to_frame()
    assert set(frame.columns) == {"time", "day", "animal", "visit", "minute", "value"}
    joined = df.merge(frame, left_on=["who", "visit", "minute"], right_on=["animal", "visit", "minute"])
    assert len(joined) == len(df)


def test_plain_tensors_keep_their_numbers():
    def plain(y):
        with pyro.plate("animal", y.shape[-1]):
            z = 0
            for t in pyro.markov(range(len(y))):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.8, 0.2], [0.3, 0.7]])[z]))
                pyro.sample(f"y_{t}", dist.Normal(pyro.param("loc", torch.tensor([-1.0, 1.0]))[z], 1.0), obs=y[t])

    fit = symhmm.fit(plain, torch.randn(5, 2))
    assert fit.data is None and fit.viterbi()["z_{time}"].labels["animal"] == (0, 1)
