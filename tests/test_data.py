"""Tables in and out: the same numbers whatever the kind of frame, the order of rows and the padding; faults by name and row."""

import re

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from torch.testing import assert_close

import symhmm
from symhmm.errors import DataError, SymhmmWarning
from symhmm.tables.data import SequenceData
from symhmm.tables.scan import scan_parquet

COLUMNS = {
    "id": "who",
    "time": "t",
    "streams": ["y", "kind"],
    "covariates": ["x", "habitat"],
    "groups": ["sex"],
    "states": "z",
}


def table(seed=0, individuals=4, gaps=True):
    """A long table with every kind of column, missing values and gaps in time."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(individuals):
        steps = np.arange(3 + int(rng.integers(6)))
        if gaps and len(steps) > 3:
            steps = np.delete(steps, rng.integers(1, len(steps) - 1))
        for t in steps:
            rows.append(
                {
                    "who": f"i{i}",
                    "t": int(t),
                    "y": rng.normal() if rng.random() > 0.2 else np.nan,
                    "kind": rng.choice(["a", "b"]),
                    "x": rng.normal(),
                    "habitat": rng.choice(["sea", "land"]),
                    "sex": "fm"[i % 2],
                    "z": rng.choice(["rest", "move", None]),
                }
            )
    return pd.DataFrame(rows)


def same(a, b):
    assert a.ids == b.ids and a.levels == b.levels
    for x, y in ((a.streams, b.streams), (a.observed, b.observed), (a.covariates, b.covariates), (a.groups, b.groups)):
        assert x.keys() == y.keys()
        for n in x:
            assert_close(x[n], y[n], rtol=0, atol=0)
    assert_close(a.states, b.states, rtol=0, atol=0)
    assert torch.equal(a.mask, b.mask) and torch.equal(a.lengths, b.lengths)
    assert np.array_equal(a.times[a.inside.numpy()], b.times[b.inside.numpy()])


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_the_order_of_rows_does_not_matter(seed):
    df = table(seed)
    straight = SequenceData.from_frame(df, step="order", **COLUMNS)
    order = np.random.default_rng(seed).permutation(len(df))
    shuffled = SequenceData.from_frame(df.iloc[order], step="order", **COLUMNS)
    same(straight, shuffled)
    assert np.array_equal(order[shuffled.gather(shuffled.rows)], straight.gather(straight.rows))


@settings(max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_frame_gives_back_what_came_in(seed):
    df = table(seed)
    data = SequenceData.from_frame(df, step="order", **COLUMNS)
    back = data.frame()
    pd.testing.assert_frame_equal(back[df.columns], df, check_dtype=False)
    assert data.gather(data.rows).tolist() == list(range(len(df)))
    same(SequenceData.from_frame(back, step="order", **COLUMNS), data)
    x = torch.arange(len(df) * 2.0).reshape(-1, 2)
    assert_close(data.gather(data.scatter(x)), x)


@pytest.mark.parametrize("kind", ["polars", "arrow", "mapping", "csv", "parquet"])
def test_every_kind_of_table_gives_the_same_data(kind, tmp_path):
    df = table(3)
    if kind == "csv":
        df.to_csv(tmp_path / "a.csv", index=False)
    if kind == "parquet":
        df.to_parquet(tmp_path / "a.parquet")
    other = {"polars": pl.from_pandas, "arrow": pa.Table.from_pandas, "mapping": lambda d: d.to_dict("list")}
    native = other[kind](df) if kind in other else tmp_path / f"a.{kind}"
    data = SequenceData.from_frame(native, step="order", **COLUMNS)
    same(data, SequenceData.from_frame(df, step="order", **COLUMNS))
    wanted = {"polars": pl.DataFrame, "arrow": pa.Table, "parquet": pa.Table}.get(kind, pd.DataFrame)
    assert isinstance(data.frame(), wanted)


def program(data):
    loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.0], dtype=torch.float64))
    stay = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    with pyro.plate("individual", data.num_sequences, dim=-1):
        z = 0
        for t in pyro.markov(range(data.num_steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(stay[z]))
            with pyro.poutine.mask(mask=data.observed["y"][t]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=data.y[t])


def value(data):
    density = symhmm.compile(program, data)
    return density.value_and_grad(density.pack(density.initial()))


def test_padding_changes_nothing():
    df = table(1)
    read = {"id": "who", "time": "t", "streams": ["y"], "step": 1}
    plain = value(SequenceData.from_frame(df, **read))
    for pad in ("bucket", 30):
        padded = SequenceData.from_frame(df, pad=pad, **read)
        assert padded.num_steps >= 6
        assert_close(value(padded), plain, rtol=1e-12, atol=1e-12)


def test_a_gap_is_a_masked_step():
    """A gap filled by the grid has the likelihood of a row that is there and empty."""
    df = table(1)
    read = {"id": "who", "time": "t", "streams": ["y"], "step": 1}
    whole = SequenceData.from_frame(df, **read)
    full = whole.frame()
    assert len(full) > len(df) and (whole.gather(whole.rows) == -1).sum() == len(full) - len(df)
    assert_close(value(SequenceData.from_frame(full, **read)), value(whole), rtol=1e-13, atol=1e-13)
    apart = value(SequenceData.from_frame(df, **{**read, "step": "order"}))
    assert abs(apart[0] - value(whole)[0]) > 1e-3


def test_sessions_restart_the_chain_and_stay_with_their_individual():
    df = table(2, gaps=False)
    df["day"] = (df.t >= 2).astype(int) + 10
    data = SequenceData.from_frame(df, id="who", time="t", session="day", streams=["y"])
    assert data.mask.shape == (data.num_steps, 2, 4) and data.lengths[0].tolist() == [2] * 4
    assert data.labels.sessions.tolist() == [[10] * 4, [11] * 4]
    assert data.y[0, 1, 2] == df[(df.who == "i2") & (df.t == 2)].y.item() or not data.mask[0, 1, 2]
    assert data.frame()["day"].tolist() == df.day.tolist()
    assert data.take(["i3"]).frame()["t"].tolist() == df[df.who == "i3"].t.tolist()


def test_dates_keep_their_grid():
    when = pd.to_datetime(["2020-01-01 00:00", "2020-01-01 09:36", "2020-01-02 04:48"])
    df = pd.DataFrame({"t": when, "y": [1.0, 2.0, 3.0]})
    with pytest.warns(SymhmmWarning, match=r"1 intervals .* step='9.6h' inserts"):
        SequenceData.from_frame(
            df.assign(t=[when[0], when[1], when[1] + (when[1] - when[0]) * 2]), time="t", streams=["y"]
        )
    data = SequenceData.from_frame(df, time="t", streams=["y"], step="9.6h")
    assert data.observed["y"][:, 0].tolist() == [True, True, False, True]
    assert data.times[2, 0] == np.datetime64("2020-01-01 19:12")
    as_text = SequenceData.from_frame(df.assign(t=when.astype(str)), time="t", streams=["y"], step="auto")
    assert np.array_equal(as_text.times, data.times)


@pytest.mark.parametrize(("policy", "wanted"), [("carry", [1.0, 1.0, 1.0, 4.0]), ("interpolate", [1.0, 2.0, 3.0, 4.0])])
def test_missing_covariates_by_policy(policy, wanted):
    df = pd.DataFrame({"t": [0, 1, 3], "y": 1.0, "x": [1.0, np.nan, 4.0]})
    data = SequenceData.from_frame(df, time="t", streams=["y"], covariates=["x"], step=1, missing_covariates=policy)
    assert data.x[:, 0].tolist() == wanted
    assert "covariate 'x': 2 missing values" in repr(data)


def test_a_stream_of_several_columns_and_a_subset():
    df = table(5)
    data = SequenceData.from_frame(df, id="who", streams={"both": ["x", "t"], "y": "y"})
    assert data.both.shape == (*data.mask.shape, 2)
    assert data.take(["i2", "i0"]).ids == ("i2", "i0") and data.head(1).ids == ("i0",)
    assert data.take(["i2"]).both[:, 0, 0].tolist() == df[df.who == "i2"].x.tolist()
    assert list(data.frame().columns) == ["who", "x", "t", "y"]
    assert data.to(torch.float32).y.dtype == torch.float32


def test_other_data_of_the_same_shape_reuse_the_step_and_keep_their_names():
    first = SequenceData.from_tensors({"y": torch.zeros(4, 2, dtype=torch.float64)}, ids=["a", "b"])
    second = SequenceData.from_tensors({"y": torch.ones(4, 2, dtype=torch.float64)}, ids=["c", "d"])
    one, other = symhmm.compile(program, first), symhmm.compile(program, second)
    assert one.compiled is other.compiled
    assert other.arguments.template[0][0].ids == ("c", "d") and one.arguments.template[0][0].ids == ("a", "b")


def test_a_file_read_by_individual_is_the_file(tmp_path):
    df = table(7, individuals=5)
    df.to_parquet(tmp_path / "big.parquet", row_group_size=4)
    options = {"time": "t", "streams": ["y", "kind"], "covariates": ["x"], "step": "order"}
    whole = SequenceData.from_frame(df, id="who", **options)
    scan = scan_parquet(tmp_path / "big.parquet", id="who", batch=2, **options)
    parts = list(scan)
    assert [p.ids for p in parts] == [("i0", "i1"), ("i2", "i3"), ("i4",)] and len(scan) == 3
    assert {p.num_steps for p in parts} == {whole.num_steps} and all(p.levels == whole.levels for p in parts)
    together = torch.cat([p.y for p in parts], 1)
    assert_close(together[whole.observed["y"]], whole.y[whole.observed["y"]], rtol=0, atol=0)
    with pytest.raises(DataError, match="close: 'who'"):
        scan_parquet(tmp_path / "big.parquet", id="Who", **options)


BASE = pd.DataFrame(
    {"id": [1, 1, 1, 2, 2, 2], "t": [0, 1, 2, 0, 1, 2], "y": [1.0, 2, 3, 4, 5, 6], "x": [1.0, np.nan, 3, 4, 5, 6]}
)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"t": [0, 0, 2, 0, 1, 2]}, {}, "'t' has the same time twice.*id 1: rows 0 and 1"),
        ({}, {"streams": ["step"]}, "no column 'step'"),
        ({}, {"id": "ID"}, "'ID' for id; close: 'id'"),
        ({"y": np.nan}, {}, "'y' has no values"),
        ({"id": range(6)}, {}, "'id' has another name in each of the 6 rows"),
        ({"id": [1, "a", 1, 2, 2, 2]}, {}, "'id' mixes types.*row 1"),
        ({"id": [1, 1, 1, 2, 2, None]}, {}, "'id' names no one.*row 5"),
        ({"id": [1, 1, 1.5, 2, 2, 2]}, {}, "'id' has fractions.*1.5 in row 2"),
        ({"y": [1, 2, np.inf, 4, 5, 6]}, {}, "'y' has infinite values.*row 2"),
        ({"x": [1, 2, -np.inf, 4, 5, 6]}, {"covariates": ["x"]}, "'x' has infinite values.*row 2"),
        ({"t": [0, 1, np.inf, 0, 1, 2]}, {}, "'t' has infinite times.*row 2"),
        ({"t": [0, 1, np.nan, 0, 1, 2]}, {}, "'t' has missing times.*row 2"),
        ({"t": ["2020-01-01", "soon", "2020-01-03"] * 2}, {}, "neither numbers nor dates.*'soon' in row 1"),
        ({"y": pd.Timestamp("2020-01-01")}, {}, "'y' holds dates"),
        ({"y": ["1", "2", "oops", "4", "5", ""]}, {}, "'y' mixes numbers and text.*'oops' in row 2"),
        ({"y": [1, 0, 3, 4, 5, 6]}, {"support": {"y": "gamma"}}, "'y' has values outside.*gamma.*0 in row 1"),
        (
            {"y": [1, 0, 4, 4, 0, 0]},
            {"support": {"y": "vonmises"}},
            "vonmises.*4 in row 2, 4 in row 3.*angles from -pi to pi",
        ),
        (
            {"y": [0.5, 0.5, 1.0, 0.1, 0.2, 0.3]},
            {"support": {"y": "beta"}},
            "1 in row 2.*between 0 and 1",
        ),
        ({"y": [1.5, 1, 1, 1, 1, 1]}, {"support": {"y": "poisson"}}, "1.5 in row 0.*whole numbers"),
        ({}, {"support": {"y": "gama"}}, "Try: 'gamma'"),
        ({}, {"support": {"z": "gamma"}}, "'z', which is no stream"),
        ({}, {"covariates": ["x"]}, "covariate 'x' is missing.*row 1.*carry"),
        ({"g": [1, 1, 2, 2, 2, 2]}, {"groups": ["g"]}, "'g' changes within 1 individuals, the first 1"),
        ({"g": [1, 1, 1, 2, 2, None]}, {"groups": ["g"]}, "group 'g' is missing.*row 5"),
        ({}, {"step": 0.7}, "off the grid of step=0.7.*rows 1, 2, 4, 5"),
        ({}, {"step": "1h"}, "no length of a step"),
        ({}, {"step": 1e-6}, "would make .* steps of 6 rows"),
        ({"z": [0.5] * 6}, {"states": "z"}, "'z' names no states"),
        ({"z": ["a"] * 6}, {"states": "z", "categories": {"z": ["b"]}}, "none of its categories.*'a' in row 0"),
        ({}, {"streams": "y"}, r"Try: streams=\['y'\]"),
        ({}, {"pad": 2}, "shorter than the longest sequence of 3"),
        ({"y": [{}] * 6}, {}, "'y' holds objects of type dict"),
    ],
)
def test_bad_tables_are_refused_by_column_and_row(changes, options, words):
    df = BASE.assign(**{n: list(x) if isinstance(x, range) else x for n, x in changes.items()})
    with pytest.raises(DataError) as error:
        SequenceData.from_frame(df, **{"id": "id", "time": "t", "streams": ["y"], **options})
    assert re.search(words, str(error.value), re.DOTALL), error.value


def test_no_table_and_no_file(tmp_path):
    with pytest.raises(DataError, match="no table that can be read: int"):
        SequenceData.from_frame(3, streams=["y"])
    BASE.to_csv(tmp_path / "seals.csv")
    with pytest.raises(DataError, match=r"Try: .*seals.csv"):
        SequenceData.from_frame(tmp_path / "seal.csv", streams=["y"])
    with pytest.raises(DataError, match="no rows"):
        SequenceData.from_frame(BASE[:0], streams=["y"])


def test_columns_by_name_with_close_matches():
    data = SequenceData.from_frame(BASE, id="id", streams=["y"])
    assert torch.equal(data["y"], data.y)
    with pytest.raises(DataError, match="columns: y"):
        data["step"]
    with pytest.raises(AttributeError, match="no column 'length'"):
        _ = data.length
    with pytest.raises(DataError, match="no individual 7"):
        data.take([7])
