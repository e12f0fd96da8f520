"""Fits in folders: numbers in safetensors, everything else in JSON. Nothing in a folder is ever run."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from symhmm.compiler.layout import Entry, Layout
from symhmm.errors import DataError
from symhmm.infer.draws import Draws
from symhmm.tables.arrow import Arrow, Law
from symhmm.tables.bent import Bends, Bent
from symhmm.tables.results import Estimate, Normal, Optima, Posterior, Status
from symhmm.tables.reweighted import Reweighted

KIND, VERSION = "symhmm fit", 1
TEXT, NUMBERS = "fit.json", "fit.safetensors"
# The only things that a file can name: plain containers.
CLASSES: dict[str, type] = {
    c.__name__: c for c in (Estimate, Status, Optima, Posterior, Normal, Arrow, Law, Bends, Bent, Reweighted, Draws)
}


@dataclass(frozen=True)
class Saved:
    """What a folder holds.

    Args:
        folder: where it is.
        content: of ``fit.json``.
        tensors: of ``fit.safetensors``, by number.
    """

    folder: Path
    content: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @property
    def extras(self) -> dict[str, Any]:
        """What a model keeps beside its estimate."""
        return cast(dict[str, Any], self._decoded(self.content["extras"], None))

    def estimate(self, layout: Layout) -> Estimate:
        """The estimate, for a density whose free values are those that were fitted.

        Raises:
            DataError: the free values differ: another program, or data of other individuals.
        """
        seen = {e.name: list(e.shape) for e in layout.entries}
        wanted = self.content["values"]
        if seen != wanted:
            other = sorted(n for n in {*seen, *wanted} if seen.get(n) != wanted.get(n))
            raise DataError(
                f"the fit in {str(self.folder)!r} belongs to another program, or to data of other sizes.",
                details=[f"{n}: saved {wanted.get(n, 'not')}, here {seen.get(n, 'not')}" for n in other[:6]],
                suggestion="the program and data that were fitted; fit.on(other data) comes after loading",
            )
        return cast(Estimate, self._decoded(self.content["estimate"], layout))

    def check(self, value: float) -> None:
        """Raise `DataError` if the log-density at the saved values is not what it was when they were saved."""
        old = float(self._decoded(self.content["log_density"], None))
        if not (old == value or (math.isnan(old) and math.isnan(value)) or abs(old - value) <= 1e-6 * (1 + abs(old))):
            raise DataError(
                f"the fit in {str(self.folder)!r} was made of other data, or by another program.",
                details=[f"log-density at its values: {old:.10g} nats when saved, {value:.10g} here"],
                suggestion="the program and data that were fitted; fit.on(other data) comes after loading",
            )

    def _decoded(self, x: Any, layout: Layout | None) -> Any:
        if isinstance(x, list):
            return [self._decoded(v, layout) for v in x]
        if not isinstance(x, dict):
            return x
        if "$tensor" in x:
            return self.tensors[x["$tensor"]]
        if "$number" in x:
            return float(x["$number"])
        if "$tuple" in x:
            return tuple(self._decoded(v, layout) for v in x["$tuple"])
        if "$entries" in x:
            assert layout is not None
            return tuple(layout[n] for n in x["$entries"])
        if "$class" in x:
            return CLASSES[x["$class"]](**{n: self._decoded(v, layout) for n, v in x["fields"].items()})
        return {n: self._decoded(v, layout) for n, v in x["$dict"].items()}


def write(
    folder: str | Path, estimate: Estimate, layout: Layout, log_density: float, extras: Mapping[str, Any]
) -> None:
    """Write a fit into a folder, which is made if need be; an older fit there is replaced.

    Args:
        estimate: what is saved.
        layout: of its free values.
        log_density: at its values, nats, by which the program and data are recognised when it is loaded.
        extras: what a model keeps beside it: numbers, text, tensors, and containers of these.

    Raises:
        DataError: the folder is a file, or something in the fit can not be saved without running code when it is loaded.
    """
    import safetensors.torch

    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{str(folder)!r} is a file.", suggestion="the name of a folder")
    tensors: dict[str, Tensor] = {}
    content = {
        "kind": KIND,
        "version": VERSION,
        "values": {e.name: list(e.shape) for e in layout.entries},
        "log_density": _encoded(log_density, tensors, "log_density"),
        "estimate": _encoded(estimate, tensors, "estimate"),
        "extras": _encoded(dict(extras), tensors, "extras"),
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / NUMBERS)
    content["numbers"] = hashlib.sha256((folder / NUMBERS).read_bytes()).hexdigest()
    content["checksum"] = _checksum(content)
    (folder / TEXT).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def read(folder: str | Path) -> Saved:
    """What a folder holds, checked.

    Raises:
        DataError: it is no fit of symhmm, a newer format, incomplete, or changed since it was written.
    """
    import safetensors
    import safetensors.torch

    folder = Path(folder)
    for name in (TEXT, NUMBERS):
        if not (folder / name).is_file():
            raise DataError(
                f"there is no saved fit in {str(folder)!r}.",
                details=[f"missing: {name}"],
                suggestion="the folder that fit.save was given",
            )
    try:
        content = json.loads((folder / TEXT).read_text())
    except ValueError as error:
        raise _refused(folder, f"{TEXT} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise _refused(folder, f"{TEXT} was not written by symhmm")
    if content.get("version") != VERSION:
        raise DataError(
            f"the fit in {str(folder)!r} has format {content.get('version')!r}, and this version reads {VERSION}.",
            suggestion="the version of symhmm that wrote it",
        )
    if content.get("checksum") != _checksum(content):
        raise _refused(folder, f"{TEXT} has been changed since it was written")
    if content.get("numbers") != hashlib.sha256((folder / NUMBERS).read_bytes()).hexdigest():
        raise _refused(folder, f"{NUMBERS} has been changed since it was written, or belongs to another fit")
    try:
        tensors = safetensors.torch.load_file(folder / NUMBERS)
    except safetensors.SafetensorError as error:
        raise _refused(folder, f"{NUMBERS} cannot be read: {error}") from None
    return Saved(folder, content, tensors)


def _refused(folder: Path, why: str) -> DataError:
    return DataError(
        f"the fit in {str(folder)!r} is refused.", details=[why], suggestion="fit again, or a copy that is whole"
    )


def _checksum(content: Mapping[str, Any]) -> str:
    rest = {n: x for n, x in content.items() if n != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _encoded(x: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if x is None or isinstance(x, (str, bool, int)):
        return x
    if isinstance(x, float):
        return x if math.isfinite(x) else {"$number": repr(x)}
    if isinstance(x, Tensor):
        tensors[where] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"$tensor": where}
    if isinstance(x, tuple) and x and all(isinstance(v, Entry) for v in x):
        return {"$entries": [e.name for e in x]}
    if isinstance(x, Mapping):
        if not all(isinstance(n, str) for n in x):
            raise DataError(f"cannot save {where}: its keys are not text.")
        return {"$dict": {n: _encoded(v, tensors, f"{where}.{n}") for n, v in x.items()}}
    if isinstance(x, Sequence):
        parts = [_encoded(v, tensors, f"{where}.{i}") for i, v in enumerate(x)]
        return {"$tuple": parts} if isinstance(x, tuple) else parts
    if CLASSES.get(type(x).__name__) is type(x) and is_dataclass(x):
        found = {f.name: _encoded(getattr(x, f.name), tensors, f"{where}.{f.name}") for f in fields(x)}
        return {"$class": type(x).__name__, "fields": found}
    raise DataError(
        f"cannot save {where}: {type(x).__name__} would need code to be loaded.",
        suggestion="numbers, text, tensors, and containers of these",
    )
