"""Chains of many states in which few moves are possible: left to right, in bands, semi-Markov, capture and recapture.

A move is impossible where its log-factor is ``-inf``. Which ones are is looked up in the numbers at each call, so that nobody
has to say so, and it is exact: a move that is left out has weight zero in the sum, and no gradient.
"""

import numpy as np
from torch import Tensor

from symhmm.chains.jit import kernel
from symhmm.chains.layout import Layout
from symhmm.chains.places import LIKE, places
from symhmm.chains.simd import numbers_at
from symhmm.chains.stage_tables import FEWEST, SPARSE
from symhmm.chains.staged import Call, call_for
from symhmm.chains.stages import Stage, Stages


@kernel
def _mark_possible(like, transition_at, starts, steps, t_time, t_from, t_to, size, most, possible):  # type: ignore[no-untyped-def]
    """Mark the moves [S * S] that are possible at some step of some chain; false as soon as there are more than ``most``."""
    transition, none, count = numbers_at(transition_at, like), -np.inf, 0
    for b in range(starts.size):
        for step in range(steps):
            at = starts[b] + step * t_time
            for s in range(size):
                for j in range(size):
                    if transition[at + s * t_from + j * t_to] != none and not possible[s * size + j]:
                        possible[s * size + j] = True
                        count += 1
                if count > most:
                    return False
    return True


def listed(transition: Tensor, emission: Tensor, terminal: Tensor, layout: Layout) -> Call | None:
    """How a batch of chains goes through a list of its possible moves; None where that would not pay.

    Args:
        transition: shape (*batch, n or 1, S, K), nats.
        emission: shape (*batch, n or 1, K), nats.
        terminal: shape (*batch, S), nats.
    """
    states, size = transition.shape[-2:]
    if states != size or size < FEWEST or layout.blocks > 1 or layout.chains == 0:
        return None
    found = places(transition.shape, transition.stride(), True, layout, 1)
    starts = found.chains[:1] if found.one_for_all else np.unique(found.chains)
    possible = np.zeros(size * size, np.bool_)
    steps = layout.length if found.time else 1
    most = int(SPARSE * size * size)
    if not _mark_possible(
        LIKE[transition.dtype], transition.data_ptr(), starts, steps, found.time, *found.inner, size, most, possible
    ):
        return None
    return call_for((transition, emission, terminal), layout.length, _plain(size), possible.tobytes())


def _plain(size: int) -> Stages:
    """One chain as the only stage of a step."""
    return Stages((size,), (Stage(1, (0, 1)),))
