"""Chains done one by one: what vectors of states may get wrong, against the recursion in log space."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import whole
from symhmm.chains.operator import chain_evidence
from symhmm.chains.prepared import prepared


@pytest.mark.parametrize("size", [16, 21])
@pytest.mark.parametrize("dtype, gap", [(torch.float64, 2000.0), (torch.float32, 300.0)])
def test_a_state_whose_emission_is_too_small_for_a_number_is_lost_and_not_impossible(dtype, gap, size):
    """Only the state that is out of the question by itself has a way to the end."""
    transition = torch.full((size, size), -torch.inf, dtype=dtype).fill_diagonal_(-0.5)
    emission = torch.zeros(1, 5, size, dtype=dtype)
    emission[:, 2, 0] = -gap
    terminal = torch.zeros(1, size, dtype=dtype)
    terms = transition[None, None], emission, terminal
    strides = tuple(x.stride() for x in terms)
    assert whole._ordered(prepared(tuple(x.shape for x in terms), strides, dtype, 5)).singles == 1
    initial = torch.full((1, size), -torch.inf, dtype=dtype)
    initial[:, 0] = 0
    transition[:, 0] = -1.5  # too many moves for a list of them
    transition[0, 1:] = -torch.inf
    inputs = [x.double().requires_grad_() for x in (initial, *terms)]
    wanted = chain_evidence(*inputs, length=5, strategy="sequential")
    gradient = torch.autograd.grad(wanted.sum(), inputs)
    assert_close(wanted, torch.tensor([-gap - 7.5], dtype=torch.float64))
    seen = torch.ops.symhmm.chain_evidence_gradient(initial, *terms, None, 5)
    for x, w in zip(seen, (wanted.detach(), *gradient), strict=True):
        assert_close(x.double(), w, rtol=1e-6 if dtype == torch.float32 else 1e-12, atol=1e-6)
