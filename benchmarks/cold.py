"""From a cold start: what a fresh process pays before its first fit, stage by stage, and for fits by EM and maximum likelihood.

Sequences of three normal states that start equal (20 x 500 numbers unless ``--data`` names a file with a column y). Each row is
processor time of a process that has only imported symhmm. Run alone, on one thread, as

    OMP_NUM_THREADS=1 python -m benchmarks.cold --data sim_mixed.csv

The aims: compile and fit in at most 1 s, and fit again in at most 0.1 s.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import symhmm
from symhmm.capture import program
from symhmm.chains.operator import chain_message
from symhmm.compiler import density as densities
from symhmm.compiler import step as steps
from symhmm.distributions import with_zero_diagonal
from symhmm.infer import em, mle

SEQUENCES = 20


def model(y: Tensor) -> None:
    """Sequences, shape (N, T), of three normal states; transition logits relative to staying."""
    beta = pyro.param("beta", lambda: torch.full((3, 2), -2.0, dtype=y.dtype))
    loc = pyro.param("loc", lambda: torch.zeros(3, dtype=y.dtype))
    scale = pyro.param("scale", lambda: torch.ones(3, dtype=y.dtype), constraint=constraints.positive)
    rows = with_zero_diagonal(beta)
    with pyro.plate("individual", y.shape[0], dim=-1):
        z = 0
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=torch.zeros(3, dtype=y.dtype) if t == 0 else rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[:, t])


def read(path: str | None) -> Tensor:
    """The numbers, shape (20, T), float64."""
    if path is None:
        generator = np.random.default_rng(0)
        moves = generator.random((SEQUENCES, 500)) < 0.1
        state = (generator.integers(1, 3, moves.shape) * moves).cumsum(1) % 3
        return torch.from_numpy(generator.normal(3.0 * state, 1.0 + state))
    with open(path) as file:
        names = file.readline().strip().split(",")
    return torch.from_numpy(np.genfromtxt(path, delimiter=",", skip_header=1, usecols=names.index("y"))).reshape(
        SEQUENCES, -1
    )


class Clock:
    """Processor time spent in functions, by what they do."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def of(self, what: str, run: Callable[[], Any]) -> Any:
        start = time.process_time()
        try:
            return run()
        finally:
            self.seconds[what] = self.seconds.get(what, 0.0) + time.process_time() - start

    def watch(self, what: str, module: Any, name: str) -> None:
        """Count what the function ``name`` of a module takes from now on."""
        watched = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: self.of(what, lambda: watched(*args, **kwargs)))


def stages(y: Tensor) -> None:
    """Print what compiling and the first gradient consist of."""
    clock = Clock()
    ones = torch.zeros(1, 3, 3, dtype=y.dtype), torch.zeros(2, 3, dtype=y.dtype), torch.zeros(3, dtype=y.dtype)
    clock.of("chain kernels: numba, machine code from disk", lambda: chain_message(*ones, length=2, history=1))
    clock.watch("capture", densities, "capture")
    clock.watch("verification", program, "_verify")
    clock.watch("trace", steps, "record")
    clock.watch("trace and passes", densities, "trace")
    density = clock.of("compile", lambda: symhmm.compile(model, y))
    at = density.pack(density.initial())
    took = clock.seconds
    rows = {k: took[k] for k in took if k.startswith("chain")}
    rows["capture, without verification"] = took["capture"] - took["verification"]
    rows["verification"] = took["verification"]
    rows["trace"] = took["trace"]
    rows["passes over the graph"] = took["trace and passes"] - took["trace"]
    rows["compile, kernels apart"] = took["compile"]
    clock.of("first gradient", lambda: density.value_and_grad(at))
    rows["first gradient, traced and simplified"] = took["first gradient"]
    rows["gradient"] = min(_seconds(lambda: density.value_and_grad(at)) for _ in range(20))
    for what, seconds in rows.items():
        print(f"{what:<48}{seconds:8.3f} s")


def fits(y: Tensor, method: str) -> None:
    """Print one row: compile, first fit and the fastest of the next, from one start."""
    run = {"em": em.run, "mle": mle.run}[method]
    start = time.process_time()
    density = symhmm.compile(model, y)
    compiled = time.process_time()
    estimate = run(density, restarts=1)
    fitted = time.process_time()
    again = min(_seconds(lambda: run(density, restarts=1)) for _ in range(5))
    print(f"{method:<6}{compiled - start:10.3f}{fitted - compiled:12.3f}{fitted - start:10.3f}{again:10.3f}"
          f"{estimate.n_evaluations:14}{estimate.objective:16.4f}")  # fmt: skip


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def main(path: str | None) -> None:
    """Print both tables, each row from a process of its own."""
    print("seconds of processor time, one thread, after imports")
    _child("stages", path)
    print(f"{'':6}{'compile':>10}{'first fit':>12}{'both':>10}{'again':>10}{'evaluations':>14}{'log-density':>16}")
    for method in ("em", "mle"):
        _child(method, path)


def _child(what: str, path: str | None) -> None:
    given = ["--data", path] if path else []
    command = [sys.executable, "-m", "benchmarks.cold", "--only", what, *given]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1], env={**os.environ, "OMP_NUM_THREADS": "1"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data")
    parser.add_argument("--only", choices=("stages", "em", "mle"))
    options = parser.parse_args()
    if options.only is None:
        main(os.path.abspath(options.data) if options.data else None)
    else:
        torch.set_num_threads(1)
        numbers = read(options.data)
        stages(numbers) if options.only == "stages" else fits(numbers, options.only)
