"""Which pilot whales dive alike?  A hidden Markov model with a discrete random effect, fitted to real dives.

Fifteen tagged whales, 50 to 254 dives each, eleven streams per dive, many values missing. A dive is in one of K states,
and each whale belongs to one of C components c, which differ in how the states follow each other:

    c_i ~ pi,   z_{i,0} ~ stationary distribution of A_c,   z_{i,t} ~ A_{c_i}[z_{i,t-1}],   y_{i,t} ~ F(z_{i,t}).

States and components are summed out exactly; the rest is maximum likelihood, by EM. Data and model: Isojunno et al. (2017),
Ecosphere, doi 10.1002/ecs2.2044; the data are distributed with momentuHMM. Run as

    python examples/pilot_whales.py --data pilot_whales.csv --components 3

With ``--intercepts`` each whale has its own twelve transition logits instead, normal around those of all whales, and they
are integrated by Laplace's approximation. A minute on one core.
"""

import argparse
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from scipy.cluster.vq import kmeans2
from torch import Tensor
from torch.distributions import constraints

import symhmm
from symhmm.distributions import GammaMeanSd, VonMises, stationary_distribution, with_zero_diagonal
from symhmm.posterior.marginals import smooth, transition_counts

BINARY = ["GR.tight", "dive.CS.pres", "dive.SS.pres", "presurf", "postsurf"]
STREAMS = ["dive.dur", "dive.depth", "GR.speed2", "dive.pitchvar2", "breath.headchange", "GR.size", *BINARY]


@dataclass(frozen=True)
class Dives:
    """Padded streams, time first: ``y[stream]`` and ``seen[stream]`` have shape (T, N)."""

    y: dict[str, Tensor]
    seen: dict[str, Tensor]
    ids: tuple[str, ...]

    @property
    def num_steps(self) -> int:
        return len(self.y[STREAMS[0]])


def load(path: str) -> Dives:
    table = pd.read_csv(path)
    whales = {str(name): rows for name, rows in table.groupby("ID", sort=False)}
    longest = max(map(len, whales.values()))
    y = {s: np.full((longest, len(whales)), np.nan) for s in STREAMS}
    for i, rows in enumerate(whales.values()):
        for s in STREAMS:
            y[s][: len(rows), i] = rows[s]
    return Dives(
        {s: torch.tensor(v) for s, v in y.items()}, {s: torch.tensor(~np.isnan(v)) for s, v in y.items()}, tuple(whales)
    )


def starts(data: Dives, states: int, seed: int = 0) -> dict[str, Tensor]:
    """Moments of each stream within clusters of dives (k-means on ranks; a missing value counts as a middling one)."""
    rows = data.seen["dive.dur"]
    ranks = np.stack([pd.Series(data.y[s][rows].numpy()).rank(pct=True).fillna(0.5) for s in STREAMS], axis=1)
    _, label = kmeans2(ranks, states, minit="++", seed=seed)
    out = {}
    for s in STREAMS:
        y = data.y[s][rows]
        groups = [y[torch.tensor(label == k) & ~y.isnan()] for k in range(states)]
        mean = torch.stack([g.mean() if len(g) else y.nanmean() for g in groups])
        sd = torch.stack([g.std() if len(g) > 2 else y[~y.isnan()].std() for g in groups]).clamp_min(1e-2)
        out[f"{s} mean"], out[f"{s} sd"] = mean, sd
    return out


def model(data: Dives, states: int, components: int, start: dict[str, Tensor], intercepts: bool = False) -> None:
    mean, sd = (lambda s: start[f"{s} mean"]), (lambda s: start[f"{s} sd"])
    positive, unit = constraints.positive, constraints.unit_interval
    shape = pyro.param("dive.dur shape", lambda: (mean("dive.dur") / sd("dive.dur")) ** 1.086, positive)
    scale = pyro.param("dive.dur scale", lambda: mean("dive.dur"), positive)
    gamma = {
        s: (pyro.param(f"{s} mean", lambda s=s: mean(s), positive), pyro.param(f"{s} sd", lambda s=s: sd(s), positive))
        for s in ("dive.depth", "GR.speed2")
    }
    m, v = mean("dive.pitchvar2"), sd("dive.pitchvar2") ** 2
    alpha = pyro.param("dive.pitchvar2 alpha", lambda: m * (m * (1 - m) / v - 1).clamp_min(0.5), positive)
    beta = pyro.param("dive.pitchvar2 beta", lambda: (1 - m) * (m * (1 - m) / v - 1).clamp_min(0.5), positive)
    kappa = pyro.param("breath.headchange kappa", lambda: 1 / sd("breath.headchange") ** 2, positive)
    rate = pyro.param("GR.size rate", lambda: mean("GR.size"), positive)
    prob = {s: pyro.param(f"{s} prob", lambda s=s: mean(s).clamp(0.05, 0.95), unit) for s in BINARY}
    # Transition logits: the diagonal is the reference. Components start apart, else they would stay alike for ever.
    logits = pyro.param("transition", lambda: torch.linspace(-2.5, -1.0, components)[:, None, None].expand(
        components, states, states - 1).clone())  # fmt: skip
    if intercepts:  # each whale has its own logits, normal around those of all whales
        spread = pyro.param("spread", lambda: torch.full((states, states - 1), 0.3), positive)
    else:
        transition = with_zero_diagonal(logits).softmax(-1)
        initial = stationary_distribution(transition)
        weights = pyro.param("weights", lambda: torch.full((components,), 1 / components), constraints.simplex)

    with pyro.plate("whale", len(data.ids), dim=-1):
        if intercepts:
            own = pyro.sample("own", dist.Normal(torch.zeros(states, states - 1), spread).to_event(2))
            transition, c = with_zero_diagonal(logits[0] + own).softmax(-1), ...
            initial = stationary_distribution(transition)
        else:
            c = pyro.sample("component", dist.Categorical(weights))
        z = None
        for t in pyro.markov(range(data.num_steps)):
            p = Vindex(initial)[c] if z is None else Vindex(transition)[c, z, :]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            observe = {
                "dive.dur": dist.Weibull(scale[z], shape[z]),
                "dive.depth": GammaMeanSd(gamma["dive.depth"][0][z], gamma["dive.depth"][1][z]),
                "GR.speed2": GammaMeanSd(gamma["GR.speed2"][0][z], gamma["GR.speed2"][1][z]),
                "dive.pitchvar2": dist.Beta(alpha[z], beta[z]),
                "breath.headchange": VonMises(torch.zeros_like(kappa)[z], kappa[z]),
                "GR.size": dist.Poisson(rate[z]),
                **{s: dist.Bernoulli(prob[s][z]) for s in BINARY},
            }
            for s, distribution in observe.items():
                with pyro.poutine.mask(mask=data.seen[s][t]):
                    pyro.sample(f"{s}_{t}", distribution, obs=data.y[s][t])


