"""When does a rat pay attention?  A GLM-HMM of 20000 decisions, day by day.

A rat hears two tones and says which was louder, left or right, over 80 days. In each hidden state it decides by weights of
its own on what it hears and on what it did before (Ashwood et al. 2022, Nature Neuroscience 25):

    p(y_t = right | z_t = k) = sigmoid(x_t . w_k),   z_t ~ Categorical(A[z_{t-1}]),   each day a chain of its own.

States are summed out exactly. The likelihood may grow without end where a state follows a rule without mistakes, so
weights have a wide normal prior, and the most probable values are taken, from several starts. Data: Akrami et al. (2018),
Nature 554, distributed with psytrack; without --data a small table is made up. Run as

    python examples/psytrack.py --data psytrack_rat_W053.csv --plot psytrack.png
"""

import argparse

import numpy as np
import pandas as pd
import torch

from symhmm.models.glm_hmm import GLMHMM, weights
from symhmm.models.model_fit import ModelFit
from symhmm.tables.data import SequenceData

INPUTS = ["s1", "s2", "s_avg_prev", "h_prev", "c_prev"]


def made_up(days: int = 12, trials: int = 60, seed: int = 0) -> pd.DataFrame:
    """A table like the rat's: attentive on some trials, biased to the right on others."""
    rng = np.random.default_rng(seed)
    table = pd.DataFrame(rng.normal(size=(days * trials, len(INPUTS))), columns=INPUTS)
    attentive = np.repeat(rng.random(days * trials // 20) < 0.6, 20)
    logit = np.where(attentive, 3 * (table.s1 - table.s2), 1.0)
    return table.assign(
        session=np.repeat(np.arange(days), trials), y=1 + (rng.random(len(table)) < 1 / (1 + np.exp(-logit)))
    )


def main(table: pd.DataFrame, states: int, restarts: int, plot: str, seed: int) -> ModelFit:
    table = table.assign(right=table.y - 1)
    data = SequenceData.from_frame(table, session="session", streams=["right"], covariates=INPUTS)
    print(data)
    model = GLMHMM(states, "right", "~ " + " + ".join(INPUTS))
    fit = model.fit(data, "map", priors=True, restarts=restarts, seed=seed)
    print(f"\nlog-posterior density {fit.objective:.2f} after {fit.estimate.seconds:.1f} s; {fit.status}")
    print(fit.optima)
    print(f"\nweights, logits of answering right\n{weights(fit)}")
    days = fit.occupancy().only.values.reshape(-1, states)
    share = days / days.sum(-1, keepdim=True)
    print(
        "\nshare of trials in each state: ", "  ".join(f"{k}: {p:.0%}" for k, p in enumerate(days.sum(0) / days.sum()))
    )
    change = zip(share[:10].mean(0), share[-10:].mean(0), strict=True)
    print("first ten days -> last ten:     ", "  ".join(f"{k}: {a:.0%} -> {b:.0%}" for k, (a, b) in enumerate(change)))
    if plot:
        draw(fit, share, plot)
        print(f"picture in {plot}")
    return fit


def draw(fit: ModelFit, share: torch.Tensor, path: str) -> None:
    """Weights of each state, and how the states share the days."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = weights(fit)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for k, row in enumerate(table.rows):
        left.plot(range(len(row) - 1), row[1:], "o-", color=f"C{k}", label=f"state {row[0]}")
        right.plot(share[:, k], color=f"C{k}")
    left.axhline(0, color="0.7", linewidth=1)
    left.set(title="weights", ylabel="logit of answering right")
    left.set_xticks(range(len(table.columns) - 1), table.columns[1:], rotation=30, ha="right")
    left.legend(frameon=False)
    right.set(title="share of trials in each state", xlabel="day", ylim=(0, 1))
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="psytrack_rat_W053.csv; a made-up rat without it")
    parser.add_argument("--states", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--plot", default="", help="write a picture to this file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="small and quick")
    options = parser.parse_args()
    rat = pd.read_csv(options.data) if options.data else made_up(4 if options.smoke else 12)
    main(
        rat,
        2 if options.smoke else options.states,
        1 if options.smoke else options.restarts,
        options.plot,
        options.seed,
    )
