"""Questions about hidden states: what each costs beside a likelihood and its gradient, in processor time.

B sequences of T steps with K states, normal observations and one transition matrix. Run alone, on one thread, as

    OMP_NUM_THREADS=1 python -m benchmarks.questions --steps 1800 --sequences 20 --states 3

The aims: smoothing at most 1.5 times a gradient, the best path at most 1.5 times a likelihood, 1000 draws in a second.
"""

import argparse
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import symhmm
from symhmm.posterior.decode import sample_states, viterbi
from symhmm.posterior.marginals import pairwise, smooth, transition_counts
from symhmm.posterior.pointwise import log_likelihood_by
from symhmm.posterior.prefix import filtered


def model(y: Tensor, states: int) -> None:
    """A hidden Markov model of each sequence."""
    loc = pyro.param("loc", lambda: torch.linspace(-2.0, 2.0, states))
    table = pyro.param("logits", lambda: 3.0 * torch.eye(states)).softmax(-1)
    z = None
    with pyro.plate("sequence", y.shape[1]):
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(states) / states if z is None else table[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def least(run: Callable[[], object], seconds: float) -> float:
    """Least processor time of several runs after the first, milliseconds."""
    run()
    found, end = [], time.perf_counter() + seconds
    while len(found) < 3 or time.perf_counter() < end:
        start = time.process_time()
        run()
        found.append(1e3 * (time.process_time() - start))
    return min(found)


def main(steps: int, sequences: int, states: int, seconds: float, threads: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    y = torch.randn(steps, sequences, generator=torch.Generator().manual_seed(0))
    density = symhmm.compile(model, y, states)
    values = density.initial()
    vector = density.pack(values)
    asked: dict[str, Callable[[], object]] = {
        "likelihood": lambda: density.log_prob(values),
        "gradient": lambda: density.value_and_grad(vector),
        "smooth": lambda: smooth(density, values),
        "pairwise": lambda: pairwise(density, values),
        "transition_counts": lambda: transition_counts(density, values),
        "filter": lambda: filtered(density, values),
        "viterbi": lambda: viterbi(density, values),
        "sample_states, 1": lambda: sample_states(density, values, 1),
        "sample_states, 1000": lambda: sample_states(density, values, 1000),
        "log_likelihood_by step": lambda: log_likelihood_by(density, values, "time"),
    }
    times = {n: least(run, seconds) for n, run in asked.items()}
    print(f"T = {steps}, B = {sequences}, K = {states}, {threads} threads: milliseconds of processor time, least")
    print(f"{'':24}{'ms':>10}{'likelihoods':>13}{'gradients':>11}")
    for n, x in times.items():
        print(f"{n:24}{x:10.2f}{x / times['likelihood']:13.2f}{x / times['gradient']:11.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--sequences", type=int, default=20)
    parser.add_argument("--states", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="per row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    main(options.steps, options.sequences, options.states, options.seconds, options.threads)
