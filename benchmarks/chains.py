"""The chain operator: value and gradient of a batch of chains, symhmm beside Dynamax's jitted filters, paired in one run.

Both compute the log-likelihood of B hidden Markov chains with one transition matrix, T steps and K states from the same
log-likelihoods of the observations, and its gradient with respect to transition logits and those log-likelihoods, in
float32. Ours is captured once, as a compiled density is. Run as

    python -m benchmarks.chains --seconds 5
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from symhmm.chains.operator import chain_message

SIZES = [(1800, 20, 3), (1000, 1, 5), (500, 100, 16), (1000, 64, 64), (200_000, 1, 4)]
GROWTH = [(1_000, 20, 3), (10_000, 20, 3), (100_000, 20, 3), (1_000, 200, 3), (1_000, 2_000, 3), (1_000, 20, 6)]

Step = Callable[[], object]


def ours(logits: Tensor, emission: Tensor) -> Step:
    """One captured step of the chain operator."""
    states = logits.shape[-1]

    def step(logits: Tensor, emission: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (logits, emission)]
        message = chain_message(inputs[0].log_softmax(-1)[None], inputs[1])
        value = (message.logsumexp(-1) - torch.tensor(float(states)).log()).sum()
        return value, *torch.autograd.grad(value, inputs)

    graph = make_fx(step)(logits, emission)
    return lambda: graph(logits, emission)


def dynamax(logits: Tensor, emission: Tensor) -> Step | None:
    """The same step with Dynamax, jitted; None where it is not installed."""
    try:
        import jax
        import jax.numpy as jnp
        from dynamax.hidden_markov_model.inference import hmm_filter
    except ImportError:
        return None
    states = logits.shape[-1]
    initial = jnp.full(states, 1 / states)

    def value(logits: object, emission: object) -> object:
        matrix = jax.nn.softmax(logits, -1)
        return jax.vmap(lambda e: hmm_filter(initial, matrix, e).marginal_loglik)(emission).sum()

    step = jax.jit(jax.value_and_grad(value, (0, 1)))
    arrays = jnp.asarray(logits.numpy()), jnp.asarray(emission.numpy())
    return lambda: jax.block_until_ready(step(*arrays))


def timed(step: Step) -> float:
    """Milliseconds of one step."""
    start = time.perf_counter()
    step()
    return (time.perf_counter() - start) * 1e3


def compare(steps: list[Step], seconds: float) -> list[list[float]]:
    """Milliseconds of every step, one after the other, again and again."""
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for step, found in zip(steps, times, strict=True):
            step()  # warms the caches that the other one has filled
            found.append(timed(step))
    return times


def main(seconds: float, threads: int) -> None:
    """Print both tables: beside Dynamax, and the growth of time with T, B and K."""
    torch.set_num_threads(threads)
    print(
        f"value and gradient, float32, {threads} threads, load {os.getloadavg()[0]:.1f}: milliseconds, median (least)"
    )
    print(f"{'T':>8} {'B':>5} {'K':>4} {'ratio':>7} {'of least':>9} {'symhmm':>20} {'Dynamax':>20}")
    for length, batch, states in SIZES:
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(states, states, generator=generator)
        emission = torch.randn(batch, length, states, generator=generator)
        mine, peer = ours(logits, emission), dynamax(logits, emission)
        times = compare([mine, peer] if peer else [mine], seconds)
        cells = [f"{statistics.median(x):.3f} ({min(x):.3f})" for x in times] + ["not installed"]
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True)) if peer else float("nan")
        least = min(times[1]) / min(times[0]) if peer else float("nan")
        print(f"{length:8d} {batch:5d} {states:4d} {ratio:7.1f} {least:9.1f} {cells[0]:>20} {cells[1]:>20}", flush=True)
    print(f"\n{'T':>8} {'B':>5} {'K':>4} {'ms':>9} {'ns per T B K^2':>15}")
    for length, batch, states in GROWTH:
        step = ours(torch.randn(states, states), torch.randn(batch, length, states))
        least = min(compare([step], seconds / 5)[0])
        print(f"{length:8d} {batch:5d} {states:4d} {least:9.3f} {least * 1e6 / (length * batch * states**2):15.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    main(options.seconds, options.threads)
