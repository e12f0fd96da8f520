"""Memory that one gradient has freed is kept for the next."""

import ctypes
import os
from functools import cache

KEPT = 2**30  # bytes: larger tensors, and free memory beyond this, go back to the system at once

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
