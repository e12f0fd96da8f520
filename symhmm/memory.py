"""Memory that one gradient has freed is kept for the next."""

import ctypes
import os
from collections.abc import Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

LARGE = 2**18  # bytes: smaller tensors are torch's own affair
ALIGNED = 64  # bytes: a cache line
KEPT = (
    2**31 - 1
)  # bytes, the most that can be said: larger tensors, and free memory beyond this, go back to the system at once

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # names of mallopt(3)
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Ask the C library of this process, once, not to hand freed memory back to the system between gradients.

    A gradient frees what it has made, and the next one needs as much again. By default glibc gives tensors of some tens
    of megabytes back to the system, which clears each page anew at its first use: for 1000 steps of 64 chains with 64
    states that is two fifths of the time. Where the user has chosen thresholds of their own (``MALLOC_TRIM_THRESHOLD_``,
    ``MALLOC_MMAP_THRESHOLD_`` or ``GLIBC_TUNABLES`` in the environment), and where the C library has no such switch,
    nothing is changed.

    Returns:
        whether memory is now kept.
    """
    if any(name in os.environ for name in _CHOSEN) or os.name != "posix":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(name, KEPT) == 1 for name in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))


def release_freed_memory() -> None:
    """Hand what lies free back to the system, once: after work whose tensors leave other holes than the work to come needs."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def empty_strided(size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`torch.empty_strided` on the CPU, whose memory fits the next one of its size when it is freed.

    Torch asks for aligned memory. Up to glibc 2.37 that takes a hole of some 100 bytes more than the tensor, the rest of which
    is left beside it, where small tensors settle: the hole is then too short for the next gradient, which takes memory
    from the system instead, as much again each time. Here the alignment is part of what is asked for.

    >>> empty_strided((2, 3), (3, 1), torch.float32).shape
    torch.Size([2, 3])
    """
    count = _extent(tuple(size), tuple(stride)) * dtype.itemsize
    if count < LARGE:
        return torch.empty_strided(size, stride, dtype=dtype)
    memory = np.empty(count + ALIGNED, np.uint8)
    first = -memory.ctypes.data % ALIGNED
    return torch.from_numpy(memory[first : first + count]).view(dtype).as_strided(size, stride)


@lru_cache(maxsize=256)
def _extent(size: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Numbers from the first to the last of a tensor."""
    return 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if 0 not in size else 0
