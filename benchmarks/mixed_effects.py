"""A mixed-effect hidden Markov model: value and gradient, symhmm beside Pyro and funsor, in one run.

Forty animals, three states, three streams (gamma, von Mises, beta), and for each animal one of four behaviours that decide its
transition matrix. symhmm and Pyro's `TraceEnum_ELBO` take the same program, as it is written here; Pyro's `vectorized_markov`
and funsor's `sequential_sum_product` have it written once more, for time as a dimension. All are evaluated at the same values.
Run as

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


def vectorised(data: Tracks) -> None:
    """The same program in the words of `pyro.contrib.funsor`, which wants time as a dimension."""
    from pyroapi import handlers
    from pyroapi import pyro as api

    positive, parallel = constraints.positive, {"enumerate": "parallel"}
    weights = api.param("weights", lambda: torch.full((KINDS,), 1 / KINDS), constraint=constraints.simplex)
    logits = api.param("logits", lambda: torch.linspace(-1, 1, KINDS * STATES * STATES).reshape(KINDS, STATES, STATES))
    shape = api.param("shape", lambda: torch.tensor([1.0, 2.0, 4.0]), constraint=positive)
    rate = api.param("rate", lambda: torch.tensor([1.0, 1.0, 1.5]), constraint=positive)
    kappa = api.param("kappa", lambda: torch.tensor([0.5, 1.0, 2.0]), constraint=positive)
    up = api.param("up", lambda: torch.tensor([1.0, 2.0, 4.0]), constraint=positive)
    down = api.param("down", lambda: torch.tensor([4.0, 2.0, 1.0]), constraint=positive)
    steps, animals = data.step.shape
    each = torch.arange(animals)
    with api.plate("animal", animals, dim=-1):
        kind = api.sample("kind", dist.Categorical(weights), infer=parallel)
        z = torch.tensor(0)
        for t in api.vectorized_markov(name="time", size=steps, dim=-2):
            at = torch.as_tensor(t)[..., None], each
            with handlers.mask(mask=data.mask[at]):
                z = api.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[kind, z]), infer=parallel)
                api.sample(f"step_{t}", dist.Gamma(shape[z], rate[z]), obs=data.step[at])
                api.sample(f"turn_{t}", dist.VonMises(torch.zeros(()), kappa[z]), obs=data.turn[at])
                api.sample(f"dive_{t}", dist.Beta(up[z], down[z]), obs=data.dive[at])


Step = Callable[[], float]


def pyro_loop(data: Tracks) -> Step:
    """Pyro's own elimination of the program, step by step."""
    elbo = TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    enumerated = config_enumerate(model)

    def step() -> float:
        return _differentiated(elbo.differentiable_loss(enumerated, lambda data: None, data))

    return step


def pyro_vectorised(data: Tracks) -> Step:
    """Pyro's elimination with all steps at once."""
    import pyro.contrib.funsor.infer  # noqa: F401 (registers the backend)
    from pyroapi import infer, pyro_backend

    def step() -> float:
        with pyro_backend("contrib.funsor"):
            elbo = infer.TraceMarkovEnum_ELBO(max_plate_nesting=2, strict_enumeration_warning=False)
            return _differentiated(elbo.differentiable_loss(vectorised, lambda data: None, data))

    return step


def _differentiated(loss: Tensor) -> float:
    """The log-density; takes the gradient in all free values."""
    torch.autograd.grad(loss, [p.unconstrained() for _, p in sorted(pyro.get_param_store().items())])
    return -loss.item()


def funsor_scan(data: Tracks, density: symhmm.Density) -> Step:
    """Written by hand for funsor: emission terms with torch's distributions, time eliminated in parallel."""
    import funsor
    from funsor import ops
    from funsor.sum_product import sequential_sum_product

    funsor.set_backend("torch")
    steps, animals = data.step.shape
    time, animal, kind, state = (funsor.Bint[n] for n in (steps - 1, animals, KINDS, STATES))
    vector = density.pack(density.initial()).requires_grad_()

    def step() -> float:
        v = density.unpack(vector)
        streams = dist.Gamma(v["shape"], v["rate"]).log_prob(data.step[..., None])
        streams = streams + dist.VonMises(torch.zeros(()), v["kappa"]).log_prob(data.turn[..., None])
        streams = streams + dist.Beta(v["up"], v["down"]).log_prob(data.dive[..., None])
        terms = torch.where(data.mask[..., None], streams, 0.0)
        moves = v["logits"].log_softmax(-1)
        chain = funsor.Tensor(moves, {"kind": kind, "before": state, "now": state})
        chain = chain + funsor.Tensor(terms[1:], {"time": time, "animal": animal, "now": state})
        product = sequential_sum_product(
            ops.logaddexp, ops.add, chain, funsor.Variable("time", time), {"before": "now"}
        )
        first = funsor.Tensor(moves[:, 0], {"kind": kind, "before": state})
        first = first + funsor.Tensor(terms[0], {"animal": animal, "before": state})
        of_kind = (first + product).reduce(ops.logaddexp, frozenset({"before", "now"}))
        mixed = of_kind + funsor.Tensor(v["weights"].log(), {"kind": kind})
        total: Tensor = mixed.reduce(ops.logaddexp, "kind").reduce(ops.add, "animal").data
        torch.autograd.grad(total, vector)
        return total.item()

    return step


def seconds(run: Callable[[], object], repeats: int) -> list[float]:
    """Wall time of each of ``repeats`` runs."""
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        out.append(time.perf_counter() - start)
    return out


def main(steps: int, animals: int, repeats: int, pyro_repeats: int, threads: int) -> dict[str, float]:
    """Print the table; returns the ratios of medians."""
    torch.set_num_threads(threads)
    data = tracks(steps, animals, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    density = symhmm.compile(model, data)
    compiled = time.perf_counter() - start
    vector = density.pack(density.initial())
    start = time.perf_counter()
    value = density.value_and_grad(vector)[0].item()
    first = time.perf_counter() - start
    ours = statistics.median(seconds(lambda: density.value_and_grad(vector), repeats))
    dtype = torch.get_default_dtype()
    print(f"T = {steps}, {animals} animals, {STATES} states, {KINDS} kinds, {threads} threads, {dtype}")
    nodes = density.compiled.steps[("gradient",)].nodes
    print(f"compile {compiled:.2f} s, first gradient {first:.2f} s, {nodes} operations")
    print(f"{'value and gradient':34}{'ms':>10}{'ratio':>8}   log-density")
    print(f"{'symhmm':34}{ours * 1e3:10.2f}{1:8}   {value:.3f}")
    peers = {
        "funsor sequential_sum_product": (funsor_scan(data, density), max(3, repeats // 10)),
        "Pyro vectorized_markov": (pyro_vectorised(data), max(2, repeats // 10)),
        "Pyro TraceEnum_ELBO": (pyro_loop(data), pyro_repeats),
    }
    ratios = {}
    for name, (step, count) in peers.items():
        pyro.clear_param_store()
        values = [step()] if count > 1 else []  # warm, where one more does not take long
        theirs = statistics.median(seconds(lambda step=step, values=values: values.append(step()), count))
        ratios[name] = theirs / ours
        print(f"{name:34}{theirs * 1e3:10.2f}{ratios[name]:8.0f}   {values[-1]:.3f}")
        if abs(values[-1] - value) > 1e-4 * abs(value):
            raise SystemExit(f"{name} has another log-density than symhmm")
    return ratios


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1800)
    parser.add_argument("--animals", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--pyro-repeats", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    main(options.steps, options.animals, options.repeats, options.pyro_repeats, options.threads)
