"""Reports: a fit as a folder of tables, pictures, its program and one page of HTML."""

import base64
import csv
import html
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from symhmm import plots
from symhmm.errors import DataError, FitError, SymhmmError
from symhmm.models.model_fit import ModelFit
from symhmm.tables.results import Table

SPEC = "model.json"
KIND, VERSION = "symhmm model", 1
COLUMNS = ("fit", "log-likelihood", "free values", "observations", "AIC", "BIC", "status")


def write_report(fit: ModelFit, folder: Path, spec: Mapping[str, Any], say: Callable[[str], None] = print) -> None:
    """Write everything about a fit into a folder, which exists.

    ``summary.txt``, tables as CSV, ``states.csv`` with the most probable path and the probabilities of the states row by row,
    ``program.py`` (the Pyro program that was fitted), pictures in ``figures``, the saved fit, ``model.json`` with what it
    takes to load it, and ``report.html`` with all of it on one page.

    Args:
        spec: how table and model were made, numbers and text only.
        say: told about pictures that could not be drawn, and why.
    """
    (folder / "summary.txt").write_text(f"{fit.summary()}\n")
    (folder / "program.py").write_text(fit.program_source())
    write_table(fit.fixed_effects(), folder / "fixed_effects.csv")
    if any(e.plates for e in fit.density.layout.entries):
        write_table(fit.random_effects(), folder / "random_effects.csv")
        write_table(fit.variance_components(), folder / "variance_components.csv")
    states_table(fit).to_csv(folder / "states.csv", index=False)
    fit.save(folder)
    draw(fit, folder / "figures", say)
    content = {"kind": KIND, "version": VERSION, "results": results(fit), **spec}
    (folder / SPEC).write_text(json.dumps(content, indent=1) + "\n")
    (folder / "report.html").write_text(page(folder))


def states_table(fit: ModelFit) -> Any:
    """A pandas table of the most probable path and the probabilities of the states, one row per step of the data.

    Columns are those of `SequenceData.frame` that say whose row it is, then ``state``, then ``p(...)`` for each state.
    """
    data = fit.data
    site = plots.the_chain(fit)
    path, smoothed = fit.viterbi([site])[site].values, fit.smooth([site])[site].values
    who = [data.labels.id, data.labels.session, data.labels.time]
    frame = data.frame("pandas")
    out = frame[[c for c in who if c and c in frame]].copy()
    names = [str(s) for s in fit.states]
    out["state"] = [names[int(k)] if k >= 0 else None for k in data.gather(path)]
    for k, name in enumerate(names):
        out[f"p({name})"] = data.gather(smoothed[..., k]).numpy()
    return out


def draw(fit: ModelFit, folder: Path, say: Callable[[str], None]) -> None:
    """All pictures that the fit has, as PNG files."""
    folder.mkdir(exist_ok=True)
    pictures: dict[str, Callable[[], Any]] = {
        "states": lambda: plots.plot_states(fit),
        "emissions": lambda: plots.plot_emissions(fit),
        "transitions": lambda: plots.plot_transitions(fit),
    }
    if any(e.plates for e in fit.density.layout.entries):
        pictures["random_effects"] = lambda: plots.plot_random_effects(fit)
    for stream in fit.bound.spec.emissions:
        pictures[f"residuals_{stream}"] = lambda stream=stream: plots.plot_residuals(fit, stream)  # type: ignore[misc]
    for name, make in pictures.items():
        try:
            make().savefig(folder / f"{name}.png", dpi=110)
        except SymhmmError as error:
            say(f"no picture of {name.replace('_', ' ')}: {str(error).splitlines()[0]}")


def results(fit: ModelFit) -> dict[str, Any]:
    """What fits are compared by; AIC and BIC are None where there is no marginal likelihood."""
    criteria: dict[str, float | None] = {"aic": None, "bic": None}
    with suppress(FitError):  # a joint maximum has no criteria
        criteria = {"aic": fit.aic, "bic": fit.bic}
    best = fit.estimate.marginal[0] if fit.estimate.marginal is not None else fit.objective
    return {
        "objective": best,
        "objective_name": fit.estimate.objective_name,
        "parameters": fit.estimate.n_parameters,
        "observations": fit.n_observations,
        "ok": fit.status.ok,
        "reason": fit.status.reason,
        **criteria,
    }


def read_spec(folder: Path) -> dict[str, Any]:
    """``model.json`` of a folder. Raises `DataError` where there is none, or another program wrote it."""
    path = folder / SPEC
    if not path.is_file():
        raise DataError(
            f"there is no fit of `symhmm fit` in {str(folder)!r}.", details=[f"missing: {SPEC}"],
            suggestion="the folder that was given as --out",
        )  # fmt: skip
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{str(path)!r} is no JSON.", details=[str(error)]) from None
    if not isinstance(content, dict) or (content.get("kind"), content.get("version")) != (KIND, VERSION):
        raise DataError(f"{str(path)!r} was not written by this version of symhmm.", suggestion="fit again")
    return content


def comparison(folders: Sequence[Path]) -> Table:
    """Fits side by side, the smallest AIC first.

    Raises:
        DataError: their data differ in the number of observations: their criteria cannot be compared.
    """
    found = {str(f): read_spec(f)["results"] for f in folders}
    sizes = {n: r["observations"] for n, r in found.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(
            "the fits are of different data, and their criteria cannot be compared.",
            details=[f"{n}: {k} observations" for n, k in sizes.items()],
        )
    nan = float("nan")
    rows = [
        (n, r["objective"], r["parameters"], r["observations"],
         *(nan if r[c] is None else r[c] for c in ("aic", "bic")), "ok" if r["ok"] else r["reason"])
        for n, r in found.items()
    ]  # fmt: skip
    return Table(COLUMNS, tuple(sorted(rows, key=lambda r: (r[4] != r[4], r[4]))))


def write_table(table: Table, path: Path) -> None:
    """A table as CSV; what is not known is empty."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table.columns)
        writer.writerows([["" if x != x else x for x in row] for row in table.rows])


def page(folder: Path) -> str:
    """One page of HTML with the summary, the pictures and the program; nothing outside the page is needed."""
    parts = [f"<h1>{html.escape(folder.resolve().name)}</h1>", _pre(folder / "summary.txt")]
    for picture in sorted((folder / "figures").glob("*.png")):
        image = base64.b64encode(picture.read_bytes()).decode()
        parts.append(f"<h2>{html.escape(picture.stem.replace('_', ' '))}</h2>")
        parts.append(f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{image}">')
    parts += ["<h2>program</h2>", _pre(folder / "program.py")]
    style = "body{font-family:sans-serif;max-width:62em;margin:2em auto}img{max-width:100%}pre{overflow-x:auto}"
    return (
        f"<!doctype html><meta charset='utf-8'><title>symhmm</title><style>{style}</style>\n" + "\n".join(parts) + "\n"
    )


def _pre(path: Path) -> str:
    return f"<pre>{html.escape(path.read_text())}</pre>" if path.is_file() else ""
