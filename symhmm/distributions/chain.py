"""Transition matrices: stationary starts, logits from free entries, steps of any length, and dwell times by more states."""

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


def generator_matrix(rates: Tensor) -> Tensor:
    """Generator of a chain in continuous time: rates of moves off the diagonal, rows that sum to 0.

    Args:
        rates: shape (*batch, K, K - 1), row by row without the diagonal, per unit of time; [i, :] are those of leaving i.

    Returns:
        shape (*batch, K, K).

    >>> generator_matrix(torch.tensor([[2.0], [3.0]]))
    tensor([[-2.,  2.],
            [ 3., -3.]])
    """
    moves = with_zero_diagonal(rates)
    return moves - torch.diag_embed(moves.sum(-1))


def transition_after(generator: Tensor, elapsed: Tensor) -> Tensor:
    """Transition probabilities of a chain in continuous time over some time: ``expm(generator * elapsed)``.

    Args:
        generator: shape (K, K), see `generator_matrix`.
        elapsed: shape (*batch), times in the unit of the generator; from 0 on.

    Returns:
        shape (*batch, K, K), probabilities; the identity after no time.

    >>> transition_after(generator_matrix(torch.tensor([[2.0], [3.0]])), torch.tensor([0.0, 100.0]))[:, 0]
    tensor([[1.0000, 0.0000],
            [0.6000, 0.4000]])
    """
    p = torch.linalg.matrix_exp(generator * elapsed[..., None, None])
    return p + (p.clamp(min=0) - p).detach()  # rounding can leave -1e-17; a clamp alone would cut the gradient there


def stationary_of_generator(generator: Tensor) -> Tensor:
    """Distribution that a chain in continuous time keeps: the row vector with ``p @ generator == 0`` and sum 1.

    Args:
        generator: shape (*batch, K, K), see `generator_matrix`.

    Returns:
        shape (*batch, K), probabilities. Raises like `stationary_distribution`.

    >>> stationary_of_generator(generator_matrix(torch.tensor([[2.0], [3.0]])))
    tensor([0.6000, 0.4000])
    """
    fastest = generator.detach().abs().amax((-2, -1), keepdim=True)
    eye = torch.eye(generator.shape[-1], dtype=generator.dtype, device=generator.device)
    return stationary_distribution(eye + generator / fastest.clamp_min(torch.finfo(generator.dtype).tiny))


def dwell_chain(moves: Tensor, dwell: Tensor) -> Tensor:
    """Log-transition matrix of a semi-Markov chain: each state becomes R stages, one for each step of its dwell time.

    Stage r of state i is left for stage 1 of state j with the hazard p_i(r) / S_i(r) times ``moves[i, j]``, and else followed
    by stage r + 1; S_i(r) is the probability of staying for r steps or more (Langrock and Zucchini 2011, section 2.2, with
    dwell times that end at R).

    Args:
        moves: shape (K, K), probabilities of the next state, [from, to]; 0 on the diagonal.
        dwell: shape (K, R), log-probabilities of dwell times 1, ..., R in each state, normalised here, nats.

    Returns:
        shape (K * R, K * R), nats; row ``i * R + r - 1`` is stage r of state i.

    >>> dwell_chain(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5], [0.2, 0.8]]).log()).exp()
    tensor([[0.0000, 0.5000, 0.5000, 0.0000],
            [0.0000, 0.0000, 1.0000, 0.0000],
            [0.2000, 0.0000, 0.0000, 0.8000],
            [1.0000, 0.0000, 0.0000, 0.0000]])
    """
    k, r = dwell.shape
    stages = torch.arange(r, device=dwell.device)
    survival = torch.logcumsumexp(dwell.flip(-1), -1).flip(-1)
    leave = dwell - survival
    stay = torch.cat([survival[:, 1:], survival[:, :1]], -1) - survival  # what follows stage R is never read
    possible = moves > 0
    log_moves = torch.where(possible, moves, 1.0).log()
    to_first = possible[:, None, :, None] & (stages == 0)
    to_next = torch.eye(k, dtype=torch.bool, device=dwell.device)[:, None, :, None] & (
        stages[:, None, None] + 1 == stages
    )
    left = (leave[:, :, None] + log_moves[:, None, :])[..., None]
    kept = torch.where(to_next, stay[:, :, None, None], -torch.inf)
    return torch.where(to_first, left, kept).reshape(k * r, k * r)
