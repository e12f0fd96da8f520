"""Threads that share work: all of it is done once, errors and interrupts come out once, and nothing outlives a fork."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import threads
from symhmm.chains.operator import chain_message
from symhmm.chains.threads import cut, run, thread_count

needs_runtime = pytest.mark.skipif(
    sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="torch has no OpenMP that can be called"
)


@pytest.fixture(autouse=True)
def _two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[pytest.param("torch", marks=needs_runtime), "pool"])
def kind(request, monkeypatch):
    """Whose threads are used; for torch's, they are not left alone when the machine is busy."""
    runtime = None
    if request.param == "torch":
        runtime = threads._Runtime(threads._runtime().parallel)
        monkeypatch.setattr(threads, "LATE", 60.0)
    monkeypatch.setattr(threads, "_runtime", lambda: runtime)
    return request.param


def together():
    """Tasks of which each waits for the other, and the threads that they ran in."""
    meeting, where = threading.Barrier(2), []

    def task():
        meeting.wait(timeout=30)
        where.append(threading.get_ident())

    return [task, task], where


def test_two_tasks_run_at_the_same_time_in_two_threads(kind):
    tasks, where = together()
    run(tasks)
    assert len(set(where)) == 2
    assert threading.get_ident() in where


@pytest.mark.parametrize("count", [0, 1, 2, 3, 50])
def test_every_task_runs_once(kind, count):
    done = []
    for _ in range(20):
        done.clear()
        run([lambda i=i: done.append(i) for i in range(count)])
        assert sorted(done) == list(range(count))


def test_one_thread_where_torch_has_one_and_two_again_when_it_has_two(kind):
    for _ in range(2):
        torch.set_num_threads(1)
        alone = Counter()
        run([lambda alone=alone: alone.update([threading.get_ident()])] * 4)
        assert alone == {threading.get_ident(): 4}
        torch.set_num_threads(2)
        tasks, where = together()
        run(tasks)
        assert len(set(where)) == 2


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("first", [True, False])
def test_the_first_error_is_raised_and_what_has_not_begun_is_left(kind, error, first, monkeypatch):
    lost, done, begun, here = [], [], threading.Event(), threading.get_ident()
    monkeypatch.setattr(sys, "unraisablehook", lost.append)

    def bad():
        # Raise it in this thread or in the other one.
        if (threading.get_ident() == here) is first:
            begun.set()
            raise error
        assert begun.wait(30)
        done.append("came")

    with pytest.raises(type(error)) as caught:
        run([bad, bad, *[lambda: done.append("later")] * 1000])
    assert caught.value is error
    assert lost == []
    assert len(done) < 1001  # the other thread may take some before it sees
    run([lambda: done.append("next")] * 2)
    assert done[-2:] == ["next", "next"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs a timer that sends signals")
def test_no_interrupt_is_lost(kind, monkeypatch):
    """Wherever in the work a signal comes, KeyboardInterrupt is raised, once, and nobody works on."""
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)  # what C swallows, and we raise again
    before, chance = signal.signal(signal.SIGALRM, signal.default_int_handler), random.Random(0)
    gc.disable()  # Python itself swallows an interrupt in a callback of its collector, of which hypothesis has one
    try:
        for _ in range(150):
            busy, end = Counter(), time.monotonic() + 20

            def task(busy=busy):
                busy["now"] += 1
                sum(range(200))
                busy["now"] -= 1

            with pytest.raises(KeyboardInterrupt):
                signal.setitimer(signal.ITIMER_REAL, chance.uniform(1e-4, 2e-3))
                while time.monotonic() < end:
                    run([task] * 4)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        gc.enable()


def test_a_task_may_have_tasks_of_its_own(kind):
    done = []

    def outer():
        run([lambda: done.append(1)] * 3)
        done.append(10)

    run([outer] * 3)
    assert sum(done) == 39


