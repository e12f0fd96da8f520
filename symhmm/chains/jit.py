"""How chain kernels are compiled: at their first call, without the interpreter lock, and kept on disk."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba import njit

# numba recompiles a function when its own file changes, not when a function changes that was inlined into it.
_FILES = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
_SOURCES = sha256(
    b"".join(text for text in _FILES if b"chains.jit import" in text or b"import intrinsic" in text)
).hexdigest()


def kernel(function: Callable[..., Any], *, inside: bool = False) -> Callable[..., Any]:
    """Compile a function on its first call; the machine code is reused until any file of kernels changes.

    With ``inside`` it becomes part of the functions that call it, and makes no arrays: its caller holds those it is given,
    and it counts no references to them, which is an atomic operation for each array of each call.
    """
    options = {"nogil": True, "forceinline": inside, "_nrt": not inside}
    try:
        dispatcher = njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder that it may write to
        return njit(**options)(function)
    dispatcher._cache._cache_file._source_stamp = _SOURCES
    return dispatcher


def inner(function: Callable[..., Any]) -> Callable[..., Any]:
    """A `kernel` that other kernels call at every step."""
    return kernel(function, inside=True)
