"""Reports: tables hold the numbers of the fit, comparisons only what can be compared, pages need nothing else."""

import base64
import csv
import html
import json

import pytest
import torch

from symhmm import MixedHMM
from symhmm.errors import DataError
from symhmm.report import (
    COLUMNS,
    SPEC,
    comparison,
    draw,
    page,
    read_spec,
    results,
    states_table,
    write_report,
    write_table,
)
from symhmm.tables.data import SequenceData
from symhmm.tables.results import Table

RESULTS = {"objective": -10.0, "objective_name": "log-likelihood", "parameters": 3, "observations": 40, "ok": True,
           "reason": "converged", "aic": 26.0, "bic": 30.0}  # fmt: skip


@pytest.fixture(scope="module")
def fit():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(15, 2, generator=generator, dtype=torch.float64) + 3 * (torch.arange(15) > 7).double()[:, None]
    y[3, 0] = torch.nan
    data = SequenceData.from_tensors({"y": y}, lengths=[15, 12], ids=["ann", "bo"])
    return MixedHMM(["low", "high"], {"y": "gaussian"}).fit(data, restarts=1)


def folder(path, **changes):
    path.mkdir()
    content = {"kind": "symhmm model", "version": 1, "results": {**RESULTS, **changes}}
    (path / SPEC).write_text(json.dumps(content))
    return path


def test_states_row_by_row(fit):
    frame = states_table(fit)
    assert frame.columns.tolist() == ["id", "state", "p(low)", "p(high)"]
    assert frame["id"].tolist() == ["ann"] * 15 + ["bo"] * 12
    smoothed = fit.smooth()["z_{time}"].values[:12, 1]
    assert frame["p(high)"][15:].tolist() == pytest.approx(smoothed[:, 1].tolist(), abs=1e-12)
    path = fit.viterbi()["z_{time}"].values[:, 0]
    assert frame["state"][:15].tolist() == [("low", "high")[k] for k in path]


def test_results_are_those_of_the_fit(fit):
    found = results(fit)
    assert (found["objective"], found["aic"], found["bic"]) == (fit.objective, fit.aic, fit.bic)
    assert (found["observations"], found["parameters"], found["ok"]) == (26, 6, fit.status.ok)
    # A joint maximum has no criteria.
    joint = MixedHMM(2, {"y": "gaussian"}, priors={}).fit(fit.data, "map", restarts=1, max_evaluations=3)
    assert results(joint)["aic"] is None and results(joint)["bic"] is None


def test_a_picture_that_cannot_be_drawn_is_told(fit, tmp_path, monkeypatch):
    def refuse(*_):
        raise DataError("no such stream.", suggestion="another")

    monkeypatch.setattr("symhmm.plots.plot_emissions", refuse)
    said = []
    draw(fit, tmp_path / "figures", said.append)
    assert said == ["no picture of emissions: no such stream."]
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == ["residuals_y", "states", "transitions"]


def test_a_report_can_be_read_again(fit, tmp_path):
    write_report(fit, tmp_path, {"table": "seals.csv"})
    spec = read_spec(tmp_path)
    assert spec["table"] == "seals.csv" and spec["results"] == results(fit)
    with (tmp_path / "fixed_effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["estimate"]) for r in rows] == [r[1] for r in fit.fixed_effects().rows]
    assert not (tmp_path / "random_effects.csv").exists()
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 4 and "http" not in text
    assert html.escape(fit.program_source()) in text


def test_folders_that_no_report_wrote_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"missing: model.json"):
        read_spec(tmp_path)
    for content, words in (("{", "is no JSON"), ("[]", "not written by this version"), ('{"kind": "x"}', "fit again")):
        (tmp_path / SPEC).write_text(content)
        with pytest.raises(DataError, match=words):
            read_spec(tmp_path)


def test_fits_are_compared_by_aic_and_those_without_come_last(tmp_path):
    fits = [folder(tmp_path / "a", aic=None, bic=None), folder(tmp_path / "b"),
            folder(tmp_path / "c", aic=20.0, ok=False, reason="stuck")]  # fmt: skip
    table = comparison(fits)
    assert table.columns == COLUMNS and [r[0][-1] for r in table.rows] == ["c", "b", "a"]
    assert [r[-1] for r in table.rows] == ["stuck", "ok", "ok"]
    with pytest.raises(DataError, match=r"different data[\s\S]*b: 40 observations[\s\S]*d: 41 observations"):
        comparison([fits[1], folder(tmp_path / "d", observations=41)])


def test_what_is_not_known_is_empty(tmp_path):
    write_table(Table(("name", "x"), (("a, b", 1.5), ("c", float("nan")))), tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_text().splitlines() == ["name,x", '"a, b",1.5', "c,"]


def test_pages_escape_what_they_show(tmp_path):
    (tmp_path / "summary.txt").write_text("a < b & c")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "my_states.png").write_bytes(b"picture")
    text = page(tmp_path)
    assert "<pre>a &lt; b &amp; c</pre>" in text and "<h2>my states</h2>" in text
    assert base64.b64encode(b"picture").decode() in text