def groupings(one: symhmm.Fit, components: int, number: int) -> list[dict[str, Tensor]]:
    """Starts for several components from a fit of one: whales grouped by how often they change between states.

    Each whale's expected moves between states, given its dives, make its own transition logits; these are clustered by
    k-means from ``number`` seeds, and each cluster makes a component.
    """
    counts = transition_counts(one.density, one.values).only.values + 0.5  # (whales, from, to)
    states = counts.shape[-1]
    logits = (counts.log() - counts.log().diagonal(dim1=-2, dim2=-1)[..., None])[
        :, ~torch.eye(states, dtype=torch.bool)
    ]
    starts = []
    for seed in range(number):
        _, label = kmeans2(logits.numpy(), components, minit="points", seed=seed)
        groups = [[x for x, c in zip(logits, label, strict=True) if c == k] for k in range(components)]
        centres = [torch.stack(g).mean(0) if g else one.values["transition"].flatten() for g in groups]
        shared = {n: v for n, v in one.values.items() if n not in ("transition", "weights")}
        transition = torch.stack(centres).reshape(components, states, states - 1)
        weights = torch.tensor([len(g) + 0.5 for g in groups])
        starts.append({**shared, "transition": transition, "weights": weights / weights.sum()})
    return starts


def individual(data: Dives, states: int, first: dict[str, Tensor], one: symhmm.Fit) -> symhmm.Fit:
    """Random intercepts on all transition logits, from the fit without them."""
    density = symhmm.compile(model, data, states, 1, first, True)
    shared = {n: v for n, v in one.values.items() if n != "weights"}
    start = {**density.initial(), **shared}
    fit = symhmm.fit(density, method="laplace", start=start, restarts=1)
    corrected, error = fit.estimate.marginal
    print(
        f"Laplace {fit.objective:.4f}, corrected {corrected:.2f} +- {error:.2f}, {fit.estimate.seconds:.0f} s; {fit.status}"
    )
    print(fit.variance_components())
    pooled = fit.shrinkage("whale")
    print("\nwhale       dives' values  mean shrinkage of its logits")
    for i, whale in enumerate(data.ids):
        mine = [k for k, name in enumerate(pooled["effect"]) if name.startswith(f"own[{i},")]
        share = sum(pooled["shrinkage"][k] for k in mine) / len(mine)
        print(f"{whale}  {pooled['observations'][mine[0]]:>8}  {share:.2f}")
    return fit


def main(path: str, states: int, components: int, restarts: int, seed: int, intercepts: bool = False) -> symhmm.Fit:
    data = load(path)
    first = starts(data, states, seed)
    fit = symhmm.fit(symhmm.compile(model, data, states, 1, first), method="em", restarts=min(restarts, 2), seed=seed)
    print(f"one component: log-likelihood {fit.objective:.4f} after {fit.estimate.seconds:.1f} s; {fit.status}")
    if intercepts:
        return individual(data, states, first, fit)
    if components > 1:
        density = symhmm.compile(model, data, states, components, first)
        print(density.graph, density.plan, sep="\n\n", end="\n\n")

        found = [symhmm.fit(density, method="em", restarts=1, start=s) for s in groupings(fit, components, restarts)]
        print("groupings of whales end at", "  ".join(f"{f.objective:.4f}" for f in found))
        print("seconds for each", "  ".join(f"{f.estimate.seconds:.1f}" for f in found))
        fit = max(found, key=lambda f: f.objective)
    print(fit.summary())
    transition = with_zero_diagonal(fit.values["transition"]).softmax(-1)
    for c in range(components):
        weight = fit.values["weights"][c].item()
        print(f"\ncomponent {c}, {weight:.0%} of whales: probability of the next state, by row")
        print("\n".join("  " + "  ".join(f"{p:.3f}" for p in row) for row in transition[c].tolist()))
    if components > 1:
        print("\nwhale       most probable component")
        posterior = smooth(density, fit.values, ["component"]).only.values
        for whale, p in zip(data.ids, posterior, strict=True):
            print(f"{whale}  {int(p.argmax())}  with probability {p.max():.4f}")
    return fit


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="pilot_whales.csv")
    parser.add_argument("--states", type=int, default=4)
    parser.add_argument("--components", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=8, help="groupings of whales to start from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--intercepts", action="store_true", help="random intercepts instead of components")
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    main(options.data, options.states, options.components, options.restarts, options.seed, options.intercepts)
