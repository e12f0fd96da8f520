"""What was each animal doing, when, and what kind of animal is it?  States read out of a fitted model.

Each animal belongs to one of two kinds c, which change state rarely or often, and is in one of K states at each step:

    c_i ~ pi,   z_{i,t} ~ A_{c_i}[z_{i,t-1}],   y_{i,t} ~ Normal(loc[z_{i,t}], scale[z_{i,t}]).

The data are simulated, so that answers can be compared with the truth: the jointly most probable path (Viterbi), the most
probable state step by step, the probabilities of both, and draws from the joint posterior, which give the uncertainty of
anything that is counted along a path. With --data the same questions are put to the dives of fifteen pilot whales
(Isojunno et al. 2017). Run as

    python examples/decode.py --plot states.png
    python examples/decode.py --data pilot_whales.csv --plot whales.png
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

import symhmm
from symhmm.datasets import simulate_mixed_hmm
from symhmm.distributions import with_zero_diagonal
from symhmm.posterior.align import order_by
from symhmm.tables.data import SequenceData

STATES, RARELY, OFTEN = 3, -3.5, -1.2


def model(data: SequenceData) -> None:
    loc = pyro.param("loc", torch.quantile(data.y[data.mask], torch.linspace(0.1, 0.9, STATES)))
    scale = pyro.param("scale", torch.ones(STATES), constraint=constraints.positive)
    logits = pyro.param("logits", torch.tensor([-3.0, -1.5])[:, None, None].expand(2, STATES, STATES - 1).clone())
    weights = pyro.param("weights", torch.ones(2) / 2, constraint=constraints.simplex)
    transition = with_zero_diagonal(logits).softmax(-1)
    with pyro.plate("animal", data.num_sequences):
        kind = pyro.sample("kind", dist.Categorical(weights))
        z = None
        for t in pyro.markov(range(data.num_steps)):
            p = torch.ones(STATES) / STATES if z is None else Vindex(transition)[kind, z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            with pyro.poutine.mask(mask=data.mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=data.y[t])


def simulate(animals: int, steps: int, seed: int) -> tuple[SequenceData, Tensor, Tensor]:
    """Data, true states (T, N) with -1 as padding, and true kinds (N,): the first half changes rarely, the others often."""
    generator = torch.Generator().manual_seed(seed)
    halves = [
        simulate_mixed_hmm(n, steps, STATES, shortest=steps // 2, missing=0.1, spread=0.0, generator=generator,
                           logits=level * (1 - torch.eye(STATES)), loc=torch.tensor([-2.0, 0.0, 2.5]))
        for n, level in ((animals // 2, RARELY), (animals - animals // 2, OFTEN))
    ]  # fmt: skip
    (a, truth_a), (b, truth_b) = halves
    data = SequenceData.from_tensors(
        {"y": torch.cat([a.y, b.y], 1)},
        observed=torch.cat([a.mask, b.mask], 1),
        lengths=torch.cat([a.lengths, b.lengths]),
    )
    kinds = (torch.arange(animals) >= animals // 2).long()
    return data, torch.cat([truth_a.states, truth_b.states], 1), kinds


def main(animals: int, steps: int, plot: str, seed: int) -> None:
    torch.set_default_dtype(torch.float64)
    data, states, kinds = simulate(animals, steps, seed)
    fit = symhmm.fit(model, data)
    print(fit)
    # States are numbered from the smallest mean to the largest, whatever order the fit found them in.
    order = order_by(fit.values, "loc")
    smoothed, path, single, draws = (
        found.reordered("z_{time}", order)
        for found in (fit.smooth(), fit.viterbi(), fit.posterior_decode(), fit.sample_states(1000))
    )

    inside = states >= 0
    p = smoothed["z_{time}"].values
    print(f"\nright states: {rate(path['z_{time}'].values == states, inside)} on the most probable path, "
          f"{rate(single['z_{time}'].values == states, inside)} step by step, "
          f"{p.amax(-1)[inside].mean():.3f} expected by the model itself")  # fmt: skip
    print(f"right kinds: {rate(path['kind'].values == kinds, kinds >= 0)}")

    # Anything counted along a path gets its uncertainty from the draws.
    z = draws["z_{time}"].values
    changes = ((z[:, 1:] != z[:, :-1]) & inside[1:]).sum(1).double()
    true_changes = ((states[1:] != states[:-1]) & inside[1:]).sum(0)
    low, high = changes.quantile(torch.tensor([0.05, 0.95]), dim=0)
    print("\nanimal  p(changes often)  changes of state, 90% interval  truth")
    for n in range(animals):
        often = smoothed["kind"].values[n, 1]
        print(f"{n:6d}  {often:16.3f}  {f'{low[n]:.0f} to {high[n]:.0f}':>30s}  {true_changes[n]:5d}")
    covered = ((low <= true_changes) & (true_changes <= high)).double().mean()
    print(f"intervals that contain the truth: {covered:.2f}")

    # What comes next, and whether the model makes such data.
    ahead = fit.predict(3)["y_{time}"].sel(animal=0)
    print("\nanimal 0, next steps (mean, 90% interval):", ", ".join(
        f"{mean:.1f} ({low:.1f} to {high:.1f})" for mean, _, low, _, high in ahead.values.tolist()))  # fmt: skip
    print(f"\nresiduals by animal\n{fit.residual_summary('y_{time}')}")
    jumps = {"mean jump": lambda d: (d["y_{time}"][1:] - d["y_{time}"][:-1]).abs().nanmean()}
    print(f"\nin the data, and in replicated data\n{fit.check(jumps, 200)}")
    if plot:
        often = smoothed["kind"].values[:, 1]
        names = [f"animal {n}, changes often with probability {often[n]:.2f}" for n in range(animals)]
        draw(p, path["z_{time}"].values, data.lengths, plot, states, names)


def whales(file: str, plot: str) -> None:
    import pilot_whales

    torch.set_default_dtype(torch.float64)
    data = pilot_whales.load(file)
    fit = pilot_whales.main(file, states=4, components=2, restarts=4, seed=0)
    smoothed = fit.smooth().relabelled({"whale": data.ids})
    print("\nwhale  probability of each component")
    for whale in data.ids:
        print(f"{whale:12s}", "  ".join(f"{x:.3f}" for x in smoothed["component"].sel(whale=whale).values))
    if plot:
        lengths = data.seen["dive.dur"].sum(0)
        draw(smoothed["z_{time}"].values, fit.viterbi()["z_{time}"].values, lengths, plot, None, list(data.ids))


def rate(right: Tensor, where: Tensor) -> str:
    return f"{right[where].double().mean():.3f}"


def draw(p: Tensor, path: Tensor, lengths: Tensor, file: str, truth: Tensor | None, names: list[str]) -> None:
    """Probabilities of the states over time as areas, above them the most probable path, and the truth where known."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import ListedColormap

    shown = [*range(min(3, len(names))), *range(max(3, len(names) - 3), len(names))]
    colours = ["#4477aa", "#ddaa33", "#bb5566", "#228833", "#aa3377"][: p.shape[-1]]
    look = {
        "cmap": ListedColormap(colours),
        "vmin": 0,
        "vmax": len(colours) - 1,
        "aspect": "auto",
        "interpolation": "nearest",
    }
    figure, axes = plt.subplots(
        len(shown), 1, figsize=(10, 1.25 * len(shown) + 0.6), sharex=True, constrained_layout=True
    )
    for n, axis in zip(shown, axes, strict=True):
        end = int(lengths[n])
        areas = torch.cat([p[:end, n], p[end - 1 : end, n]])  # a step lasts until the next one begins
        axis.stackplot(torch.arange(end + 1).numpy(), areas.T.numpy(), colors=colours, step="post", linewidth=0)
        rows = [("path", path)] if truth is None else [("path", path), ("truth", truth)]
        for k, (label, z) in enumerate(rows):
            axis.imshow(z[:end, n][None].numpy(), extent=(0, end, 1.12 + 0.26 * k, 1.33 + 0.26 * k), **look)
            axis.text(-0.005 * p.shape[0], 1.22 + 0.26 * k, label, ha="right", va="center", fontsize=7)
        axis.set(
            xlim=(0, p.shape[0]), ylim=(0, 1.12 + 0.26 * len(rows)), yticks=[0, 0.5, 1], yticklabels=["0", "", "1"]
        )
        axis.set_title(names[n], loc="right", fontsize=9, pad=2)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours]
    figure.legend(
        handles, [f"state {k}" for k in range(len(colours))], loc="outside upper left", ncols=5, frameon=False
    )
    figure.supylabel("probability of each state given all data", fontsize=9)
    axes[-1].set_xlabel("step")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="pilot_whales.csv; simulated data without it")
    parser.add_argument("--animals", type=int, default=20)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", default="", help="write a picture to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    options = parser.parse_args()
    if options.data:
        whales(options.data, options.plot)
    else:
        small = options.smoke
        main(6 if small else options.animals, 60 if small else options.steps, options.plot, options.seed)
