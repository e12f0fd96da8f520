"""Hidden paths of chains whose initial states are known: exact posterior draws and best paths."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains import path_steps
from symhmm.chains.threads import cut, run, thread_count

BLOCK = 256  # steps whose tables of choices are held at once


@dataclass(frozen=True)
class Messages:
    """The terms of a batch of R chains, and the log-weight of all that follows each state of each step.

    Args:
        transition: shape (rows, T or 1, S, K), nats; entry [t, s, j] goes from the joint state s of the steps before,
            oldest first, to state j.
        emission: shape (rows, T or 1, K), nats.
        transition_rows, emission_rows: shape (R,), int64, which row each chain reads.
        stops: shape (R,), int64, steps of each chain that count; the rest has weight zero.
        values: shape (R, T + 1, S), nats, float64; [t, s] sums (or maximises) over the steps from t on.
        length: T.
    """

    transition: Tensor
    emission: Tensor
    transition_rows: Tensor
    emission_rows: Tensor
    stops: Tensor
    values: Tensor
    length: int


def messages(
    transition: Tensor, emission: Tensor | None, length: int, *, maximise: bool, stops: Tensor | None = None
) -> Messages:
    """The backward recursion of a batch of chains, keeping the message of every step.

    Cost T S K per chain, memory T S.

    Args:
        transition: shape (*batch, T or 1, S, K), nats.
        emission: shape (*batch, T or 1, K), nats; sizes of 1 in either batch are shared.
        length: T.
        maximise: the best of all paths instead of their sum.
        stops: shape (*batch,) or broadcasting to it, steps that count; all of them if None.

    >>> stay = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()[None]
    >>> messages(stay, None, 5, maximise=False).values[0, 0].exp().round(decimals=6)
    tensor([1., 1.], dtype=torch.float64)
    """
    *t_batch, t_steps, states, size = transition.shape
    if emission is None:
        emission = transition.new_zeros(*(1 for _ in t_batch), 1, size)
    *e_batch, e_steps, _ = emission.shape
    batch = torch.broadcast_shapes(t_batch, e_batch, () if stops is None else stops.shape)
    count = torch.Size(batch).numel()
    stop = torch.full((), length) if stops is None else stops
    found = Messages(
        transition.detach().reshape(-1, t_steps, states, size).contiguous(),
        emission.detach().reshape(-1, e_steps, size).contiguous(),
        _rows(t_batch, batch),
        _rows(e_batch, batch),
        stop.expand(batch).reshape(-1).contiguous(),
        torch.empty(count, length + 1, states, dtype=torch.float64),
        length,
    )
    arrays = _arrays(found)
    threads = thread_count(count * length * states * size * (2e-9 if maximise else 8e-9), max(count, 1))
    run([partial(path_steps.recursion, *part, maximise, *arrays) for part in cut(count, threads)])
    return found


def draw(found: Messages, rows: Tensor, start: Tensor, generator: torch.Generator) -> Tensor:
    """Exact draws from the posterior of the states of P paths, each given its chain and its initial state.

    Forward sampling with backward messages. Paths of one chain share a table of cumulative probabilities, and each has a
    stream of random numbers of its own, so that the result does not depend on the number of threads.

    Args:
        rows: shape (P,), chain of each path.
        start: shape (P,), joint state before the first step.

    Returns:
        shape (P, T), the state of each step, in the smallest signed integer type that holds it.
    """
    paths, order, chains, starts, state = _by_chain(found, rows, start)
    keys = torch.randint(2**63 - 1, rows.shape, generator=generator).numpy().view(np.uint64)
    threads = thread_count(rows.numel() * found.length * 5e-9, max(len(chains), 1))
    run([
        partial(path_steps.draw, *part, chains, starts, order, state, keys, *_arrays(found), BLOCK, paths.numpy())
        for part in cut(len(chains), threads)
    ])  # fmt: skip
    return paths


def follow(found: Messages, rows: Tensor, start: Tensor) -> Tensor:
    """The best path of each chain in ``rows`` from its initial state; arguments and result as in `draw`.

    The messages must have been maximised. Of equally good states the first is taken.
    """
    paths, _, _, _, state = _by_chain(found, rows, start)
    threads = thread_count(rows.numel() * found.length * 5e-9, max(rows.numel(), 1))
    run([
        partial(path_steps.follow, *part, rows.numpy(), state, *_arrays(found), paths.numpy())
        for part in cut(rows.numel(), threads)
    ])  # fmt: skip
    return paths


def _rows(own: list[int], batch: torch.Size) -> Tensor:
    own_size = torch.Size(own)
    return torch.arange(own_size.numel()).reshape(own_size).expand(batch).reshape(-1).contiguous()


def _arrays(found: Messages) -> tuple[NDArray[Any], ...]:
    return (
        found.transition.numpy(), found.transition_rows.numpy(), found.emission.numpy(), found.emission_rows.numpy(),
        found.stops.numpy(), found.values.numpy(),
    )  # fmt: skip


def _by_chain(
    found: Messages, rows: Tensor, start: Tensor
) -> tuple[Tensor, NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """An empty result, and the paths sorted by chain: their order, the chains, where each begins, and the states."""
    size = found.transition.shape[-1]
    dtype = torch.int8 if size <= 127 else torch.int16
    paths = torch.empty(rows.numel(), found.length, dtype=dtype)
    order = torch.argsort(rows, stable=True)
    chains, counts = torch.unique_consecutive(rows[order], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return paths, order.numpy(), chains.numpy(), starts.numpy(), start.to(torch.int64).clone().numpy()
