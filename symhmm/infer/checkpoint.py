"""Checkpoints: the state of a driver as plain arrays in one ``.npz`` file, without pickle."""

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symhmm.errors import FitError
from symhmm.infer.lbfgs import Ascent
from symhmm.infer.target import Array, Target

EVERY = 10.0  # seconds between two writes


def fingerprint(goal: Target, method: str, options: Mapping[str, Any]) -> str:
    """What must agree for a checkpoint to be continued: names, sizes, options and the density at the start."""
    entries = [(e.name, e.start, e.stop) for e in goal.entries]
    value, gradient = goal.evaluate(goal.x)
    said = json.dumps([method, entries, {k: repr(v) for k, v in sorted(options.items())}, repr(value)])
    return hashlib.sha256(said.encode() + gradient.tobytes()).hexdigest()


class Checkpoint:
    """One file, written whole or not at all; ``path=None`` keeps nothing."""

    def __init__(self, path: str | os.PathLike[str] | None, key: str) -> None:
        self.path = None if path is None else Path(path)
        self.key = key
        self.written = time.perf_counter()

    def read(self) -> dict[str, NDArray[Any]] | None:
        """The saved arrays, or None where there is no file yet.

        Raises:
            FitError: the file belongs to another fit.
        """
        if self.path is None or not self.path.exists():
            return None
        with np.load(self.path, allow_pickle=False) as saved:
            arrays = dict(saved)
        if str(arrays.pop("key")) != self.key:
            raise FitError(
                f"the checkpoint {str(self.path)!r} belongs to another fit.",
                details=["program, data, method, seed or options differ"],
                suggestion="the same call as the one that wrote it, or another file",
            )
        return arrays

    @property
    def due(self) -> bool:
        """Whether it is time to write again."""
        return self.path is not None and time.perf_counter() - self.written > EVERY

    def write(self, arrays: Mapping[str, Any]) -> None:
        """Replace the file."""
        if self.path is None:
            return
        temporary = self.path.with_name(self.path.name + ".part")
        with open(temporary, "wb") as file:
            np.savez(file, key=np.array(self.key), **arrays)
        os.replace(temporary, self.path)
        self.written = time.perf_counter()


def saved_ascents(starts: Sequence[Array], ascents: Sequence[Ascent], evaluations: int) -> dict[str, Any]:
    """The finished climbs of a driver with several starts, as arrays."""
    out: dict[str, Any] = {"starts": np.stack(starts), "evaluations": np.array(evaluations)}
    for i, a in enumerate(ascents):
        numbers = np.array([a.value, a.gain, float(a.converged)])
        out |= {f"{i}.x": a.x, f"{i}.gradient": a.gradient, f"{i}.numbers": numbers, f"{i}.trace": np.array(a.trace)}
    return out


def restored_ascents(arrays: Mapping[str, NDArray[Any]]) -> tuple[Ascent, ...]:
    """What `saved_ascents` wrote."""
    ascents: list[Ascent] = []
    while f"{len(ascents)}.x" in arrays:
        i = len(ascents)
        value, gain, converged = arrays[f"{i}.numbers"].tolist()
        trace = arrays[f"{i}.trace"].tolist()
        ascents.append(Ascent(arrays[f"{i}.x"], value, arrays[f"{i}.gradient"], gain, bool(converged), trace))
    return tuple(ascents)
