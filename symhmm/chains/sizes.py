"""Lane kernels for one small number of states: their inner loops have lengths that the compiler knows and unrolls."""

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

from symhmm.chains import best_lanes, lane_steps, lanes_backward, lanes_forward, passes, whole_pass
from symhmm.chains.jit import kernel

LARGEST = 6  # states; beyond, vectors of work outweigh the loops around them
ENOUGH = 900  # steps in all chains; fewer are not worth the seconds of compilation


def lane_kernel(name: str, size: int, rest: int, steps: int) -> Callable[..., Any]:
    """``forward_pass``, ``backward_pass`` or ``best_lanes`` for chains of ``size`` states with ``steps`` steps in all."""
    return _family(size if rest == 1 and size <= LARGEST and steps >= ENOUGH else 0)[name]


@cache
def _family(size: int) -> dict[str, Callable[..., Any]]:
    """Copies of all functions of the lane kernels in which the global ``SIZE`` is ``size``, a constant when compiled."""
    copies: dict[str, Any] = {}
    for module in (lane_steps, lanes_forward, lanes_backward, passes, whole_pass, best_lanes):
        scope = {**vars(module), **copies, "SIZE": size}
        for name, value in vars(module).items():
            original = getattr(value, "py_func", None)
            if original is None or original.__module__ != module.__name__:
                continue
            function = FunctionType(original.__code__, scope, name)
            # The machine code is kept on disk under this name.
            function.__qualname__, function.__module__ = f"{name}_{size}", module.__name__
            copies[name] = scope[name] = kernel(function, inside=bool(value.targetoptions.get("forceinline")))
    return copies
