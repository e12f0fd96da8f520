"""Deferred: sites of steps that run one by one, whose log-factors are evaluated together afterwards.

A vectorised body is compared with every step run by itself. What a step is made of, the program's own code must say, step by
step; but the log-probability of a normal distribution at a thousand places is one call. Arguments are checked together, too.
"""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.constraints import is_dependent

from symhmm.capture.marks import set_mark
from symhmm.capture.names import Names
from symhmm.capture.observations import checked_at_once
from symhmm.capture.sites import SiteMessenger, log_factor
from symhmm.capture.time_index import Level, NotVectorisable
from symhmm.capture.verify import alike
from symhmm.graph import Role

# Their log-probability depends on nothing but their attributes and the value. Anybody else's is asked step by step.
_KNOWN = ("torch.distributions.", "pyro.distributions.", "symhmm.distributions.")
_MOST = 2**22  # numbers that are evaluated together


@dataclass(frozen=True)
class _Site:
    """What a log-factor will be made of: ``tensors`` in the order in which `_take_apart` finds them, unchanged since."""

    name: str
    fn: Any
    value: Tensor
    mask: Any
    role: Role
    shape: tuple[int, ...]
    tensors: list[Tensor]
    versions: list[int]

    def evaluated(self) -> Tensor:
        return log_factor(self.fn, self.value, self.mask, self.role)


class DeferringMessenger(SiteMessenger):
    """Records sites as `SiteMessenger` does, with log-factors that are there after `finish` only."""

    checks_arguments = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._groups: dict[Hashable, list[_Site]] = {}

    def _log_factor(self, msg: dict[str, Any], fn: Any, mask: Any, role: Role) -> Tensor:
        value = msg["value"]
        known = mask is not False and not isinstance(msg["scale"], Tensor) and isinstance(value, Tensor)
        if not known or (role == "observed" and not checked_at_once(fn.support)):
            return super()._log_factor(msg, fn, mask, role)
        with torch._C.DisableTorchFunction():
            tensors: list[Tensor] = []
            try:
                own = getattr(value, "_pyro_categorical_support", None) == id(fn)
                key = role, own, _take_apart((fn, value, mask), tensors)
            except _Foreign:
                tensors = []
            else:
                batches = [fn.batch_shape, value.shape[: value.dim() - fn.event_dim]]
                shape = tuple(broadcast_shape(*batches, *([mask.shape] if isinstance(mask, Tensor) else [])))
                versions = [x._version for x in tensors]
                site = _Site(msg["name"], fn, value, mask, role, shape, tensors, versions)
                self._groups.setdefault(key, []).append(site)
                later = torch.empty(shape, dtype=value.dtype, device="meta")
                set_mark(later, self.tracker.union(*tensors))
        return later if tensors else super()._log_factor(msg, fn, mask, role)

    def _check_values(self, name: str, fn: Any, value: Tensor, mask: Any) -> None:
        # The vectorised run has seen all values, and could check those of most supports.
        if not checked_at_once(fn.support):
            super()._check_values(name, fn, value, mask)

    def finish(self) -> None:
        """Evaluate what was put off.

        Raises:
            NotVectorisable: an argument is out of its range or was changed in place since, or together the numbers differ from
                those of a single step. The steps must be evaluated one by one.
        """
        for sites in self._groups.values():
            most = max(1, _MOST // max(prod(sites[0].shape), 1))
            for start in range(0, len(sites), most):
                for site, row in _together(sites[start : start + most], self.check_data):
                    record = self.result.records[site.name]
                    self.result.records[site.name] = replace(record, tensor=row.reshape(record.tensor.shape))


def _together(sites: list[_Site], check: bool) -> Iterator[tuple[_Site, Tensor]]:
    """Log-factors of sites that are made alike."""
    first = sites[0]
    if any(x._version != v for s in sites for x, v in zip(s.tensors, s.versions, strict=True)):
        raise NotVectorisable("an argument of a site was changed in place")
    columns = [_stacked(column) for column in zip(*(s.tensors for s in sites), strict=True)]
    if check:
        _check_arguments(_put_together(first.fn, iter(columns)))
    level = Level("", len(sites), 0, Names(), object())
    with level.active():
        fn, value, mask = _put_together((first.fn, first.value, first.mask), iter(map(level.batch, columns)))
        if hasattr(first.value, "_pyro_categorical_support"):
            value._pyro_categorical_support = id(fn)
        rows = level.unbatch(log_factor(fn, value, mask, first.role))
    if tuple(rows.shape[1:]) != first.shape:
        raise NotVectorisable(f"the log-probability of site {first.name!r} has a shape of its own")
    for k in {0, len(sites) // 2, len(sites) - 1}:
        if not alike(rows[k], sites[k].evaluated()):
            raise NotVectorisable(
                f"the log-probability of site {sites[k].name!r} differs when taken together with others"
            )
    return zip(sites, rows, strict=True)


def _stacked(column: tuple[Tensor, ...]) -> Tensor:
    """Tensors of one shape on a new first dimension; memory that each of them reads again and again is not copied."""
    shape, strides = column[0].shape, column[0].stride()
    for d in range(len(shape)):
        if strides[d] == 0 and shape[d] > 1:
            column = tuple(x.narrow(d, 0, 1) for x in column)
    return torch.stack(column).expand(len(column), *shape)


class _Foreign(Exception):
    """A part that is not known to be all that it shows."""


def _take_apart(x: Any, tensors: list[Tensor]) -> Hashable:
    """What is equal for two things that differ in the numbers of their tensors alone; the tensors go to ``tensors``."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return x.shape, x.dtype, tuple(step == 0 for step in x.stride())
    if type(x) in (bool, int, float, str, type(None)):
        return type(x), x
    if isinstance(x, torch.Size):
        return x
    if isinstance(x, (list, tuple)):
        return type(x), *(_take_apart(part, tensors) for part in x)
    if isinstance(x, (Distribution, Transform)) and type(x).__module__.startswith(_KNOWN):
        return type(x), *((name, _take_apart(part, tensors)) for name, part in vars(x).items())
    raise _Foreign


def _put_together(x: Any, tensors: Iterator[Tensor]) -> Any:
    """``x`` with other tensors, in the order of `_take_apart`; it does not check its arguments any more."""
    if isinstance(x, Tensor):
        return next(tensors)
    if isinstance(x, (list, tuple)) and not isinstance(x, torch.Size):
        return type(x)([_put_together(part, tensors) for part in x])
    if isinstance(x, (Distribution, Transform)):
        copy = object.__new__(type(x))
        copy.__dict__.update({name: _put_together(part, tensors) for name, part in vars(x).items()})
        copy.__dict__["_validate_args"] = False
        return copy
    return x


def _check_arguments(x: Any) -> None:
    """Refuse arguments out of their range, as distributions do when they are made."""
    for name, part in vars(x).items():
        if isinstance(part, Distribution):
            _check_arguments(part)
        constraint = getattr(x, "arg_constraints", {}).get(name)
        if constraint is None or is_dependent(constraint) or not isinstance(part, Tensor):
            continue
        if not bool(constraint.check(part).all()):
            raise NotVectorisable(f"argument {name!r} of a {type(x).__name__} is out of its range")
