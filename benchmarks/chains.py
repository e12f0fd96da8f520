"""The chain operator and a whole model beside Dynamax, value and gradient, paired in one run; time and memory as they grow.

Operator: the log-likelihood of B hidden Markov chains with one transition matrix, T steps and K states from given
log-likelihoods of the observations; its gradient with respect to those and to the matrix (to its logarithms, ours).
Model: a Gaussian hidden Markov model from numbers to the gradient of logits, means and standard deviations, as a compiled
Pyro program on our side (`benchmarks.peers`). Dynamax is jitted, all is in float32. Run as

    python -m benchmarks.chains --seconds 5
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import peers
from symhmm.chains.operator import chain_evidence
from symhmm.compiler.step import trace
from symhmm.memory import keep_freed_memory

SIZES = {
    (1800, 20, 3): (15, 4),
    (1000, 1, 5): (10, 5),
    (500, 100, 16): (8, 3),
    (1000, 64, 64): (4, 2),
    (200_000, 1, 4): (3, 2),
}
ALONG_T = [(1_000, 100, 3), (10_000, 100, 3), (100_000, 100, 3), (1_000_000, 100, 3)]
ALONG_B = [(1_000, 20, 3), (1_000, 100, 3), (1_000, 1_000, 3), (1_000, 10_000, 3), (1_000, 100_000, 3)]
ALONG_K = [(1_000, 64, 4), (1_000, 64, 8), (1_000, 64, 16), (1_000, 64, 32), (1_000, 64, 64)]

Step = Callable[[], object]


def tensors(length: int, batch: int, states: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of one transition matrix, log-likelihoods of observations."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(states, states, generator=generator)
    return logits.log_softmax(-1), torch.randn(batch, length, states, generator=generator)


def ours(matrix: Tensor, emission: Tensor) -> Step:
    """Value and gradient by the chain operator, captured as a compiled density is."""
    initial = torch.full(matrix.shape[-1:], 1 / matrix.shape[-1]).log()

    def step(matrix: Tensor, emission: Tensor) -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (matrix, emission)]
        value = chain_evidence(initial, inputs[0][None], inputs[1]).sum()
        return value.detach(), *torch.autograd.grad(value, inputs)

    captured = trace(step, [matrix, emission], [], gradients=True)
    constants = captured.constants([])

    @torch.inference_mode()
    def run() -> object:
        return captured.body(matrix, emission, *constants)

    return run


def dynamax(matrix: Tensor, emission: Tensor) -> Step:
    """The same with Dynamax, jitted."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model.inference import hmm_filter

    initial = jnp.full(matrix.shape[-1], 1 / matrix.shape[-1])

    def value(matrix: object, emission: object) -> object:
        return jax.vmap(lambda e: hmm_filter(initial, matrix, e).marginal_loglik)(emission).sum()

    step = jax.jit(jax.value_and_grad(value, (0, 1)))
    arrays = jnp.asarray(matrix.exp().numpy()), jnp.asarray(emission.numpy())
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


def beside(
    name: str, make: Callable[..., Step], peer: Callable[..., Step], argument: Callable[..., tuple], seconds: float
) -> None:
    """Print a table of one kind of step for all sizes."""
    column = ("operator", "model").index(name)
    print(
        f"\n{name:12}{'T':>8} {'B':>5} {'K':>4} {'ratio':>7} {'of least':>9} {'wanted':>7} {'symhmm':>20} {'Dynamax':>20}"
    )
    for size, wanted in SIZES.items():
        inputs = argument(*size)
        times = compare([make(*inputs), peer(*inputs)], seconds)
        cells = [f"{statistics.median(x):.3f} ({min(x):.3f})" for x in times]
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        least = min(times[1]) / min(times[0])
        place = " ".join(f"{n:>{w}d}" for n, w in zip(size, (8, 5, 4), strict=True))
        print(f"{'':12}{place} {ratio:7.1f} {least:9.1f} {wanted[column]:7d} {cells[0]:>20} {cells[1]:>20}", flush=True)


def growth(sizes: list[tuple[int, int, int]], seconds: float) -> None:
    """Print how time and memory of the operator grow; each size in a process of its own."""
    print(f"\n{'T':>8} {'B':>6} {'K':>4} {'ms':>9} {'ns per T B K^2':>15} {'memory / emissions':>19}")
    for size in sizes:
        command = [sys.executable, "-m", "benchmarks.chains", "--alone", *map(str, size), "--seconds", str(seconds)]
        command += ["--threads", str(torch.get_num_threads())]
        least, memory = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        length, batch, states = size
        each = least * 1e6 / (length * batch * states**2)
        print(f"{length:8d} {batch:6d} {states:4d} {least:9.3f} {each:15.4f} {memory:19.2f}", flush=True)


def peak_bytes() -> int:
    """The most memory that this process has had since `forget_peak` (Linux)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


def forget_peak() -> None:
    """Let the peak begin at what this process has now."""
    with open("/proc/self/clear_refs", "w") as references:
        references.write("5")


def alone(size: tuple[int, int, int], seconds: float) -> None:
    """Print least milliseconds of a step, and peak memory above what stood before it in sizes of the emission terms."""
    ours(*tensors(64, 16, size[2]))()  # the kernels are loaded
    inputs = tensors(*size)
    forget_peak()
    before = peak_bytes()
    step = ours(*inputs)
    step()
    memory = (peak_bytes() - before) / (inputs[1].numel() * 4)
    print(min(compare([step], seconds)[0]), memory)


def main(seconds: float, threads: int) -> None:
    """Print the tables beside Dynamax, and the growth of time and memory with T, B and K."""
    print(
        f"value and gradient, float32, {threads} threads, load {os.getloadavg()[0]:.1f}: milliseconds, median (least)"
    )
    try:
        import dynamax as _  # noqa: F401
    except ImportError:
        print("Dynamax is not installed: the bench extra has it")
    else:
        beside("operator", ours, dynamax, tensors, seconds)
        beside("model", peers.ours, peers.dynamax, lambda *size: (peers.Data(*size),), seconds)
    for sizes in (ALONG_T, ALONG_B, ALONG_K):
        growth(sizes, seconds / 5)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--alone", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    if options.alone:
        alone(tuple(options.alone), options.seconds)
    else:
        main(options.seconds, options.threads)
