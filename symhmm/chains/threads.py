"""A few threads for kernels that release the interpreter lock: those that torch itself keeps, where it has them."""

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from itertools import pairwise
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread, get_ident
from time import perf_counter
from typing import Any

import torch

Task = Callable[[], None]

SMALL = 150e-6  # seconds of work below which a second thread costs more than it saves

MANY = 4  # threads of torch for each task beyond which most would come for nothing
LATE = 1e-3  # seconds beyond its share of the work after which a thread counts as held up by another program
PAUSES = 0.05, 1.0  # seconds for which it is not waited for again: at first, and at most

_PROCESS = os.getpid()


def thread_count(seconds: float, parts: int) -> int:
    """How many threads to use for work of about ``seconds`` that splits into ``parts``; at most as many as torch uses.

    Work is cut into one part for each: every part is a call, which takes the interpreter lock.
    """
    return max(1, min(torch.get_num_threads(), parts, int(seconds / SMALL)))


def run(tasks: list[Task]) -> None:
    """Run tasks, this thread and as many others as torch uses taking one after the other; the first error is raised.

    The others are the threads of torch's own OpenMP runtime, which wait for work at full speed for a while after each
    operation: a pool of our own would fight with them for the cores, and be woken late. Where torch has no such runtime,
    and in a forked child, which its threads do not survive, a pool in Python takes their place. So it does where there are
    many more of them than tasks, and for a while where another program needs the cores: the runtime waits for each of its
    threads, the pool only for those that came.
    """
    threads = min(len(tasks), torch.get_num_threads())
    if threads <= 1:
        for task in tasks:
            task()
        return
    work = _Work(tasks)
    runtime = _runtime() if os.getpid() == _PROCESS else None
    if runtime is None or not runtime.ready(threads):
        _pool(os.getpid()).run(work, threads)
    else:
        runtime.run(work)
    work.check()


def cut(count: int, parts: int) -> list[tuple[int, int]]:
    """Nearly equal ranges.

    >>> cut(7, 2)
    [(0, 4), (4, 7)]
    """
    edges = [-(-count * p // parts) for p in range(parts + 1)]
    return list(pairwise(edges))


class _Work:
    """Tasks that threads take one after the other, until none is left or one has raised an error."""

    def __init__(self, tasks: list[Task]) -> None:
        self.todo = deque(tasks)
        self.seconds: dict[int, float] = {}  # how long each thread took
        self.errors: list[BaseException] = []

    def __call__(self) -> None:
        """What each thread does. Errors are kept: C, who calls this, would have them printed and forgotten."""
        try:
            start = perf_counter()
            while self.todo:
                try:
                    task = self.todo.popleft()
                except IndexError:  # another thread took the last one
                    break
                task()
            here, taken = get_ident(), perf_counter() - start
            self.seconds[here] = taken  # the last thing: an interrupt either comes before it, or after C has returned
        except BaseException as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        """Leave the rest, and raise the error in the end."""
        self.errors.append(error)
        self.todo.clear()

    def check(self) -> None:
        """Raise the first error."""
        if self.errors:
            raise self.errors[0]
        if get_ident() not in self.seconds:  # interrupted where nothing could keep it
            raise KeyboardInterrupt


class _Runtime:
    """The threads of torch's OpenMP runtime."""

    def __init__(self, parallel: Any) -> None:
        self.parallel = parallel
        self.resume, self.pause = 0.0, PAUSES[0]

    def ready(self, threads: int) -> bool:
        """Whether to use it for so many tasks: each of its threads takes the interpreter lock, if only to find none left."""
        return torch.get_num_threads() <= MANY * threads and perf_counter() >= self.resume

    def run(self, work: _Work) -> None:
        """Do work in all threads that torch uses; if this one lost much time on the others, leave them alone for a while."""
        start = perf_counter()
        # Always as many threads as torch asks for: the runtime ends and starts threads where the number changes.
        self.parallel(_ENTER, work, 0, 0)
        end, longest = perf_counter(), max(work.seconds.values(), default=0.0)
        if end - start > 2 * longest + LATE:
            self.resume, self.pause = end + self.pause, min(2 * self.pause, PAUSES[1])
        else:
            self.pause = max(self.pause / 2, PAUSES[0])


_ENTER = ctypes.CFUNCTYPE(None, ctypes.py_object)(_Work.__call__)


@cache
def _runtime() -> _Runtime | None:
    """The runtime that torch has loaded; None where it has none that can be called."""
    if sys.platform != "linux" or not torch.backends.openmp.is_available():
        return None
    # GOMP_parallel(function, argument, threads, flags), found as the loader found it for torch: first in what all libraries
    # share, then in what torch's library has asked for. Nothing is loaded here.
    try:
        shared = ctypes.CDLL(None)
        own = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"), os.RTLD_NOLOAD | os.RTLD_LAZY)
    except OSError:
        return None
    found = getattr(shared, "GOMP_parallel", None) or getattr(own, "GOMP_parallel", None)
    if found is None:
        return None
    found.argtypes, found.restype = [type(_ENTER), ctypes.py_object, ctypes.c_uint, ctypes.c_uint], None
    return _Runtime(found)


class _Pool:
    """Threads of our own. Locks and queues are those written in C: others can be left locked by an interrupt."""

    def __init__(self) -> None:
        self.calls: SimpleQueue[_Visit] = SimpleQueue()
        self.threads = 0

    def run(self, work: _Work, threads: int) -> None:
        """Do work in this thread and others; one that never came to run is not waited for."""
        while self.threads < threads - 1:
            self.threads += 1
            Thread(target=self._serve, name="symhmm-chain", daemon=True).start()
        visit = _Visit(work)
        try:
            for _ in range(threads - 1):
                self.calls.put(visit)
            work()
        finally:
            visit.close()

    def _serve(self) -> None:
        while True:
            self.calls.get()()


class _Visit:
    """Threads that come to help with some work as long as it is open, and are waited for if they have begun."""

    def __init__(self, work: _Work) -> None:
        self.work, self.lock, self.closed = work, Lock(), False
        self.began = self.ended = 0
        self.left: SimpleQueue[None] = SimpleQueue()

    def __call__(self) -> None:
        """What each helper does."""
        with self.lock:
            if self.closed:
                return
            self.began += 1
        self.work()
        with self.lock:
            self.ended += 1
        self.left.put(None)

    def close(self) -> None:
        """Let nobody in any more, and wait until all have left, whatever happens: they write into memory that must stay."""
        while not self.closed or self.ended < self.began:
            try:
                with self.lock:
                    self.closed = True
                while self.ended < self.began:
                    with suppress(Empty):
                        self.left.get(timeout=0.1)
            except BaseException as error:  # an interrupt
                self.work.fail(error)


@cache
def _pool(process: int) -> _Pool:
    """The pool of a process: threads do not survive a fork, a child starts with none and makes its own."""
    return _Pool()
