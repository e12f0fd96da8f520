"""The command line: ``symhmm fit``, ``decode``, ``compare`` and ``report``."""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from symhmm import fitting
from symhmm.errors import DataError, SymhmmError, SymhmmWarning
from symhmm.models.mixed_hmm import MixedHMM
from symhmm.models.model_fit import ModelFit
from symhmm.report import comparison, page, read_spec, states_table, write_report
from symhmm.tables.data import SequenceData
from symhmm.tables.read import column_names, unknown_columns

OK, REFUSED, USAGE, NOT_CONVERGED = 0, 1, 2, 3


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if data, model or folder are refused (the reason is on standard error); 2 for wrong usage; 3 if the fit was
        made and written, but did not converge.
    """
    options = _parser().parse_args(arguments)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show
            return int(options.run(options))
    except BrokenPipeError:  # whoever read our output, as `head` does, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except SymhmmError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return REFUSED


def _fit(options: argparse.Namespace) -> int:
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.force:
        raise DataError(f"{str(out)!r} exists and is not empty.", suggestion="--force to replace what is there")
    spec = _spec(options)
    data = _data(spec)
    _say(options, repr(data))
    model = MixedHMM(**spec["model"])
    _say(options, f"\n{model!r}\n")
    fit = model.fit(data, options.method, seed=options.seed, **_driver(options))
    out.mkdir(parents=True, exist_ok=True)
    write_report(fit, out, spec, lambda text: print(text, file=sys.stderr))
    print(fit.summary())
    _say(
        options, f"\nwritten to {out}: report.html, summary.txt, tables, states.csv, figures, program.py, the saved fit"
    )
    return OK if fit.status.ok else NOT_CONVERGED


def _decode(options: argparse.Namespace) -> int:
    fit = _loaded(options.folder)
    if options.table is not None:
        spec = read_spec(options.folder)
        fit = fit.on(_data({**spec, "table": str(options.table)}))
    frame = states_table(fit)
    if options.out is None:
        frame.to_csv(sys.stdout, index=False)
    else:
        frame.to_csv(options.out, index=False)
        print(f"{len(frame)} rows in {options.out}", file=sys.stderr)
    return OK


def _compare(options: argparse.Namespace) -> int:
    print(comparison(options.folders))
    return OK


def _report(options: argparse.Namespace) -> int:
    spec = read_spec(options.folder)
    write_report(_loaded(options.folder), options.folder, spec, lambda text: print(text, file=sys.stderr))
    (options.folder / "report.html").write_text(page(options.folder))
    print(options.folder / "report.html")
    return OK


def _loaded(folder: Path) -> ModelFit:
    spec = read_spec(folder)
    fit = fitting.load(folder, MixedHMM(**spec["model"]), _data(spec))
    assert isinstance(fit, ModelFit)
    return fit


def _data(spec: dict[str, Any]) -> SequenceData:
    return SequenceData.from_frame(spec["table"], **spec["data"])


def _spec(options: argparse.Namespace) -> dict[str, Any]:
    """How table and model are made, as numbers and text."""
    emissions = _pairs(options.emission, "--emission")
    formulas = _pairs(options.formula or [], "--formula")
    names = column_names(options.table)
    written = [options.transitions or "", options.initial if "~" in options.initial else "", *formulas.values()]
    # Names, but not of functions and their arguments: log(x), bs(x, df=4).
    used = [x for text in written for x in re.findall(r"\b[A-Za-z_][\w.]*\b(?!\s*[(=])", text)]
    unknown_columns(dict.fromkeys(used, "a formula"), names)
    own = {options.id, options.session, options.time}
    data = {
        "id": options.id,
        "time": options.time,
        "session": options.session,
        "streams": list(emissions),
        "covariates": [*dict.fromkeys([*options.covariates, *(c for c in names if c in used and c not in own)])],
        "groups": options.groups,
        "states": options.known_states,
        "step": _number(options.step),
        "missing_covariates": options.missing_covariates,
        "units": _pairs(options.units, "--units"),
    }
    model = {
        "states": int(options.states[0])
        if options.states[0].isdigit() and len(options.states) == 1
        else options.states,
        "emissions": emissions,
        "transitions": options.transitions,
        "initial": options.initial,
        "formulas": formulas or None,
        "timing": options.timing,
    }
    return {"table": str(options.table.resolve()), "data": data, "model": model}


def _driver(options: argparse.Namespace) -> dict[str, Any]:
    found = {"restarts": options.restarts, "progress": False if options.quiet else None}
    return {n: x for n, x in found.items() if x is not None}


def _pairs(given: Sequence[str], option: str) -> dict[str, str]:
    out = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise DataError(f"{option} {text!r} is no pair.", suggestion=f"{option} name=value")
        out[name.strip()] = value.strip()
    return out


def _number(text: str | None) -> float | str | None:
    if text is None:
        return None
    return float(text) if re.fullmatch(r"[\d.]+", text) else text


def _say(options: argparse.Namespace, text: str) -> None:
    if not options.quiet:
        print(text, file=sys.stderr)


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Our warnings as one line; those of other packages with their place."""
    where = "" if issubclass(category, SymhmmWarning) else f" ({filename}:{lineno})"
    print(f"warning: {message}{where}", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="symhmm", description="Hidden Markov models with fixed and random effects, from a table."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    fit = commands.add_parser(
        "fit", help="fit a model to a table", description="Fit a model to a CSV or Parquet table."
    )
    fit.add_argument("table", type=Path, help="CSV or Parquet file, one row per individual and time")
    fit.add_argument("--emission", nargs="+", required=True, metavar="STREAM=FAMILY", help="step=gamma angle=vonmises")
    fit.add_argument("--states", nargs="+", required=True, help="their number, or their names")
    fit.add_argument("--out", type=Path, required=True, help="folder for everything that is written")
    fit.add_argument("--id", help="column that names individuals")
    fit.add_argument("--time", help="column of times; without it rows are in their order")
    fit.add_argument("--session", help="column of sessions, each of which restarts the chain")
    fit.add_argument("--step", help="length of a step (15min, 0.5, auto): gaps become masked steps; order: ignore gaps")
    fit.add_argument("--transitions", metavar="FORMULA", help='"~ temp + (1 | ID)"')
    fit.add_argument("--formula", nargs="+", metavar="PARAMETER=FORMULA", help='"step.mean=~ temp"')
    fit.add_argument("--initial", default="stationary", help="stationary (default), free, uniform, or a formula")
    fit.add_argument("--timing", choices=("to", "from"), default="to", help="the step that covariates of a row drive")
    fit.add_argument("--covariates", nargs="*", default=[], help="further columns; those in formulas are found")
    fit.add_argument("--groups", nargs="*", default=[], help="columns that are constant within individuals")
    fit.add_argument("--known-states", metavar="COLUMN", help="column of known states, empty where unknown")
    fit.add_argument("--missing-covariates", choices=("error", "carry", "interpolate"), default="error")
    fit.add_argument("--units", nargs="*", default=[], metavar="COLUMN=UNIT", help="for labels: step=km")
    fit.add_argument("--method", choices=tuple(fitting.METHODS), help="laplace with random effects, mle without")
    fit.add_argument("--restarts", type=int, help="starts to climb from")
    fit.add_argument("--seed", type=int, default=0)
    fit.add_argument("--force", action="store_true", help="replace what is in the folder")
    fit.add_argument("--quiet", action="store_true", help="only the summary, no progress")
    fit.set_defaults(run=_fit)

    decode = commands.add_parser("decode", help="states of the rows of a table, as CSV")
    decode.add_argument("folder", type=Path, help="of a fit")
    decode.add_argument(
        "--table", type=Path, help="another table of the same columns; without it the one that was fitted"
    )
    decode.add_argument("--out", type=Path, help="CSV file; standard output without it")
    decode.set_defaults(run=_decode)

    compare = commands.add_parser("compare", help="fits of the same table side by side")
    compare.add_argument("folders", type=Path, nargs="+")
    compare.set_defaults(run=_compare)

    report = commands.add_parser("report", help="write tables, pictures and the page of a fit again")
    report.add_argument("folder", type=Path)
    report.set_defaults(run=_report)
    return parser


if __name__ == "__main__":
    sys.exit(main())
