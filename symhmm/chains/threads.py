"""A few threads for kernels that release the interpreter lock."""

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch

_POOLS: dict[int, ThreadPoolExecutor] = {}
# Threads do not survive a fork: a child starts with none, and makes its own.
os.register_at_fork(after_in_child=_POOLS.clear)

SMALL = 250e-6  # seconds of work below which a second thread costs more than it saves: waking it takes a tenth of a millisecond


def thread_count(seconds: float, parts: int) -> int:
    """How many threads to use for work of about ``seconds`` that splits into ``parts``; at most as many as torch uses."""
    return max(1, min(torch.get_num_threads(), parts, int(seconds / SMALL)))


def part_count(seconds: float, parts: int) -> int:
    """Into how many parts to cut the work: more than there are threads, so that one that is held up leaves its share."""
    threads = thread_count(seconds, parts)
    return threads if threads == 1 else min(parts, 2 * threads)


def run(tasks: list[Callable[[], None]]) -> None:
    """Run tasks, this thread and as many others as torch uses taking one after the other; the first error is raised.

    A thread that never came to run is not waited for: on a busy machine this one does all the work.
    """
    threads = min(len(tasks), torch.get_num_threads())
    todo = deque(tasks)

    def work() -> None:
        while todo:
            try:
                task = todo.popleft()
            except IndexError:  # another thread took the last one
                return
            task()

    if threads == 1:
        work()
        return
    pool = _POOLS.setdefault(threads, ThreadPoolExecutor(threads - 1, "symhmm-chain"))
    futures = [pool.submit(work) for _ in range(threads - 1)]
    work()
    for future in futures:
        if not future.cancel():
            future.result()


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Nearly equal ranges.

    >>> cut(7, 2)
    [(0, 4), (4, 7)]
    """
    edges = [-(-count * p // parts) for p in range(parts + 1)]
    return list(pairwise(edges))
