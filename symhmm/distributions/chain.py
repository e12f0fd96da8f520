"""Transition matrices: the stationary start of a chain, and matrices of logits from their free entries."""

import torch
from torch import Tensor

from symhmm.errors import ShapeError, ValuesError


def stationary_distribution(transition: Tensor) -> Tensor:
    """Distribution that a Markov chain keeps: the row vector with ``p @ transition == p`` and sum 1.

    Solves ``p (I - transition + U) = 1`` with U a matrix of ones (Zucchini, MacDonald and Langrock 2016, section 1.3.2)
    in O(K^3), batched, and differentiable as often as needed.

    Args:
        transition: shape (*batch, K, K), probabilities; entry [i, j] is p(next = j given now = i); rows sum to 1.

    Returns:
        shape (*batch, K), probabilities.

    Raises:
        ShapeError: the last two sizes differ.
        ValuesError: the chain falls into parts that never meet, so that it has no single stationary distribution.

    >>> stationary_distribution(torch.tensor([[0.9, 0.1], [0.3, 0.7]]))
    tensor([0.7500, 0.2500])
    """
    if transition.dim() < 2 or transition.shape[-1] != transition.shape[-2]:
        raise ShapeError(
            "the transition matrix of a stationary distribution is not square.",
            details=[f"seen shape {tuple(transition.shape)}, wanted (*batch, K, K)"],
            suggestion="put 'from' in the last dimension but one and 'to' in the last.",
        )
    size = transition.shape[-1]
    eye = torch.eye(size, dtype=transition.dtype, device=transition.device)
    ones = torch.ones(*transition.shape[:-1], dtype=transition.dtype, device=transition.device)
    try:
        solution = torch.linalg.solve((eye - transition + 1).mT, ones)
    except torch.linalg.LinAlgError as error:
        raise ValuesError(
            "a transition matrix has no single stationary distribution: its states fall into parts that never meet.",
            details=[f"transition of shape {tuple(transition.shape)}"],
            suggestion="give the start a parameter of its own, or allow a small probability between the parts.",
        ) from error
    # Rounding can leave -1e-17 at a state that is never visited. Lift the value only: a clamp alone would cut
    # the gradient there.
    return solution + (solution.clamp(min=0) - solution).detach()


def with_zero_diagonal(logits: Tensor) -> Tensor:
    """Square matrices of logits relative to staying, from their off-diagonal entries.

    Args:
        logits: shape (*batch, K, K - 1), row by row without the diagonal; [i, :] are the logits of leaving state i.

    Returns:
        shape (*batch, K, K), zeros on the diagonal.

    >>> with_zero_diagonal(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    tensor([[0., 1., 2.],
            [3., 0., 4.],
            [5., 6., 0.]])
    """
    k = logits.shape[-2]
    # Read row by row, a square matrix is a diagonal entry, K others, a diagonal entry, K others, ..., a diagonal entry.
    groups = logits.reshape(*logits.shape[:-2], k - 1, k)
    flat = torch.cat([torch.zeros_like(groups[..., :1]), groups], -1).flatten(-2)
    return torch.cat([flat, torch.zeros_like(flat[..., :1])], -1).unflatten(-1, (k, k))
