"""Observed values: checked once, and replaced by a harmless point of the support where they are masked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from symhmm.capture.inputs import feasible_point
from symhmm.capture.time_index import Level
from symhmm.errors import DataError, ShapeError


def masked_log_prob(fn: Any, value: Tensor, mask: Tensor | bool | None, *, replace: bool) -> Tensor:
    """Log-probability in nats, zero where ``mask`` is False.

    A masked value may be NaN or outside the support: it is replaced before the log-probability is taken, since the
    gradient of ``where(mask, nan, 0)`` is NaN.

    Args:
        fn: distribution.
        value: shape (*batch, *event).
        mask: boolean, broadcastable to the batch.
        replace: whether masked values are replaced (data), or are known to be good (latents).
    """
    if mask is False:
        return torch.zeros(())
    if not isinstance(mask, Tensor):
        return fn.log_prob(value)
    if replace and value.dim() >= fn.event_dim and value.numel():
        where = mask.reshape(mask.shape + (1,) * fn.event_dim)
        value = torch.where(where, value, feasible_point(fn.support, value.shape, value.dtype).to(value.device))
    log_prob = fn.log_prob(value)
    return torch.where(mask, log_prob, torch.zeros((), dtype=log_prob.dtype, device=log_prob.device))


def check_mask(name: str, mask: Tensor, fn: Any, plates: Mapping[int, Any], nesting: int) -> None:
    """Raise `ShapeError` if ``mask`` does not fit the plates of its site."""
    batch = fn.batch_shape
    for dim in range(-min(mask.dim(), nesting), 0):
        wanted = plates[dim].size if dim in plates else batch[dim] if len(batch) >= -dim else 1
        if mask.shape[dim] not in (1, wanted):
            shown = tuple(batch[max(0, len(batch) - nesting) :])
            names = ", ".join(f"{p.name!r} of size {p.size} at dim {p.dim}" for p in plates.values())
            raise ShapeError(
                f"the mask of site {name!r} has the wrong shape.",
                details=[
                    f"seen {tuple(mask.shape)}, wanted a shape that broadcasts to {shown}",
                    f"plates: {names or 'none'}",
                ],
                suggestion="one mask entry per member of each plate; mask.unsqueeze(-1) adds a dimension on the right",
            )


def check_shape(name: str, value: Tensor, event_dim: int, plates: Sequence[Any]) -> None:
    """Raise `ShapeError` if an observed value does not fit the plates of its site."""
    for plate in plates:
        dim = plate.dim - event_dim
        if plate.size > 0 and value.dim() >= -dim and value.shape[dim] not in (1, plate.size):
            raise ShapeError(
                f"the observations of site {name!r} do not fit plate {plate.name!r}.",
                details=[f"seen size {value.shape[dim]} at dim {dim} of {tuple(value.shape)}, wanted {plate.size}"],
                suggestion="one observation per member: y[..., index] in a subsampled plate, y.unsqueeze(-1) otherwise",
            )


def checked_at_once(support: Any) -> bool:
    """Whether values of all steps can be checked together.

    Supports made of others may index by mask, which has no batching rule: they are checked in concrete steps only.
    """
    return type(support).__module__ in ("torch.distributions.constraints", "pyro.distributions.constraints")


def check_values(name: str, fn: Any, value: Tensor, mask: Tensor | bool | None, levels: Sequence[Level]) -> None:
    """Raise `DataError` if an observation that is not masked is NaN or outside the support."""
    if not value.numel():
        return
    missing = _whole(value.isnan(), levels) if value.is_floating_point() else None
    bad = _counted(missing, mask, fn.event_dim, levels) if missing is not None and bool(missing.any()) else 0
    if bad:
        raise DataError(
            f"the observations of site {name!r} contain {bad} unmasked NaN.",
            suggestion="pyro.poutine.mask(mask=~value.isnan()) around the site, or drop these rows",
        )
    if levels and not checked_at_once(fn.support):
        return
    # Such supports also expect values of the full shape.
    batch = broadcast_shape(fn.batch_shape, value.shape[: value.dim() - fn.event_dim])
    full = value.expand(batch + value.shape[value.dim() - fn.event_dim :])
    inside = _whole(torch.as_tensor(fn.support.check(full)), levels)
    if inside is None or bool(inside.all()):
        return
    # A support that depends on the state is left at some states by right: the log-probability is -inf there.
    own = value.dim() - fn.event_dim
    steps, extra = len(levels), inside.dim() - len(levels) - own
    if extra > 0:
        inside = inside.flatten(steps, steps + extra - 1).any(steps)
    bad = _counted(~inside, mask, 0, levels)
    if bad:
        raise DataError(
            f"the observations of site {name!r} contain {bad} unmasked values outside the support.",
            details=[f"the support of {type(fn).__name__} is {fn.support}"],
            suggestion="mask them with pyro.poutine.mask, or choose a distribution that allows them",
        )


def _whole(x: Tensor, levels: Sequence[Level]) -> Tensor | None:
    """``x`` at all steps, or None if it is batched by someone else, who cannot be asked."""
    for level in reversed(levels):
        x = level.unbatch(x)
    return None if is_functorch_wrapped_tensor(x) else x


def _counted(bad: Tensor, mask: Tensor | bool | None, event_dim: int, levels: Sequence[Level]) -> int:
    if isinstance(mask, Tensor):
        whole = _whole(mask, levels)
        if whole is None:
            return 0
        steps, rest = len(levels), whole.shape[len(levels) :]
        batch = bad.dim() - steps - event_dim
        if len(rest) > batch:
            return 0  # a mask that depends on states that are summed out
        padded = whole.reshape(whole.shape[:steps] + (1,) * (batch - len(rest)) + rest + (1,) * event_dim)
        bad = bad & padded
    return int(bad.sum())
