"""Random terms of a batch of chains, for property tests."""

import torch
from hypothesis import strategies as st
from torch import Tensor


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
