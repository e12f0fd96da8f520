"""What each strategy of a chain costs: kernel, segments, scan and sequential side by side, and what the plan expects.

Value and gradient of the operator alone, float32, one thread by default. The figures behind
`symhmm.compiler.plan.choose_strategy`. Run as

    python -m benchmarks.strategies --seconds 2
"""

import argparse
import statistics
import time
from itertools import product

import torch

from symhmm.chains.operator import chain_message
from symhmm.compiler.plan import choose_strategy

STRATEGIES = ("kernel", "segments", "scan", "sequential")
LENGTHS, ROWS, STATES = (100, 1_000, 10_000), (1, 20, 200), (2, 4, 16)
LARGEST = 4e7  # T B K^3: beyond, the reference would take minutes


def milliseconds(strategy: str, length: int, rows: int, states: int, seconds: float) -> float:
    """Median time of value and gradient."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, states, states, generator=generator),
        torch.randn(rows, length, states, generator=generator),
    ]
    inputs = [x.log_softmax(-1).requires_grad_() for x in inputs]
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        torch.autograd.grad(chain_message(*inputs, strategy=strategy).logsumexp(-1).sum(), inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def main(seconds: float, threads: int) -> None:
    """Print one row per size: times relative to the kernel."""
    torch.set_num_threads(threads)
    print(
        f"value and gradient, float32, {threads} threads: milliseconds of the kernel, and times of it that others take"
    )
    print(
        f"{'T':>7} {'B':>5} {'K':>4} {'kernel':>9} " + " ".join(f"{s:>10}" for s in STRATEGIES[1:]) + "   the plan says"
    )
    for length, rows, states in product(LENGTHS, ROWS, STATES):
        if length * rows * states**3 > LARGEST:
            continue
        cost = {s: milliseconds(s, length, rows, states, seconds / len(STRATEGIES)) for s in STRATEGIES}
        ratios = " ".join(f"{cost[s] / cost['kernel']:10.1f}" for s in STRATEGIES[1:])
        strategy, why, _ = choose_strategy("auto", rows, length, states, 1)
        print(f"{length:7d} {rows:5d} {states:4d} {cost['kernel']:9.3f} {ratios}   {strategy}, {why.split('; ')[1]}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="per row")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    main(options.seconds, options.threads)
