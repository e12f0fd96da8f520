"""What each strategy of a chain costs: kernel, segments, scan and sequential side by side, and what the plan expects.

Value and gradient of the operator alone, float32, one thread by default. The figures behind
`symhmm.compiler.plan.choose_strategy`. Run as

    python -m benchmarks.strategies --seconds 2

With ``--structured`` chains that move together in stages beside one dense matrix of their joint states, and chains of many
states through a list of their possible moves beside all moves: the figures behind ``STAGED`` and
`symhmm.chains.stage_tables`. Least times of one thread (``time.thread_time``), which hold on a busy machine, too.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from benchmarks.chains import ours
from symhmm.chains import sparse
from symhmm.chains.operator import chain_message, staged_message
from symhmm.chains.stages import arranged, dense, joined
from symhmm.compiler.plan import choose_strategy
from symhmm.distributions.chain import dwell_chain

STRATEGIES = ("kernel", "segments", "scan", "sequential")
LENGTHS, ROWS, STATES = (100, 1_000, 10_000), (1, 20, 200), (2, 4, 16)
LARGEST = 4e7  # T B K^3: beyond, the reference would take minutes


def milliseconds(strategy: str, length: int, rows: int, states: int, seconds: float) -> float:
    """Median time of value and gradient; of the kernel recorded, as a compiled density has it."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, states, states, generator=generator),
        torch.randn(rows, length, states, generator=generator),
    ]
    inputs = [x.log_softmax(-1).requires_grad_() for x in inputs]

    def plain() -> object:
        return torch.autograd.grad(chain_message(*inputs, strategy=strategy).logsumexp(-1).sum(), inputs)

    run = ours(*(x.detach() for x in inputs)) if strategy == "kernel" else plain
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def least(run: Callable[[], object], seconds: float) -> float:
    """Least milliseconds of this thread."""
    run()
    times, end = [math.inf], time.perf_counter() + seconds
    while len(times) < 6 or time.perf_counter() < end:
        start = time.thread_time()
        run()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def stages(count: int, size: int, rows: int, length: int, dtype: torch.dtype, coupled: bool, seconds: float) -> None:
    """Chains that move together: each by itself, or each looking at the one before."""
    generator = torch.Generator().manual_seed(0)
    looks = [(m, count + m) if not coupled or m == 0 else (m - 1, m, count + m) for m in range(count)]
    plan, _ = arranged((size,) * count, looks)
    factors = [torch.randn(1, 1, n, generator=generator, dtype=dtype).requires_grad_() for n in plan.entries]
    emission = torch.randn(rows, length, size**count, generator=generator, dtype=dtype).requires_grad_()
    inputs = [*factors, emission]

    def gradient(message: Tensor) -> None:
        torch.autograd.grad(message.logsumexp(-1).sum(), inputs)

    staged = least(lambda: gradient(staged_message(factors, emission, length, plan)), seconds)
    whole = least(lambda: gradient(chain_message(dense(joined(factors), plan), emission)), seconds)
    own = staged / whole * size ** (2 * count) / plan.cost
    kind = f"{str(dtype)[6:]}{', coupled' if coupled else ''}"
    print(f"{count} chains of {size:2d} states, B={rows:2d}, {kind:16}  stages {staged:7.2f} ms, dense {whole:7.2f} ms:"
          f" {whole / staged:5.2f} times faster, a product takes {own:4.2f} of a dense one")  # fmt: skip


def left_to_right(size: int, dtype: torch.dtype) -> Tensor:
    """Stay, or go one further."""
    i = torch.arange(size)
    moves = torch.where(i == i[:, None], 0.8, torch.where(i == i[:, None] + 1, 0.2, 0.0))
    return moves.to(dtype).log()


def semi_markov(size: int, longest: int, dtype: torch.dtype) -> Tensor:
    """States of up to ``longest`` steps."""
    dwell = torch.randn(size, longest, generator=torch.Generator().manual_seed(0), dtype=dtype)
    return dwell_chain((1 - torch.eye(size, dtype=dtype)) / (size - 1), dwell)


def some_moves(size: int, share: float, dtype: torch.dtype) -> Tensor:
    """Moves at random, and staying."""
    possible = torch.rand(size, size, generator=torch.Generator().manual_seed(0)) < share
    return torch.where(possible | torch.eye(size, dtype=torch.bool), 0.0, -torch.inf).to(dtype).log_softmax(-1)


def moves(name: str, transition: Tensor, rows: int, length: int, seconds: float) -> None:
    """A chain through the list of its possible moves, and through all moves."""
    size, dtype = transition.shape[-1], transition.dtype
    emission = 0.2 * torch.randn(rows, length, size, generator=torch.Generator().manual_seed(1), dtype=dtype)
    inputs = [transition[None].requires_grad_(), emission.requires_grad_()]
    found, fewest = [], sparse.FEWEST
    for sparse.FEWEST in (0, 10**9):
        found.append(least(lambda: torch.autograd.grad(chain_message(*inputs).logsumexp(-1).sum(), inputs), seconds))
    sparse.FEWEST = fewest
    share = float((transition > -torch.inf).double().mean())
    print(f"{name:13} K={size:3d}, B={rows:2d}, {str(dtype)[6:]}, {share:5.1%} possible  listed {found[0]:7.2f} ms,"
          f" all {found[1]:7.2f} ms: {found[1] / found[0]:5.2f} times faster")  # fmt: skip


def structured(seconds: float) -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    for count, size, length in ((2, 4, 400), (2, 5, 400), (2, 6, 300), (2, 8, 200), (3, 3, 300), (3, 4, 200), (5, 2, 300),
                                (4, 3, 200), (4, 4, 50)):  # fmt: skip
        stages(count, size, 16, length, torch.float32, False, seconds)
    for dtype, rows, coupled in ((torch.float64, 16, False), (torch.float32, 1, False), (torch.float32, 16, True)):
        stages(2, 6, rows, 300, dtype, coupled, seconds)
        stages(3, 4, rows, 200, dtype, coupled, seconds)
    for dtype, rows in product((torch.float32, torch.float64), (16, 1)):
        for size in (32, 64, 128):
            moves("left to right", left_to_right(size, dtype), rows, 200, seconds)
        for size, longest in ((2, 16), (3, 20), (4, 32)):
            moves("semi-Markov", semi_markov(size, longest, dtype), rows, 200, seconds)
        for size, share in product((32, 64), (0.1, 0.2)):
            moves("at random", some_moves(size, share, dtype), rows, 200, seconds)


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
    parser.add_argument("--structured", action="store_true", help="chains in stages, and lists of possible moves")
    options = parser.parse_args()
    if options.structured:
        structured(options.seconds)
    else:
        main(options.seconds, options.threads)
