"""The command line, end to end in a process of its own: from a CSV file to tables, pictures and a saved fit."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch

from symhmm.cli import main
from symhmm.datasets import simulate_mixed_hmm


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "seals.csv"
    data, _ = simulate_mixed_hmm(4, 60, 2, shortest=40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    frame = data.frame()
    frame["id"] = [f"seal{i}" for i in frame["id"]]
    frame["temp"] = torch.randn(len(frame), generator=torch.Generator().manual_seed(2)).numpy()
    frame["hour"] = frame.groupby("id").cumcount()
    frame.to_csv(path, index=False)
    return path


def run(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "symhmm.cli", *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def fitted(table):
    out = table.parent / "fit"
    done = run("fit", table, "--id", "id", "--time", "hour", "--emission", "y=gaussian", "--states", "rest", "move",
               "--transitions", "~ temp", "--units", "y=m", "--restarts", "1", "--out", out)  # fmt: skip
    return out, done


def test_from_a_table_to_figures(fitted):
    out, done = fitted
    assert done.returncode == 0, done.stderr
    assert "log-likelihood: -" in done.stdout and "transitions rest>move temp" in done.stdout
    assert "SequenceData: 4 individuals" in done.stderr and "written to" in done.stderr
    written = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    pictures = {f"figures/{n}.png" for n in ("states", "emissions", "transitions", "residuals_y")}
    assert written == pictures | {"summary.txt", "program.py", "fixed_effects.csv", "states.csv", "fit.json",
                                  "fit.safetensors", "model.json", "report.html"}  # fmt: skip
    assert all((out / p).stat().st_size > 5000 for p in pictures)
    assert (out / "report.html").read_text().count("<img") == 4
    compile((out / "program.py").read_text(), "program.py", "exec")


def test_decoding_gives_the_states_row_by_row(fitted, table, capsys):
    out, _ = fitted
    assert main(["decode", str(out)]) == 0
    text = capsys.readouterr().out
    rows = list(csv.DictReader(text.splitlines()))
    with table.open() as file:
        wanted = list(csv.DictReader(file))
    assert [(r["id"], r["hour"]) for r in rows] == [(r["id"], r["hour"]) for r in wanted]
    assert all(abs(float(r["p(rest)"]) + float(r["p(move)"]) - 1) < 1e-9 for r in rows)
    by_state = {
        s: [float(w["y"]) for r, w in zip(rows, wanted, strict=True) if r["state"] == s] for s in ("rest", "move")
    }
    assert sum(by_state["rest"]) / len(by_state["rest"]) + 2 < sum(by_state["move"]) / len(by_state["move"])
    assert text == (out / "states.csv").read_text()


def test_other_tables_reports_and_comparisons(fitted, table, tmp_path, capsys):
    out, _ = fitted
    some = tmp_path / "some.csv"
    some.write_text("".join(table.read_text().splitlines(keepends=True)[:31]))
    assert main(["decode", str(out), "--table", str(some), "--out", str(tmp_path / "states.csv")]) == 0
    assert len((tmp_path / "states.csv").read_text().splitlines()) == 31
    (out / "report.html").unlink()
    assert main(["report", str(out)]) == 0 and (out / "report.html").stat().st_size > 10000
    capsys.readouterr()
    assert main(["compare", str(out), str(out)]) == 0
    text = capsys.readouterr().out
    results = json.loads((out / "model.json").read_text())["results"]
    assert text.splitlines()[0].split()[:2] == ["fit", "log-likelihood"] and f"{results['aic']:.4f}" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"--emission": "yy=gaussian"}, "no column 'yy'.*close: 'y'"),
        ({"--emission": "y=gausian"}, "no emission family 'gausian'.*'gaussian'"),
        ({"--emission": "y=gamma"}, "'y' has values outside.*in row"),
        ({"--emission": "y"}, "is no pair.*name=value"),
        ({"--transitions": "~ tmp"}, "no column 'tmp'.*'tmp' for a formula; close: 'temp'"),
        ({"--time": "id"}, "neither numbers nor dates"),
        ({"--step": "0.3"}, "would make|off the grid"),
        ({"--out": "."}, "exists and is not empty.*--force"),
    ],
)
def test_what_is_refused_is_said_in_words(changes, words, table, tmp_path, capsys):
    (tmp_path / "x").write_text("")
    wanted = {
        "--id": "id",
        "--time": "hour",
        "--emission": "y=gaussian",
        "--states": "2",
        "--out": str(tmp_path / "new"),
    }
    wanted |= {n: str(tmp_path) if x == "." else x for n, x in changes.items()}
    assert main(["fit", str(table), "--quiet", *[w for pair in wanted.items() for w in pair]]) == 1
    found = capsys.readouterr()
    assert re.search(words, found.err, re.DOTALL), found.err
    assert found.out == "" and not (tmp_path / "new").exists()


def test_wrong_usage_and_missing_folders(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "seals.csv"])
    assert stopped.value.code == 2
    assert main(["decode", str(tmp_path)]) == 1 and "missing: model.json" in capsys.readouterr().err
    assert (
        main(
            ["fit", str(tmp_path / "no.csv"), "--emission", "y=gaussian", "--states", "2", "--out", str(tmp_path / "o")]
        )
        == 1
    )
    assert "there is no file" in capsys.readouterr().err
