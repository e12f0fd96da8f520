"""How many regimes do major earthquakes have?  Poisson hidden Markov models of the 107 yearly counts, 1900-2006.

    z_0 ~ stationary distribution of A,   z_t ~ A[z_{t-1}],   y_t ~ Poisson(rate[z_t]).

Fits m = 1..4 states by maximum likelihood from several starts and compares them by AIC and BIC. Data: U.S. Geological
Survey, as in Zucchini, MacDonald and Langrock (2016), Hidden Markov Models for Time Series, table 1.1. Run as

    python examples/earthquakes.py
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import symhmm
from symhmm.datasets import earthquakes
from symhmm.distributions import stationary_distribution


def model(y: Tensor, states: int) -> None:
    # Rates start spread over the data, and states start sticky: ten times likelier to stay than to move to another one.
    levels = torch.linspace(0.1, 0.9, states, dtype=y.dtype) if states > 1 else torch.tensor([0.5], dtype=y.dtype)
    rate = pyro.param("rate", lambda: torch.quantile(y, levels), constraints.positive)
    sticky = torch.ones(states, states, dtype=y.dtype) + 9 * torch.eye(states, dtype=y.dtype)
    transition = pyro.param("transition", lambda: sticky / sticky.sum(-1, keepdim=True), constraints.simplex)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(stationary_distribution(transition) if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Poisson(rate[z]), obs=y[t])


def main(most: int, restarts: int) -> dict[int, float]:
    y = earthquakes().double()
    found = {}
    print(" m   log-likelihood  parameters      AIC      BIC   rates")
    for states in range(1, most + 1):
        fit = symhmm.fit(model, y, states, method="mle", restarts=restarts, seed=0)
        rates = " ".join(f"{r:.1f}" for r in fit.values["rate"].sort().values)
        print(f"{states:2d}   {fit.objective:14.4f}  {fit.density.size:10d}  {fit.aic:7.2f}  {fit.bic:7.2f}   {rates}")
        found[states] = fit.objective
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=4, help="largest number of states")
    parser.add_argument("--restarts", type=int, default=10, help="starts of each fit")
    parser.add_argument("--smoke", action="store_true", help="two states, two starts")
    options = parser.parse_args()
    main(2, 2) if options.smoke else main(options.most, options.restarts)
