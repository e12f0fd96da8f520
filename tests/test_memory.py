"""Memory of one gradient is there for the next."""

import os
import platform
import subprocess
import sys

import pytest

from symhmm.memory import keep_freed_memory

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
