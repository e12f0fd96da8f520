"""NUTS: effective draws per second, symhmm beside NumPyro with a hand-written forward pass, one core each, in one run.

Twenty individuals, 500 steps, three states, a random intercept for each individual on all six transition logits: 138 values,
the same priors on both sides. What counts is the least effective value, over the CPU seconds of a whole run: finding the
posterior, warm-up and draws; compilation is told apart. Run as

    python -m benchmarks.nuts --data sim_mixed.csv --peer /path/to/python-with-numpyro
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

import symhmm
from symhmm.infer.draws import agreement

NAMES = ("loc", "scale", "beta", "sd", "b")


def model(y: Tensor) -> None:
    """The model of `benchmarks.nuts_numpyro` as a Pyro program; ``y`` has shape (individuals, steps)."""
    n, steps = y.shape
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-2.0, 0.0, 2.0]), 2.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
    beta = pyro.sample("beta", dist.Normal(-2 * torch.ones(6), 1.5).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(6)).to_event(1))
    with pyro.plate("individual", n, dim=-1):
        b = pyro.sample("b", dist.Normal(beta, sd).to_event(1))
        zero = torch.zeros(n)
        rows = [[zero, b[:, 0], b[:, 1]], [b[:, 2], zero, b[:, 3]], [b[:, 4], b[:, 5], zero]]
        logits = torch.stack([torch.stack(r, -1) for r in rows], -2)
        z = None
        for t in pyro.markov(range(steps)):
            first = dist.Categorical(torch.ones(3) / 3)
            z = pyro.sample(f"z_{t}", first if z is None else dist.Categorical(logits=Vindex(logits)[..., z, :]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[:, t])


def read(path: str) -> np.ndarray:
    """Observations, shape (individuals, steps)."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({r["ID"] for r in rows})
    return np.array([[float(r["y"]) for r in rows if r["ID"] == n] for n in names])


def ours(data: np.ndarray, out: Path, chains: int, draws: int, seed: int, native: bool) -> None:
    """Fit, and write draws and CPU seconds like the peer."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    density = symhmm.compile(model, torch.from_numpy(data))
    begun = time.process_time()
    symhmm.fit(density, method="nuts", chains=1, draws=1, tune=20, seed=seed, native=native)  # compiles everything
    once = time.process_time() - begun
    begun, wall = time.process_time(), time.perf_counter()
    fit = symhmm.fit(density, method="nuts", chains=chains, draws=draws, seed=seed, native=native)
    seconds, wall = time.process_time() - begun, time.perf_counter() - wall
    posterior = fit.estimate.posterior
    flat = [density.unpack(v) for v in posterior.all]
    values = {n: torch.stack([f[n] for f in flat]).numpy() for n in NAMES}
    values = {n: x.reshape(chains, draws, *x.shape[1:]) for n, x in values.items()}
    np.savez(out, seconds=seconds, wall=wall, once=once, gradients=fit.estimate.n_evaluations,
             diverging=sum(posterior.diverging), **values)  # fmt: skip


def described(path: Path) -> tuple[dict[str, float], dict[str, tuple[float, float, float]]]:
    """Effective draws of the least effective value per CPU second; mean, standard deviation and its error of each.

    Counted in two ways: across chains, where chains that disagree count for little, and chain by chain and then summed, where
    a chain that stays in a permutation of the states is not held against its side.
    """
    found = np.load(path)
    x = np.concatenate([found[n].reshape(*found[n].shape[:2], -1) for n in NAMES], -1).astype(float)
    labels = [f"{n}[{i}]" for n in NAMES for i in range(found[n][0, 0].size)]
    r_hat, across, _ = agreement(x)
    alone = np.sum([agreement(x[c : c + 1])[1] for c in range(len(x))], axis=0)
    seconds = float(found["seconds"])
    once = f", once before {float(found['once']):.0f} s of capture and compilation" if "once" in found else ""
    print(
        f"  {x.shape[0]} x {x.shape[1]} draws, {int(found['gradients'])} gradients, {seconds:.1f} CPU s "
        f"({float(found['wall']):.1f} s wall){once}; {int(found['diverging'])} divergences; R-hat at most {r_hat.max():.3f}"
    )
    rates = {}
    for way, ess in (("across chains", across), ("chain by chain", alone)):
        k = int(ess.argmin())
        rates[way] = float(ess[k] / seconds)
        print(
            f"  {way}: least effective {labels[k]}: {ess[k]:.0f} draws, {rates[way]:.2f} per CPU second; "
            f"median of all {np.median(ess):.0f}"
        )
    flat = x.reshape(-1, x.shape[-1])
    moments = zip(flat.mean(0), flat.std(0), flat.std(0) / np.sqrt(across), strict=True)
    return rates, dict(zip(labels, moments, strict=True))


def main(
    data: str, peer: str | None, chains: int, draws: int, tune: int, seed: int, native: bool, x64: bool
) -> dict[str, float]:
    """Run both sides, each in its own process on one core, and print the comparison; returns the ratios of rates."""
    pin = ["taskset", "-c", "0"] if sys.platform == "linux" else []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        y, mine, theirs = (Path(folder) / n for n in ("y.npy", "symhmm.npz", "numpyro.npz"))
        np.save(y, read(data))
        options = ["--chains", str(chains), "--draws", str(draws), "--seed", str(seed)]
        own = [sys.executable, "-W", "ignore", "-m", "benchmarks.nuts", "--side", str(y), "--out", str(mine), *options]
        subprocess.run([*pin, *own, *(["--native"] if native else [])], check=True, env=env)
        print(f"symhmm, {'machine code' if native else 'replayed graph'}, float64")
        rates, ours = described(mine)
        if peer is None:
            return {}
        script = str(Path(__file__).with_name("nuts_numpyro.py"))
        call = [peer, "-W", "ignore", script, str(y), str(theirs), *options, "--tune", str(tune)]
        subprocess.run([*pin, *call, *(["--x64"] if x64 else [])], check=True, env=env)
        print(f"NumPyro, jitted, {'float64' if x64 else 'float32'}")
        others, peers = described(theirs)
    gap = max(abs(ours[n][0] - peers[n][0]) / np.hypot(ours[n][2], peers[n][2]) for n in ours)
    ratios = {way: rate / others[way] for way, rate in rates.items()}
    print("effective draws per second: " + ", ".join(f"{r:.1f} times NumPyro's {way}" for way, r in ratios.items()))
    print(
        f"means differ by at most {gap:.1f} Monte Carlo errors (largest of {len(ours)}; of no meaning where R-hat is large)"
    )
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(Path(os.environ.get("SYMHMM_DATA", "../shared/data")) / "sim_mixed.csv"))
    parser.add_argument("--peer", help="a Python that has NumPyro")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--native", action="store_true", help="compile the step to machine code")
    parser.add_argument("--x64", action="store_true", help="NumPyro in float64")
    for name, default in (("chains", 2), ("draws", 500), ("tune", 500), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.side:
        warnings.simplefilter("ignore")
        ours(np.load(options.side), Path(options.out), options.chains, options.draws, options.seed, options.native)
    else:
        main(
            options.data,
            options.peer,
            options.chains,
            options.draws,
            options.tune,
            options.seed,
            options.native,
            options.x64,
        )
