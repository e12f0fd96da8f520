"""Memory of one gradient is there for the next."""

import ctypes
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from symhmm.memory import empty_strided, keep_freed_memory

# Two tensors of 24 MB freed together are more than glibc keeps by itself.
FAULTS = """
import resource, torch
from symhmm.memory import keep_freed_memory
print(keep_freed_memory())
def work():
    a, b = torch.zeros(6_000_000), torch.zeros(6_000_000)
    a += 1
    b += a
for _ in range(3): work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def pages(**environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` answers in a new process, and how many pages five rounds of work were given."""
    clean = {k: v for k, v in os.environ.items() if "MALLOC" not in k and k != "GLIBC_TUNABLES"}
    command = [sys.executable, "-c", FAULTS]
    found = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True).stdout.split()
    return found[0], int(found[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the switch is one of glibc")
def test_freed_memory_is_used_again_unless_the_user_has_chosen() -> None:
    kept, few = pages()
    chosen, many = pages(MALLOC_TRIM_THRESHOLD_="131072")
    assert (kept, chosen) == ("True", "False")
    assert 4 * few < many  # the heap may still grow by a tensor once; each round clearing both anew is what must not be


def test_it_is_asked_for_once() -> None:
    assert keep_freed_memory() is keep_freed_memory()
    assert keep_freed_memory.cache_info().currsize == 1


RECORDED = """
import torch
from symhmm.chains.operator import chain_message
from symhmm.compiler.step import trace
from symhmm.memory import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
def step(emission):
    x = emission.detach().requires_grad_()
    value = chain_message(torch.zeros(1, 3, 3).log_softmax(-1), x).sum()
    return value.detach(), *torch.autograd.grad(value, [x])
def replayed(emission):
    captured = trace(step, [emission], [], gradients=True)
    with torch.inference_mode():
        captured.body(emission, *captured.constants([]))
replayed(torch.zeros(16, 1000, 3))
emission = torch.zeros(2000, 1000, 3)
before = peak()
replayed(emission)
print((peak() - before) / emission.nbytes)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_a_recorded_gradient_takes_at_most_three_times_the_emission_terms() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", RECORDED], capture_output=True, text=True, check=True)
    assert 1.5 < float(done.stdout) < 3  # messages and their scales, and the gradient: 2.3


# Small tensors that stay, as those that a program makes beside its large ones do.
HOLES = """
import ctypes, torch
from symhmm.memory import empty_strided, keep_freed_memory
keep_freed_memory()
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena b c d mapped f g used free j".split()]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Info
kept = []
def heap():
    return libc.mallinfo2().arena
def work():
    a, b = (empty_strided((1000, 4000), (1, 1000), torch.float32) for _ in range(2))
    kept.append([torch.empty(n) for n in (3, 8, 12, 16, 20, 24)])
work()
before = heap()
for _ in range(10):
    work()
print((heap() - before) / 16e6)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the heap is measured by a call of glibc")
def test_large_tensors_fit_where_others_of_their_size_were() -> None:
    done = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.5  # tensors of 16 MB; those of torch.empty_strided took 18 more


@pytest.mark.parametrize("size", [(), (0, 5), (3, 4), (300, 400), (1, 100_000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_memory_of_any_size_and_order(size: tuple[int, ...], dtype: torch.dtype) -> None:
    like = torch.empty(size, dtype=dtype).permute(tuple(range(len(size)))[::-1])
    found = empty_strided(like.size(), like.stride(), dtype)
    assert (found.size(), found.stride(), found.dtype) == (like.size(), like.stride(), dtype)
    assert found.data_ptr() % 64 == 0
    found.fill_(1)
    assert found.sum() == like.numel()
