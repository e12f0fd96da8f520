"""Calibration: are 95 percent intervals right 95 times in 100, and are the ranks of the truth among the draws uniform?

Values are drawn from their priors, data from the values, and each data set is fitted. The rank of the true value among
the draws of a posterior is then uniform if the draws are right (Cook, Gelman and Rubin 2006; Talts et al. 2018). Run as

    python -m benchmarks.calibration --methods nuts svi laplace --replications 200 --out calibration.jsonl
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor

import symhmm

MEMBERS, STEPS, BINS, RANKS = 10, 40, 10, 99
OPTIONS: dict[str, dict[str, Any]] = {
    "nuts": {"chains": 1, "draws": 2 * RANKS, "tune": 100, "restarts": 1, "native": True},
    "svi": {"restarts": 1},
    "laplace": {"restarts": 1},
}


def model(y: Tensor) -> None:
    """Animals in two states; each leaves the first state at a rate of its own. ``y`` has shape (steps, animals)."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 0.3).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.3))
    up = pyro.sample("up", dist.Normal(-1.0, 0.7))
    down = pyro.sample("down", dist.Normal(-1.0, 0.7))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("animal", y.shape[1], dim=-1):
        own = pyro.sample("own", dist.Normal(up, spread))
        leave = torch.stack([torch.zeros_like(own), own], -1)
        back = torch.stack([down, torch.zeros_like(down)], -1).expand(leave.shape)
        logits = torch.stack([leave, back], -2)
        z: Any = 0
        for t in pyro.markov(range(y.shape[0])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[..., z, :]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale), obs=y[t])


def simulate(generator: np.random.Generator) -> tuple[dict[str, np.ndarray], Tensor]:
    """Values from their priors and data from the values; shares no code with ``model``."""
    loc = np.array([-1.0, 1.0]) + 0.3 * generator.normal(size=2)
    scale = math.exp(-0.5 + 0.3 * generator.normal())
    up, down = -1.0 + 0.7 * generator.normal(size=2)
    spread = abs(generator.normal())
    own = up + spread * generator.normal(size=MEMBERS)
    y, z = np.empty((STEPS, MEMBERS)), np.zeros(MEMBERS, dtype=int)
    for t in range(STEPS):
        up_probability = np.where(z == 0, 1 / (1 + np.exp(-own)), 1 / (1 + math.exp(down)))
        z = (generator.random(MEMBERS) < up_probability).astype(int)
        y[t] = loc[z] + scale * generator.normal(size=MEMBERS)
    truth = {"loc": loc, "scale": scale, "up": up, "down": down, "spread": spread, "own": own}
    return {n: np.asarray(v, dtype=float) for n, v in truth.items()}, torch.from_numpy(y)


def replicate(method: str, seed: int) -> dict[str, Any]:
    """One data set: whether each interval holds the truth, the truth's rank where there are draws, and the time."""
    truth, y = simulate(np.random.default_rng(seed))
    begun = time.process_time()
    fit = symhmm.fit(model, y, method=method, seed=seed, **OPTIONS[method])
    covered, wide = {}, {}
    for table in (fit.fixed_effects(), fit.random_effects("animal")):
        for name, low, high in zip(table["name"], table["2.5%"], table["97.5%"], strict=True):
            value = _element(truth, name)
            # Nothing but a profile bounds a spread at zero from above.
            end = math.inf if low == 0 and math.isnan(high) else high
            covered[name], wide[name] = bool(low <= value <= end), float(end - low)
    ranks = {}
    if fit.estimate.posterior is not None and method != "laplace":
        draws = fit.estimate.posterior.sample(RANKS)
        found = [fit.density.unpack(v) for v in draws]
        for name, value in truth.items():
            x = torch.stack([f[name] for f in found]).numpy()
            below = (x < value).sum(0).reshape(-1)
            labels = [name] if value.ndim == 0 else [f"{name}[{i}]" for i in range(value.size)]
            ranks |= {n: int(b) for n, b in zip(labels, below, strict=True)}
    return {"method": method, "seed": seed, "ok": fit.status.ok, "covered": covered, "wide": wide, "ranks": ranks,
            "seconds": time.process_time() - begun}  # fmt: skip


def _element(truth: Mapping[str, np.ndarray], label: str) -> float:
    name, _, index = label.partition("[")
    return float(truth[name].reshape(-1)[int(index.rstrip("]")) if index else 0])


def uniformity(ranks: Iterable[int]) -> float:
    """Probability of bins at least as unequal as those of ``ranks`` if they are uniform (chi-squared, 10 bins)."""
    from scipy.stats import chisquare

    counts = np.bincount(np.array(list(ranks)) * BINS // (RANKS + 1), minlength=BINS)
    return float(chisquare(counts).pvalue)


def report(found: list[dict[str, Any]]) -> str:
    """A table for each method: coverage of 95 percent intervals, and uniformity of ranks where there are any."""
    lines = []
    for method in dict.fromkeys(f["method"] for f in found):
        rows = [f for f in found if f["method"] == method]
        n, seconds = len(rows), float(np.mean([f["seconds"] for f in rows]))
        lines.append(f"{method}: {n} data sets, {sum(f['ok'] for f in rows)} reported ok, {seconds:.1f} s each")
        lines.append(f"  {'value':10} {'covered':>8} {'+-':>6} {'width':>7} {'p of ranks':>10}")
        names = list(rows[0]["covered"])
        animals = [n for n in names if n.startswith("own[")]
        groups = [[n for n in names if n not in animals], animals]
        for name in groups[0]:
            hit = np.array([f["covered"][name] for f in rows])
            widths = np.array([f["wide"][name] for f in rows])
            p = f"{uniformity(f['ranks'][name] for f in rows):10.3f}" if rows[0]["ranks"] else ""
            line = f"  {name:10} {hit.mean():8.3f} {math.sqrt(0.95 * 0.05 / n):6.3f} {np.median(widths):7.3f} {p}"
            endless = int(np.isinf(widths).sum())
            lines.append(line + (f" ({endless} without an upper end)" if endless else ""))
        hits = np.array([[f["covered"][n] for n in groups[1]] for f in rows])
        width = float(np.median([[f["wide"][n] for n in groups[1]] for f in rows]))
        # One animal per data set, since the animals of a data set share its population's values.
        p = f"{uniformity(f['ranks']['own[0]'] for f in rows):10.3f}" if rows[0]["ranks"] else ""
        error = hits.mean(1).std() / math.sqrt(n)
        lines.append(f"  {'own':10} {hits.mean():8.3f} {error:6.3f} {width:7.3f} {p}")
    return "\n".join(lines)


def main(methods: list[str], replications: int, out: str | None) -> list[dict[str, Any]]:
    """Run what ``out`` does not hold yet; print and return everything."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    path = Path(out) if out else None
    found = [json.loads(line) for line in path.read_text().splitlines()] if path and path.exists() else []
    have = {(f["method"], f["seed"]) for f in found}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for method in methods:
            for seed in range(replications):
                if (method, seed) in have:
                    continue
                found.append(replicate(method, seed))
                if path:
                    with path.open("a") as file:
                        file.write(json.dumps(found[-1]) + "\n")
    found = [f for f in found if f["method"] in methods and f["seed"] < replications]
    print(report(found))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["nuts", "svi", "laplace"], choices=list(OPTIONS))
    parser.add_argument("--replications", type=int, default=200)
    parser.add_argument("--out", help="file that keeps each replication; the same call continues")
    options = parser.parse_args()
    main(options.methods, options.replications, options.out)
