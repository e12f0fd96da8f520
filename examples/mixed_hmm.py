"""How different are individuals?  A hidden Markov model with random effects on its transitions, from data to picture.

Thirty simulated individuals move between three states. Each has its own transition logits, spread around those of the
population:

    delta_i ~ Normal(0, tau),   z_{i,t} ~ Categorical(softmax(mu + delta_i)[z_{i,t-1}]),   y_{i,t} ~ Normal(loc[z], scale[z]).

States are summed out exactly; ``mu``, ``tau``, ``loc`` and ``scale`` are fixed effects, ``delta`` random effects with a
normal posterior for each individual (variational inference). The result is compared with the truth and drawn. Run as

    python examples/mixed_hmm.py --plot mixed_hmm.png
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import symhmm
from symhmm.datasets import MixedTruth, simulate_mixed_hmm
from symhmm.distributions import with_zero_diagonal
from symhmm.tables.data import SequenceData


def model(data: SequenceData, K: int = 3) -> None:
    mu = pyro.param("mu", lambda: torch.full((K, K - 1), -1.5))
    tau = pyro.param("tau", lambda: torch.tensor(0.5), constraint=constraints.positive)
    seen = data.y[data.mask]
    loc = pyro.param("loc", lambda: torch.quantile(seen, torch.linspace(0.1, 0.9, K)))
    scale = pyro.param("scale", lambda: (seen.std() / K).repeat(K), constraint=constraints.positive)

    with pyro.plate("individual", data.num_sequences, dim=-1):
        delta = pyro.sample("delta", dist.Normal(torch.zeros(K, K - 1), tau).to_event(2))
        logits = with_zero_diagonal(mu + delta)  # relative to staying
        z = 0
        for t in pyro.markov(range(data.num_steps)):
            start = torch.zeros(K) if t == 0 else Vindex(logits)[..., z, :]
            with pyro.poutine.mask(mask=data.mask[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=start))
                pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=data.y[t])


def main(individuals: int, steps: int, plot: str, seed: int) -> symhmm.Fit:
    generator = torch.Generator().manual_seed(seed)
    data, truth = simulate_mixed_hmm(
        individuals, steps, 3, shortest=steps // 2, missing=0.05, spread=0.7, generator=generator
    )
    print(data)
    density = symhmm.compile(model, data)
    print(density.graph, density.plan, density.roles(), sep="\n\n", end="\n\n")

    fit = symhmm.fit(density, method="svi", seed=seed)
    print(fit.summary())
    compare(fit, truth)
    if plot:
        draw(fit, truth, plot)
        print(f"picture in {plot}")
    return fit


def compare(fit: symhmm.Fit, truth: MixedTruth) -> None:
    """Population effects and every individual's effects beside what the data were simulated from."""
    off = ~torch.eye(3, dtype=torch.bool)
    effects, true_effects = fit.values["delta"].flatten(1), truth.effects[:, off]
    rows = [
        ("loc", fit.values["loc"], truth.loc),
        ("scale", fit.values["scale"], truth.scale),
        ("mu", fit.values["mu"].flatten(), truth.logits[off]),
        ("tau", fit.values["tau"][None], truth.spread[off][:1]),
    ]
    print("\neffect     fitted -> truth")
    for name, seen, wanted in rows:
        print(
            f"{name:9s}", "  ".join(f"{a:.2f} -> {b:.2f}" for a, b in zip(seen.tolist(), wanted.tolist(), strict=True))
        )
    together = torch.corrcoef(torch.stack([effects.flatten(), true_effects.flatten()]))[0, 1]
    error = (effects - true_effects).square().mean().sqrt()
    print(f"individual effects: correlation with the truth {together:.2f}, error {error:.2f}, without a model of them "
          f"{true_effects.square().mean().sqrt():.2f}")  # fmt: skip


def draw(fit: symhmm.Fit, truth: MixedTruth, path: str) -> None:
    """Each individual's probability of staying in each state: truth against estimate, and the population's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fitted = with_zero_diagonal(fit.values["mu"] + fit.values["delta"]).softmax(-1)
    population = with_zero_diagonal(fit.values["mu"]).softmax(-1)
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), constrained_layout=True)
    for k, axis in enumerate(axes):
        axis.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        axis.scatter(truth.transitions[:, k, k], fitted[:, k, k], s=18, color=f"C{k}")
        axis.axhline(population[k, k], color="0.4", linestyle=":", linewidth=1, label="population")
        axis.set(title=f"state {k}", xlabel="true probability of staying", xlim=(0.3, 1), ylim=(0.3, 1))
    axes[0].set_ylabel("estimate for each individual")
    axes[0].legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--individuals", type=int, default=30)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", default="", help="write a picture to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    options = parser.parse_args()
    small = options.smoke
    main(6 if small else options.individuals, 30 if small else options.steps, options.plot, options.seed)
