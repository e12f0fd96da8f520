"""The beginning of a chain (numba): from its message over initial states to the log-probability of all that was seen."""

import numpy as np
from torch import Tensor

from symhmm.chains.jit import kernel
from symhmm.chains.layout import Layout
from symhmm.chains.places import LIKE, places
from symhmm.chains.simd import numbers_at


@kernel
def _close(states, like, initial_at, starts, stride, message_at, evidence_at):  # type: ignore[no-untyped-def]
    """Log-probabilities of all chains; those of their initial states given all that was seen take the message's place."""
    initial, message = numbers_at(initial_at, like), numbers_at(message_at, like)
    evidence = numbers_at(evidence_at, like)
    for b in range(starts.size):
        peak, possible = -np.inf, False
        for s in range(states):
            x = np.float64(initial[starts[b] + s * stride]) + message[b * states + s]
            possible |= x != -np.inf
            if peak < x < np.inf:
                peak = x
        if not possible:
            evidence[b] = -np.inf
            message[b * states : (b + 1) * states] = 0
            continue
        if peak == -np.inf:  # what is possible is no finite number
            peak = 0.0
        total = 0.0
        for s in range(states):
            share = np.exp(initial[starts[b] + s * stride] + np.float64(message[b * states + s]) - peak)
            message[b * states + s] = share
            total += share
        for s in range(states):
            message[b * states + s] /= total
        evidence[b] = peak + np.log(total)


def close(initial: Tensor, message: Tensor, layout: Layout) -> Tensor:
    """Log-probability (*batch) of all that was seen, nats, ``-inf`` where it is impossible.

    Args:
        initial: shape (*batch, S), nats; sizes of 1 broadcast.
        message: shape (*batch, S), nats, without gaps; takes up the probability of each initial state given all that was
            seen, which is the derivative of the result, and zero where that is impossible.
        layout: of the chains.
    """
    evidence = message.new_empty(layout.batch)
    if layout.chains:
        found = places(initial.shape, initial.stride(), False, layout, 1)
        _close(
            layout.states, LIKE[message.dtype], initial.data_ptr(), found.chains, found.inner[0],
            message.data_ptr(), evidence.data_ptr(),
        )  # fmt: skip
    return evidence
