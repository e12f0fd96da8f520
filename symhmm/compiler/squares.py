"""Weighted squares of sums that are linear in the data: what is left of normal emission terms."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from symhmm.compiler.weighted import backward_kernel, forward_kernel, weighted, weighted_backward

_LIBRARY = torch.library.Library("symhmm", "FRAGMENT")
_LIBRARY.define("squared(Tensor before, Tensor scale, Tensor weights, Tensor rows, Tensor clean) -> Tensor")
_LIBRARY.define(
    "squared_backward(Tensor gradient, Tensor scale, Tensor weights, Tensor rows, Tensor clean)"
    " -> (Tensor, Tensor, Tensor)"
)


def squared(before: Tensor, scale: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    """``out[b, k, r] = before[b, k, r] + scale[b, k] (sum_j weights[b, j, k] rows[b, j, r])^2``.

    The sum is that of `symhmm.compiler.weighted.weighted`; where it is zero, its square counts nothing. It is made again for
    the gradient, so that nothing as large as the result is kept.

    Args:
        before: shape (B, K, R) or (B, K, 1).
        scale: shape (B, K).
        weights: shape (B, J, K).
        rows: shape (B, J, R).
        clean: whether all rows are finite, shape ().

    >>> squared(torch.zeros(1, 1, 1), torch.tensor([[-0.5]]), torch.tensor([[[1.0], [-3.0]]]),
    ...         torch.tensor([[[5.0, 4.0], [1.0, 1.0]]]), torch.tensor(True))
    tensor([[[-2.0000, -0.5000]]])
    """
    inputs = before, scale, weights, rows, clean
    # Inside of a transform, such as ``vmap``, also what it does not batch.
    if peek_interpreter_stack() is not None:
        return before + scale[..., None] * weighted(weights, rows, clean).square()
    return _Squared.apply(*inputs)


def _has_kernel(rows: Tensor, clean: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.float64) and bool(clean)


def _forward(before: Tensor, scale: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    if _has_kernel(rows, clean):
        from symhmm.chains import squares

        return squares.forward(before, scale, weights, rows)
    root = forward_kernel(weights, rows, clean)
    return before + (scale[..., None] * root.square()).masked_fill(root == 0, 0)


def _backward(
    gradient: Tensor, scale: Tensor, weights: Tensor, rows: Tensor, clean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient summed over columns, and those of ``scale`` and ``weights``."""
    if _has_kernel(rows, clean):
        from symhmm.chains import squares

        total, of_scale, slope = squares.backward(gradient, weights, rows)
        return total, of_scale, 2 * scale[:, None] * slope
    root = forward_kernel(weights, rows, clean)
    both = (gradient * root).masked_fill(root == 0, 0)
    slope = backward_kernel(2 * scale[..., None] * both, weights, rows, clean)
    return gradient.sum(-1, keepdim=True), (both * root).masked_fill(root == 0, 0).sum(-1), slope


class _Squared(torch.autograd.Function):
    @staticmethod
    def forward(before: Tensor, scale: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
        return torch.ops.symhmm.squared.default(before, scale, weights, rows, clean)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.shared = inputs[0].shape[2] == 1 and output.shape[2] > 1

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        scale, weights, rows, clean = ctx.saved_tensors
        if torch.is_grad_enabled():  # these gradients will be differentiated themselves
            root = weighted(weights, rows, clean)
            both = gradient * root
            total, of_scale = gradient.sum(-1, keepdim=True), (both * root).sum(-1)
            of_weights = weighted_backward(2 * scale[..., None] * both, weights, rows, clean)
        else:
            total, of_scale, of_weights = torch.ops.symhmm.squared_backward.default(gradient, *ctx.saved_tensors)
        return total if ctx.shared else gradient, of_scale, of_weights, None, None


def _like_squared(before: Tensor, scale: Tensor, weights: Tensor, rows: Tensor, clean: Tensor) -> Tensor:
    return rows.new_empty(*scale.shape, rows.shape[2])


def _like_gradients(
    gradient: Tensor, scale: Tensor, weights: Tensor, rows: Tensor, clean: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return scale.new_empty(*scale.shape, 1), scale.new_empty(scale.shape), weights.new_empty(weights.shape)


_LIBRARY.impl("squared", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("squared", _like_squared, "Meta")
_LIBRARY.impl("squared_backward", _backward, "CompositeExplicitAutograd")
_LIBRARY.impl("squared_backward", _like_gradients, "Meta")
