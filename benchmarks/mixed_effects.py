"""A mixed-effect hidden Markov model: value and gradient, symhmm beside Pyro's own TraceEnum_ELBO, in one run.

Forty animals, three states, three streams (gamma, von Mises, beta), and for each animal one of four behaviours that decide its
transition matrix. Both take the same program, as it is written here, at the same values. Run as

    python -m benchmarks.mixed_effects --steps 1800
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

import symhmm

STATES, KINDS = 3, 4


@dataclass(frozen=True)
class Tracks:
    """Three streams and what is seen of them, each of shape (T, N)."""

    step: Tensor
    turn: Tensor
    dive: Tensor
    mask: Tensor


def tracks(steps: int, animals: int, generator: torch.Generator) -> Tracks:
    """Numbers in the range of each stream; speed does not depend on what they are."""

    def uniform() -> Tensor:
        return torch.rand(steps, animals, generator=generator)

    return Tracks(5 * uniform() + 0.1, 3 * (2 * uniform() - 1), 0.02 + 0.96 * uniform(), uniform() < 0.95)


def model(data: Tracks) -> None:
    """Animals with a discrete random effect on their transitions, and three streams."""
    positive = constraints.positive
    weights = pyro.param("weights", lambda: torch.full((KINDS,), 1 / KINDS), constraints.simplex)
    logits = pyro.param("logits", lambda: torch.linspace(-1, 1, KINDS * STATES * STATES).reshape(KINDS, STATES, STATES))
    shape = pyro.param("shape", lambda: torch.tensor([1.0, 2.0, 4.0]), positive)
    rate = pyro.param("rate", lambda: torch.tensor([1.0, 1.0, 1.5]), positive)
    kappa = pyro.param("kappa", lambda: torch.tensor([0.5, 1.0, 2.0]), positive)
    up = pyro.param("up", lambda: torch.tensor([1.0, 2.0, 4.0]), positive)
    down = pyro.param("down", lambda: torch.tensor([4.0, 2.0, 1.0]), positive)
    steps, animals = data.step.shape
    with pyro.plate("animal", animals, dim=-1):
        kind = pyro.sample("kind", dist.Categorical(weights))
        z = torch.tensor(0)
        for t in pyro.markov(range(steps)):
            with pyro.poutine.mask(mask=data.mask[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[kind, z]))
                pyro.sample(f"step_{t}", dist.Gamma(shape[z], rate[z]), obs=data.step[t])
                pyro.sample(f"turn_{t}", dist.VonMises(torch.zeros(()), kappa[z]), obs=data.turn[t])
                pyro.sample(f"dive_{t}", dist.Beta(up[z], down[z]), obs=data.dive[t])


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall time of each of ``repeats`` runs."""
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        out.append(time.perf_counter() - start)
    return out


def main(steps: int, animals: int, repeats: int, pyro_repeats: int, threads: int) -> float:
    """Print the table; returns the ratio of medians."""
    torch.set_num_threads(threads)
    data = tracks(steps, animals, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    density = symhmm.compile(model, data)
    compiled = time.perf_counter() - start
    vector = density.pack(density.initial())
    start = time.perf_counter()
    value, _ = density.value_and_grad(vector)
    first = time.perf_counter() - start
    ours = seconds(lambda: density.value_and_grad(vector), repeats)

    pyro.clear_param_store()
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    enumerated = config_enumerate(model)
    found = []

    def peer() -> None:
        loss = elbo.differentiable_loss(enumerated, lambda data: None, data)
        free = [p.unconstrained() for _, p in sorted(pyro.get_param_store().items())]
        torch.autograd.grad(loss, free)
        found.append(-loss.item())

    theirs = seconds(peer, pyro_repeats)
    ratio = statistics.median(theirs) / statistics.median(ours)
    print(
        f"T = {steps}, {animals} animals, {STATES} states, {KINDS} kinds, {threads} threads, {torch.get_default_dtype()}"
    )
    print(f"log-density            symhmm {value.item():.3f}   Pyro {found[0]:.3f}")
    print(
        f"compile {compiled:.2f} s, first gradient {first:.2f} s, {density.compiled.steps[('gradient',)].nodes} operations"
    )
    print(f"value and gradient     symhmm {statistics.median(ours) * 1e3:.2f} ms (least {min(ours) * 1e3:.2f})"
          f"   Pyro {statistics.median(theirs):.2f} s   ratio {ratio:.0f}")  # fmt: skip
    return ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--animals", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--pyro-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    main(options.steps, options.animals, options.repeats, options.pyro_repeats, options.threads)
