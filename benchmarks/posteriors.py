"""Posteriors: the default guide of ``svi`` beside NUTS, on the model of `benchmarks.nuts`, value by value.

For each population value, and over the individuals for each of their effects: how far the means are apart in standard
deviations of NUTS, and the ratio of standard deviations, with the Monte Carlo error of NUTS; ``guide alone`` is the ratio of
the guide's draws without their weights. Run as

    python -m benchmarks.posteriors --data sim_mixed.csv
"""

import argparse
import os
import warnings
from pathlib import Path

import numpy as np
import torch

import symhmm
from benchmarks.nuts import NAMES, model, read
from symhmm.infer.draws import agreement
from symhmm.tables.results import Table, label
from symhmm.tables.reweighted import Reweighted

CERTAIN = 0.05  # relative error of a standard deviation up to which NUTS counts as certain
NARROW = 0.9  # ratio of standard deviations below which the guide counts as too narrow


def compare(data: str, draws: int, seed: int, native: bool) -> Table:
    """The table: name, mean and standard deviation by NUTS and by SVI, their ratio, its error, that of the guide, a remark."""
    density = symhmm.compile(model, torch.from_numpy(read(data)))
    exact = symhmm.fit(density, method="nuts", draws=draws, seed=seed, native=native)
    guide = symhmm.fit(density, method="svi", seed=seed)
    print(f"nuts: {exact.status}, {exact.estimate.seconds:.0f} s\nsvi: {guide.status}, {guide.estimate.seconds:.0f} s")
    shapes = {e.name: e.shape for e in density.layout.entries}
    names = [x for n in NAMES for x in label(n, shapes[n])]

    def columns(vectors: torch.Tensor) -> np.ndarray:
        found = [density.unpack(v) for v in vectors]
        return np.stack([torch.cat([f[n].reshape(-1) for n in NAMES]).numpy() for f in found])

    chains = exact.estimate.posterior.chains
    x = columns(chains.reshape(-1, chains.shape[-1]))
    # The error of a standard deviation is that of the mean of squares.
    squares = ((x - x.mean(0)) ** 2).reshape(*chains.shape[:2], -1)
    error = 0.5 * squares.std((0, 1)) / x.var(0) / np.sqrt(agreement(squares)[1])
    posterior = guide.estimate.posterior
    q = columns(posterior.sample(4000))
    alone = columns(posterior.guide.sample(4000)) if isinstance(posterior, Reweighted) else q
    rows = []
    for i, name in enumerate(names):
        ratio = q[:, i].std() / x[:, i].std()
        remark = "" if error[i] > CERTAIN or ratio > NARROW else "too narrow"
        shift = (q[:, i].mean() - x[:, i].mean()) / x[:, i].std()
        numbers = (x[:, i].mean(), x[:, i].std(), q[:, i].mean(), q[:, i].std(), shift, ratio, error[i],
                   alone[:, i].std() / x[:, i].std())  # fmt: skip
        rows.append((name, *map(float, numbers), remark if error[i] <= CERTAIN else "nuts uncertain"))
    columns_ = (
        "name",
        "nuts mean",
        "nuts sd",
        "svi mean",
        "svi sd",
        "shift / sd",
        "sd ratio",
        "+-",
        "guide alone",
        "remark",
    )
    return Table(columns_, tuple(rows))


def short(table: Table) -> Table:
    """Population values as they are, and of each effect the middle and the ends of its individuals."""
    rows = [r for r in table.rows if not r[0].startswith("b[")]
    for k in range(6):
        own = [r for r in table.rows if r[0].startswith("b[") and r[0].endswith(f" {k}]")]
        ratio, shift = np.array([r[6] for r in own]), np.array([r[5] for r in own])
        middle = [float(np.median([r[c] for r in own])) for c in range(1, 5)]
        worst = float(shift[np.abs(shift).argmax()])
        ends = f"sd ratio of individuals {ratio.min():.2f} to {ratio.max():.2f}"
        others = (float(np.median([r[c] for r in own])) for c in (7, 8))
        rows.append((f"b[:, {k}]", *middle, worst, float(np.median(ratio)), *others, ends))
    return Table(table.columns, tuple(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(Path(os.environ.get("SYMHMM_DATA", "../shared/data")) / "sim_mixed.csv"))
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--native", action="store_true", help="compile the step to machine code")
    parser.add_argument("--all", action="store_true", help="a row for each individual's effect")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = compare(options.data, options.draws, options.seed, options.native)
    print(found if options.all else short(found))
