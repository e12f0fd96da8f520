"""A few threads for kernels that release the interpreter lock."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

_POOLS: dict[int, ThreadPoolExecutor] = {}
# Threads do not survive a fork: a child starts with none, and makes its own.
os.register_at_fork(after_in_child=_POOLS.clear)

SMALL = 60e-6  # seconds of work below which a second thread costs more than it saves


def thread_count(seconds: float, parts: int) -> int:
    """How many threads to use for work of about ``seconds`` that splits into ``parts``; at most as many as torch uses."""
    return max(1, min(torch.get_num_threads(), parts, int(seconds / SMALL)))


def run(tasks: list[Callable[[], None]]) -> None:
    """Run tasks at the same time, the first one in this thread; the first error among them is raised."""
    if len(tasks) == 1:
        tasks[0]()
        return
    pool = _POOLS.setdefault(len(tasks), ThreadPoolExecutor(len(tasks) - 1, "symhmm-chain"))
    futures = [pool.submit(task) for task in tasks[1:]]
    tasks[0]()
    for future in futures:
        future.result()


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Nearly equal ranges.

    >>> cut(7, 2)
    [(0, 4), (4, 7)]
    """
    edges = [-(-count * p // parts) for p in range(parts + 1)]
    return list(pairwise(edges))
