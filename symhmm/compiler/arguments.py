"""Program arguments: tensors become inputs of the compiled step, everything else is static and part of the cache key."""

import copy
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Hole:
    """Stands for the k-th tensor in an argument structure."""

    position: int


@dataclass(frozen=True)
class Arguments:
    """Arguments of a program, taken apart.

    ``template`` is ``(args, kwargs)`` with a `Hole` for each tensor; ``signature`` is equal for two calls of which one can
    reuse the compiled step of the other: same structure, shapes, dtypes, devices and static values.
    """

    template: Any
    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    signature: Hashable

    def rebuild(self, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other tensors in the holes."""
        return _fill(self.template, tensors)


def take_apart(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Split arguments into tensors and structure: lists, tuples, dicts, dataclasses and namespaces are looked into.

    >>> import torch
    >>> take_apart((torch.zeros(3), 5), {}).names
    ('args[0]',)
    """
    found: list[tuple[str, Tensor]] = []
    signature: list[Hashable] = []

    def visit(x: Any, path: str) -> Any:
        if isinstance(x, Tensor):
            # Repeated memory means "the same for all members" to capture, which the next data of this shape may not be.
            found.append((path, x.contiguous() if 0 in x.stride() else x))
            signature.append((path, "tensor", tuple(x.shape), x.dtype, x.device))
            return Hole(len(found) - 1)
        parts = _parts(x)
        if parts is None:
            signature.append((path, _static_key(x)))
            return x
        signature.append((path, type(x), len(parts)))
        return _with_parts(x, {k: visit(v, f"{path}[{k!r}]" if isinstance(x, dict) else f"{path}.{k}"
                                           if not isinstance(k, int) else f"{path}[{k}]") for k, v in parts.items()})  # fmt: skip

    template = ([visit(x, f"args[{i}]") for i, x in enumerate(args)], {k: visit(v, k) for k, v in kwargs.items()})
    return Arguments(template, tuple(x for _, x in found), tuple(n for n, _ in found), tuple(signature))


def _fill(template: Any, tensors: tuple[Tensor, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    def visit(x: Any) -> Any:
        if isinstance(x, Hole):
            return tensors[x.position]
        parts = _parts(x)
        return x if parts is None else _with_parts(x, {k: visit(v) for k, v in parts.items()})

    args, kwargs = template
    return tuple(visit(x) for x in args), {k: visit(v) for k, v in kwargs.items()}


def _parts(x: Any) -> dict[Any, Any] | None:
    """Children of a container by key, or None for a leaf."""
    if isinstance(x, dict):
        return dict(x)
    if isinstance(x, (tuple, list)):
        return dict(enumerate(x))
    if is_dataclass(x) and not isinstance(x, (type, Hole)):
        return {f.name: getattr(x, f.name) for f in fields(x)}
    return dict(vars(x)) if isinstance(x, SimpleNamespace) else None


def _with_parts(x: Any, parts: dict[Any, Any]) -> Any:
    if isinstance(x, (dict, tuple, list)):
        if isinstance(x, tuple) and hasattr(x, "_fields"):
            return type(x)(*parts.values())
        if type(x) in (dict, tuple, list):
            return parts if isinstance(x, dict) else type(x)(parts.values())
    # Anything else (frozen dataclasses, namespaces, subclasses of dict) keeps what it carries besides its parts.
    new = copy.copy(x)
    for k, v in parts.items():
        if isinstance(x, dict):
            new[k] = v
        else:
            object.__setattr__(new, k, v)
    return new


class _ById:
    """Cache key of an unhashable or stateful object: the object itself, kept alive so that its id is not used again."""

    def __init__(self, x: Any) -> None:
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and self.x is other.x

    def __hash__(self) -> int:
        return id(self.x)


def _static_key(x: Any) -> Hashable:
    if isinstance(x, nn.Module) or not isinstance(x, Hashable):
        return _ById(x)
    return (type(x), x)
