"""Weighted sums of data: what is left of emission terms that are linear in functions of the data."""

from typing import Any

import torch
from torch import Tensor

# Two operators without derivatives, which recorded gradients call, and a function that ties them together.
_LIBRARY = torch.library.Library("symhmm", "FRAGMENT")
_LIBRARY.define("weighted(Tensor weights, Tensor rows, Tensor clean) -> Tensor")
_LIBRARY.define("weighted_backward(Tensor gradient, Tensor weights, Tensor rows, Tensor clean) -> Tensor")


def weighted(weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    """``out[b, k, r] = sum_j weights[b, j, k] rows[b, j, r]``, where zero times anything is zero.

    Masked data are rows of zeros, ``xlogy(0, 0)`` is a weight of zero times an infinite row: neither becomes NaN. A matrix
    product wherever all numbers are finite. Differentiable any number of times in the weights.

    Args:
        weights: shape (B, J, K).
        rows: shape (B, J, R).
        clean: whether all rows are finite, shape ().

    >>> weighted(torch.tensor([[[2.0], [torch.inf]]]), torch.tensor([[[1.0, 3.0], [0.0, 0.0]]]), torch.tensor(True))
    tensor([[[2., 6.]]])
    """
    return _Weighted.apply(weights, rows, clean)


def weighted_backward(gradient: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    """The gradient of `weighted` in its weights, shape (B, J, K): ``sum_r gradient[b, k, r] rows[b, j, r]``."""
    return _WeightedBackward.apply(gradient, weights, rows, clean)


def forward_kernel(weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    """What `weighted` does, without derivatives."""
    if bool(clean) and bool(weights.sum().isfinite()):
        return matmul(weights.mT, rows)
    total = weights.new_zeros(weights.shape[0], weights.shape[2], rows.shape[2])
    for w, row in zip(weights.unbind(1), rows.unbind(1), strict=True):
        total += _product(w[:, :, None], row[:, None, :])
    return total


def backward_kernel(gradient: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    """What `weighted_backward` does, without derivatives.

    What a weight of zero times an infinite row does not give, it does not take.
    """
    if bool(clean):
        return matmul(rows, gradient.mT)
    parts = []
    for w, row in zip(weights.unbind(1), rows.unbind(1), strict=True):
        row = row[:, None, :]
        none = (w[:, :, None] == 0) & row.isinf()
        parts.append(_product(gradient, row).masked_fill(none, 0).sum(-1))
    return torch.stack(parts, 1)


def matmul(x: Tensor, y: Tensor) -> Tensor:
    """A product of matrices, batch by batch."""
    # A batch of one is slower than a matrix.
    return torch.mm(x[0], y[0])[None] if x.shape[0] == 1 else torch.bmm(x, y)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).masked_fill((y == 0) | ((x == 0) & ~y.isnan()), 0)


def _members(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The members of a vmap in the first dimension."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _one_by_one(f: Any, size: int, in_dims: tuple[int | None, ...], inputs: tuple[Tensor, ...]) -> tuple[Tensor, int]:
    each = (_members(x, d, size) for x, d in zip(inputs, in_dims, strict=True))
    return torch.stack([f.apply(*member) for member in zip(*each, strict=True)]), 0


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
        return WEIGHTED(weights, rows, clean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _WeightedBackward.apply(gradient, *ctx.saved_tensors), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _Weighted.apply(tangent, *ctx.saved_tensors[1:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], weights: Tensor, rows: Tensor, clean: Tensor) -> Any:
        if in_dims[1:] != (None, None):
            return _one_by_one(_Weighted, info.batch_size, in_dims, (weights, rows, clean))
        w = _members(weights, in_dims[0], info.batch_size).movedim(0, 2)  # (B, J, members, K)
        return _Weighted.apply(w.flatten(2), rows, clean).unflatten(1, w.shape[2:]), 1


class _WeightedBackward(torch.autograd.Function):
    @staticmethod
    def forward(gradient: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
        return torch.ops.symhmm.weighted_backward.default(gradient, weights, rows, clean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # The first gradient is linear in the one it was given, with the same rows.
        return _Weighted.apply(gradient, *ctx.saved_tensors[2:]), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Tensor | None) -> Tensor:
        return _WeightedBackward.apply(tangent, *ctx.saved_tensors[1:])

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], gradient: Tensor, weights: Tensor, rows: Tensor, clean: Tensor
    ) -> Any:
        if in_dims[2:] != (None, None):
            return _one_by_one(_WeightedBackward, info.batch_size, in_dims, (gradient, weights, rows, clean))
        g = _members(gradient, in_dims[0], info.batch_size).movedim(0, 1)  # (B, members, K, R)
        w = _members(weights, in_dims[1], info.batch_size).movedim(0, 2)  # (B, J, members, K)
        return _WeightedBackward.apply(g.flatten(1, 2), w.flatten(2), rows, clean).unflatten(2, w.shape[2:]), 2


def _like_weighted(weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    return weights.new_empty(weights.shape[0], weights.shape[2], rows.shape[2])


def _like_weights(gradient: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    return weights.new_empty(weights.shape)


for _name, _kernel, _shape in (
    ("weighted", forward_kernel, _like_weighted),
    ("weighted_backward", backward_kernel, _like_weights),
):
    _LIBRARY.impl(_name, _kernel, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _shape, "Meta")

WEIGHTED = torch.ops.symhmm.weighted.default
