"""Random terms of a batch of chains for property tests, and all their paths one by one."""

import itertools

import torch
from hypothesis import strategies as st
from torch import Tensor

from symhmm.semiring import LOG, MAX


def random_terms(draw, full, length, generator, holes):
    """A function that draws a term: some of the batch ``full``, time or none, ``-inf`` in a share ``holes`` of its entries."""

    def term(*event: int, timed: bool) -> Tensor:
        batch = [n if draw(st.booleans()) else 1 for n in full][draw(st.integers(0, len(full))) :]
        time = [length if draw(st.booleans()) else 1] if timed else []
        x = torch.randn(*batch, *time, *event, dtype=torch.float64, generator=generator) * 2
        # A layout of memory other than the usual one.
        x = x.transpose(0, -1).contiguous().transpose(0, -1) if draw(st.booleans()) else x
        x[torch.rand(x.shape, generator=generator) < holes] = -torch.inf
        return x.requires_grad_()

    return term


@st.composite
def chains(draw, max_length=5):
    size, history = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    length = draw(st.integers(0, max_length if size**history < 9 else 3))
    full = draw(st.lists(st.integers(1, 3), max_size=2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    holes = draw(st.sampled_from([0.0, 0.0, 0.2, 0.6]))

    term = random_terms(draw, full, length, generator, holes)
    states = size**history
    terms = [term(states, timed=False), term(states, size, timed=True), term(size, timed=True)]
    return [*terms, term(states, timed=False)], length, history


def every_path(initial: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, length: int, history: int):
    """The oracle: the largest and the log-sum of the log-weights of all paths, from the first known state on."""
    states, size = transition.shape[-2:]
    weights = []
    for s in range(states):
        for path in itertools.product(range(size), repeat=length):
            now, weight = s, initial[..., s]
            for t, x in enumerate(path):
                f, e = min(t, transition.shape[-3] - 1), min(t, emission.shape[-2] - 1)
                weight = weight + transition[..., f, now, x] + emission[..., e, x]
                now = now * size % states + x
            weights.append(weight + terminal[..., now])
    batch = torch.broadcast_shapes(initial.shape[:-1], transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    together = torch.stack([w.expand(batch) for w in weights], -1)
    best = together.detach().amax(-1)
    total = together.where(best[..., None] > -torch.inf, 0).logsumexp(-1)
    return {LOG: total.where(best > -torch.inf, -torch.inf), MAX: best}
