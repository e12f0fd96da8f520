"""Hidden paths of chains whose initial states are known: exact posterior draws and best paths (numba)."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numba import njit
from torch import Tensor

from symhmm.chains.jit import kernel
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
    >>> messages(stay, None, 5, maximise=False).values[0, 0].exp()
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
    run([partial(_recursion, *part, maximise, *arrays) for part in cut(count, threads)])
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
        partial(_draw, *part, chains, starts, order, state, keys, *_arrays(found), BLOCK, paths.numpy())
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
        partial(_follow, *part, rows.numpy(), state, *_arrays(found), paths.numpy())
        for part in cut(rows.numel(), threads)
    ])  # fmt: skip
    return paths


def _rows(own: list[int], batch: torch.Size) -> Tensor:
    own_size = torch.Size(own)
    return torch.arange(own_size.numel()).reshape(own_size).expand(batch).reshape(-1).contiguous()


def _arrays(found: Messages) -> tuple[np.ndarray, ...]:  # type: ignore[type-arg]
    return (
        found.transition.numpy(), found.transition_rows.numpy(), found.emission.numpy(), found.emission_rows.numpy(),
        found.stops.numpy(), found.values.numpy(),
    )  # fmt: skip


def _by_chain(found: Messages, rows: Tensor, start: Tensor) -> tuple[Tensor, ...]:
    """An empty result, and the paths sorted by chain: their order, the chains, where each begins, and the states."""
    size = found.transition.shape[-1]
    dtype = torch.int8 if size <= 127 else torch.int16
    paths = torch.empty(rows.numel(), found.length, dtype=dtype)
    order = torch.argsort(rows, stable=True)
    chains, counts = torch.unique_consecutive(rows[order], return_counts=True)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return paths, order.numpy(), chains.numpy(), starts.numpy(), start.to(torch.int64).clone().numpy()


@kernel
def _recursion(first, last, maximise, transition, t_rows, emission, e_rows, stops, values):
    length, states = values.shape[1] - 1, values.shape[2]
    size = transition.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    arrival = np.empty(states)
    for r in range(first, last):
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for t in range(length, stops[r] - 1, -1):
            values[r, t] = 0.0
        for t in range(stops[r] - 1, -1, -1):
            at, et = t if moving else 0, t if varying else 0
            for s in range(states):
                arrival[s] = e[et, s % size] + values[r, t + 1, s]
            for s in range(states):
                to = (s % rest) * size
                best = -np.inf
                for j in range(size):
                    best = max(best, a[at, s, j] + arrival[to + j])
                if not maximise and best > -np.inf:
                    total = 0.0
                    for j in range(size):
                        total += np.exp(a[at, s, j] + arrival[to + j] - best)
                    best += np.log(total)
                values[r, t, s] = best


@njit(nogil=True, inline="always")
def _uniform(key, t):
    """Number t of the stream ``key``, in [0, 1): splitmix64 (Steele, Lea and Flood 2014)."""
    x = key + np.uint64(t + 1) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)) * 1.1102230246251565e-16


@kernel
def _draw(
    first, last, chains, starts, order, state, keys,
    transition, t_rows, emission, e_rows, stops, values, block, paths,
):  # fmt: skip
    length, states = values.shape[1] - 1, values.shape[2]
    size = transition.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    below = np.empty((min(block, length), states, size))
    for g in range(first, last):
        r = chains[g]
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for begin in range(0, length, block):
            end = min(begin + block, length)
            for t in range(begin, end):
                at, et = t if moving else 0, t if varying else 0
                for s in range(states):
                    to = (s % rest) * size
                    # Weights relative to the largest one: the message of s itself is their sum up to rounding.
                    peak = -np.inf
                    for j in range(size):
                        peak = max(peak, a[at, s, j] + e[et, j] + values[r, t + 1, to + j])
                    total, possible = 0.0, 0
                    for j in range(size):
                        weight = 0.0
                        if peak > -np.inf:
                            weight = np.exp(a[at, s, j] + e[et, j] + values[r, t + 1, to + j] - peak)
                        if weight > 0.0:
                            possible = j
                        total += weight
                        below[t - begin, s, j] = total
                    for j in range(size):
                        # Rounding must not let a number fall behind the last state that is possible.
                        below[t - begin, s, j] = 2.0 if j >= possible else below[t - begin, s, j] / total
            for i in range(starts[g], starts[g + 1]):
                p = order[i]
                s, key = state[p], keys[p]
                for t in range(begin, end):
                    u = _uniform(key, t)
                    j = 0
                    while u >= below[t - begin, s, j]:
                        j += 1
                    paths[p, t] = j
                    s = (s % rest) * size + j
                state[p] = s


@kernel
def _follow(first, last, rows, state, transition, t_rows, emission, e_rows, stops, values, paths):
    length, states = values.shape[1] - 1, values.shape[2]
    size = transition.shape[3]
    rest = states // size
    moving, varying = transition.shape[1] > 1, emission.shape[1] > 1
    for p in range(first, last):
        r, s = rows[p], state[p]
        a, e = transition[t_rows[r]], emission[e_rows[r]]
        for t in range(length):
            at, et = t if moving else 0, t if varying else 0
            to = (s % rest) * size
            best, choice = -np.inf, 0
            for j in range(size):
                x = a[at, s, j] + e[et, j] + values[r, t + 1, to + j]
                if x > best:
                    best, choice = x, j
            paths[p, t] = choice
            s = to + choice
