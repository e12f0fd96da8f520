"""Chains in plain torch: any device, dtype and semiring, any number of derivatives. The oracle of the kernels."""

import numpy as np
import torch
from torch import Tensor

from symhmm.semiring import LOG, Semiring


def sequential(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, history: int, semiring: Semiring = LOG
) -> Tensor:
    """Contract a chain to a message over its initial state, one step after another from the last to the first.

    The backward recursion of a hidden Markov model of order ``history``: O(T) depth, O(T K^(history + 1)) work.

    Args:
        transition: shape (*batch, T or 1, S, K), nats, S = K**history; entry [t, s, j] is the log-factor of state j at
            step t given the joint state s of the ``history`` steps before it, oldest first.
        emission: shape (*batch, T or 1, K), nats.
        terminal: shape (*batch, S), nats, on the joint state after the last step.
        length: T, the number of steps.
        history: how many previous states a step looks at.
        semiring: `LOG` sums over the hidden paths, `MAX` keeps the best one.

    Returns:
        shape (*batch, S), nats, where the batches broadcast against each other.

    >>> sequential(torch.zeros(1, 2, 2), torch.zeros(1, 2), torch.zeros(2), length=3, history=1).exp()   # 2**3 paths
    tensor([8., 8.])
    """
    message = terminal
    for t in reversed(range(length)):
        message = _sum_last(_step(transition, emission, t, message, history), semiring)
    states = transition.shape[-2]
    batch = np.broadcast_shapes(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    return message.expand(*batch, states)


def scan(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, history: int, semiring: Semiring = LOG
) -> Tensor:
    """The same contraction by a balanced tree of matrix products.

    The reduction half of the parallel scan of Hassan, Sarkka and Garcia-Fernandez (2021), "Temporal Parallelization of
    Inference in Hidden Markov Models": O(log T) depth, O(T S^3 / history) work. ``history`` consecutive steps form one
    dense S x S matrix, so that a higher order makes the tree shallower instead of its matrices sparse. A chain that is
    constant over time is raised to its power by repeated squaring.

    Arguments and result are those of `sequential`.

    >>> t, e, end = torch.randn(7, 2, 2), torch.randn(7, 2), torch.zeros(2)
    >>> torch.allclose(scan(t, e, end, 7, 1), sequential(t, e, end, 7, 1), atol=1e-5)
    True
    """
    blocks, rest = divmod(length, history)
    # Step 1: the last steps that do not fill a block are folded into the terminal message.
    first = blocks * history
    if rest:
        terminal = sequential(
            _steps(transition, first, length, -3),
            _steps(emission, first, length, -2),
            terminal,
            rest,
            history,
            semiring,
        )
    if blocks == 0:
        return sequential(transition, emission, terminal, 0, history, semiring)
    # Step 2: one matrix per block; a single one that stands for all of them where nothing depends on time.
    constant = transition.shape[-3] == 1 and emission.shape[-2] == 1
    matrices = _block_matrices(transition, emission, 1 if constant else blocks, history)
    # Step 3: their product.
    product = _power(matrices.squeeze(-3), blocks, semiring) if constant else _reduce(matrices, semiring)
    return _sum_last(product + terminal.unsqueeze(-2), semiring)


def _sum_last(x: Tensor, semiring: Semiring) -> Tensor:
    """Semiring sum over the last dimension; where nothing is possible the result is a constant without gradient."""
    total = semiring.reduce(x, -1)
    return torch.where(total == -torch.inf, -torch.inf, total)


def _steps(x: Tensor, start: int, stop: int, dim: int) -> Tensor:
    """The steps start..stop-1 of a tensor that may be constant over time."""
    return x if x.shape[dim] == 1 else x.narrow(dim, start, stop - start)


def _step(transition: Tensor, emission: Tensor, t: int, message: Tensor, history: int) -> Tensor:
    """Log-weights (*batch, S, K) of all moves at step t, given the message on the state after it."""
    factor = transition[..., t if transition.shape[-3] > 1 else 0, :, :]
    states, size = factor.shape[-2:]
    arrival = emission[..., t if emission.shape[-2] > 1 else 0, :].unsqueeze(-2) + message.unflatten(-1, (-1, size))
    # The move from (oldest, rest) to j arrives in (rest, j): the oldest state no longer matters.
    moves = factor.unflatten(-2, (size, states // size)) + arrival.unsqueeze(-3)
    return moves.flatten(-3, -2)


def _block_matrices(transition: Tensor, emission: Tensor, blocks: int, history: int) -> Tensor:
    """Log-weights (*batch, blocks, S, S) from the states before each block of ``history`` steps to those after it."""
    size = transition.shape[-1]
    total: Tensor | None = None
    for k in range(history):
        # Step k of a block looks at x_k .. x_{k+history-1} and moves to x_{k+history}, of x_0 .. x_{2 history - 1}.
        factor = _every(transition, k, blocks, history, -3) + _every(emission, k, blocks, history, -2).unsqueeze(-2)
        shape = (1,) * k + (size,) * (history + 1) + (1,) * (history - 1 - k)
        term = factor.reshape(*factor.shape[:-2], *shape)
        total = term if total is None else total + term
    assert total is not None
    batch = total.shape[: -2 * history]
    states = size**history
    return total.expand(*batch, *(size,) * (2 * history)).reshape(*batch, states, states)


def _every(x: Tensor, start: int, count: int, stride: int, dim: int) -> Tensor:
    """Steps start, start + stride, ... (``count`` of them) of a tensor that may be constant over time."""
    if x.shape[dim] == 1:
        return x
    steps = torch.arange(start, start + (count - 1) * stride + 1, stride, device=x.device)
    return x.index_select(dim, steps)


def _matmul(a: Tensor, b: Tensor, semiring: Semiring) -> Tensor:
    """Semiring product of matrices (..., I, J) and (..., J, K)."""
    return _sum_last(a.unsqueeze(-2) + b.transpose(-1, -2).unsqueeze(-3), semiring)


def _reduce(matrices: Tensor, semiring: Semiring) -> Tensor:
    """Ordered product over dimension -3 by a balanced tree."""
    while (count := matrices.shape[-3]) > 1:
        even = matrices.narrow(-3, 0, count - count % 2).unflatten(-3, (count // 2, 2))
        pairs = _matmul(even.select(-3, 0), even.select(-3, 1), semiring)
        matrices = torch.cat([pairs, matrices.narrow(-3, count - 1, 1)], -3) if count % 2 else pairs
    return matrices.squeeze(-3)


def _power(matrix: Tensor, exponent: int, semiring: Semiring) -> Tensor:
    """Power of a matrix (..., S, S) with exponent at least 1 by repeated squaring."""
    result: Tensor | None = None
    while True:
        if exponent % 2:
            result = matrix if result is None else _matmul(result, matrix, semiring)
        exponent //= 2
        if exponent == 0:
            assert result is not None
            return result
        matrix = _matmul(matrix, matrix, semiring)