def test_several_callers_at_once_each_get_their_own_work_done(kind):
    results = {}

    def caller(name):
        for i in range(30):
            mine = []
            run([lambda i=i, mine=mine: mine.append((name, i))] * 5)
            results[name, i] = mine == [(name, i)] * 5

    callers = [threading.Thread(target=caller, args=(name,)) for name in range(4)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    assert len(results) == 120
    assert all(results.values())


def test_work_is_not_left_waiting_for_a_thread_that_does_not_come(monkeypatch):
    monkeypatch.setattr(threads, "_runtime", lambda: None)
    done, release = [], threading.Event()
    hold = threading.Thread(target=run, args=([release.wait, release.wait],))
    hold.start()  # takes the only other thread
    try:
        run([lambda: done.append(1), lambda: done.append(2)])
        assert sorted(done) == [1, 2]
    finally:
        release.set()
        hold.join()


def test_threads_that_come_late_are_left_alone_for_a_while(monkeypatch):
    calls = []

    def late(enter, work, threads, flags):
        calls.append(time.perf_counter())
        work()
        time.sleep(0.01)

    runtime = threads._Runtime(late)
    monkeypatch.setattr(threads, "_runtime", lambda: runtime)
    done = []
    for _ in range(3):
        run([lambda: done.append(1)] * 2)
    assert len(calls) == 1
    first, pause = runtime.resume - calls[0], runtime.pause
    assert first > 0.05
    runtime.resume = 0.0
    run([lambda: done.append(1)] * 2)
    assert len(calls) == 2
    assert runtime.resume - calls[1] > pause > 0.05  # longer each time, and shorter again once they come
    runtime.parallel = lambda enter, work, threads, flags: work()
    runtime.resume, pause = 0.0, runtime.pause
    run([lambda: done.append(1)] * 2)
    assert runtime.pause < pause
    assert len(done) == 10


def test_many_threads_are_not_called_for_few_tasks(monkeypatch):
    calls = []
    runtime = threads._Runtime(lambda enter, work, threads, flags: calls.append(work()))
    monkeypatch.setattr(threads, "_runtime", lambda: runtime)
    done = []
    for count in (2, 1000):
        torch.set_num_threads(count)
        run([lambda: done.append(1)] * 2)
        assert len(calls) == 1
    assert len(done) == 4


FOUND = """
import re, sys, torch
def mapped():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if re.search(r"lib(gomp|iomp|omp)", line)}
before = mapped()
import symhmm
assert "symhmm.chains.threads" not in sys.modules, "looked for before it is needed"
from symhmm.chains import threads
torch.set_num_threads(2)
done = []
threads.run([lambda: done.append(1)] * 8)
assert len(done) == 8
assert threads._runtime() is not None
assert mapped() == before, "another runtime was loaded"
"""


@needs_runtime
def test_the_runtime_is_the_one_that_torch_has_loaded_and_is_found_at_first_use():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FOUND], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


CHILDREN = """
import multiprocessing, sys
import torch
from symhmm.chains import threads

def work(_=None):
    done = []
    threads.run([lambda: done.append(1)] * 8)
    return len(done)

if __name__ == "__main__":
    torch.set_num_threads(2)
    torch.ones(1_000_000).sum()  # torch's threads are there
    assert work() == 8
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(work, range(4), chunksize=1) == [8] * 4
    assert work() == 8
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_child_processes_have_threads_of_their_own(method, tmp_path):
    if method == "fork" and not hasattr(os, "fork"):
        pytest.skip("this system has no fork")
    file = tmp_path / "children.py"
    file.write_text(CHILDREN)
    command = [sys.executable, "-W", "ignore", str(file), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_gradients_in_other_threads_are_those_of_this_one(kind):
    emission = torch.randn(64, 2000, 3, generator=torch.Generator().manual_seed(0))
    matrix = torch.zeros(3, 3).log_softmax(-1)

    def gradient():
        x = emission.clone().requires_grad_()
        chain_message(matrix[None], x).logsumexp(-1).sum().backward()
        return x.grad

    found = []
    callers = [threading.Thread(target=lambda: found.append(gradient())) for _ in range(3)]
    for thread in callers:
        thread.start()
    for thread in callers:
        thread.join(60)
    torch.set_num_threads(1)
    assert_close(found, [gradient()] * 3, rtol=0, atol=0)


def test_small_work_stays_in_one_thread():
    assert thread_count(1e-6, 100) == 1
    assert thread_count(1.0, 100) == 2
    assert thread_count(1.0, 1) == 1
    torch.set_num_threads(1)
    assert thread_count(1.0, 100) == 1


def test_cut_leaves_nothing_out():
    assert cut(7, 3) == [(0, 3), (3, 5), (5, 7)]
    assert cut(2, 2) == [(0, 1), (1, 2)]
