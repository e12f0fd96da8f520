"""The beginning of a chain (numba): from its message over initial states to the log-probability of all that was seen."""

import numpy as np
from torch import Tensor

from symhmm.chains.jit import kernel
from symhmm.chains.layout import Layout
from symhmm.chains.places import LIKE, places
from symhmm.chains.simd import numbers_at


@kernel
def _close(states, like, initial_at, starts, stride, message_at, occupancy_at, evidence_at):  # type: ignore[no-untyped-def]
    """Log-probabilities of all chains, and probabilities of their initial states given all that was seen."""
    initial, message = numbers_at(initial_at, like), numbers_at(message_at, np.float64(0))
    occupancy, evidence = numbers_at(occupancy_at, like), numbers_at(evidence_at, like)
    for b in range(starts.size):
        peak, possible = -np.inf, False
        for s in range(states):
            x = message[b * states + s] = initial[starts[b] + s * stride] + message[b * states + s]
            possible |= x != -np.inf
            if peak < x < np.inf:
                peak = x
        if not possible:
            evidence[b] = -np.inf
            occupancy[b * states : (b + 1) * states] = 0
            continue
        if peak == -np.inf:  # what is possible is no finite number
            peak = 0.0
        total = 0.0
        for s in range(states):
            message[b * states + s] = np.exp(message[b * states + s] - peak)
            total += message[b * states + s]
        for s in range(states):
            occupancy[b * states + s] = message[b * states + s] / total
        evidence[b] = peak + np.log(total)


def close(initial: Tensor, message: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Log-probability (*batch) of all that was seen, nats, ``-inf`` where it is impossible, and its derivative.

    The latter is the probability (*batch, S) of each initial state given all that was seen, and zero where that is impossible.

    Args:
        initial: shape (*batch, S), nats; sizes of 1 broadcast.
        message: shape (*batch, S), nats, without gaps, float64: a sum over many steps would drown what differs between states
            in less. It is written over.
        layout: of the chains.
    """
    evidence, occupancy = initial.new_empty(layout.batch), initial.new_empty(message.shape)
    if layout.chains:
        found = places(initial.shape, initial.stride(), False, layout, 1)
        _close(
            layout.states, LIKE[initial.dtype], initial.data_ptr(), found.chains, found.inner[0],
            message.data_ptr(), occupancy.data_ptr(), evidence.data_ptr(),
        )  # fmt: skip
    return evidence, occupancy
