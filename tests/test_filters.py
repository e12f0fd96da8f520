"""Forward filters of chains: every prefix against the sequential reference, and gradients against those of autograd."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains.filters import prefix_weights
from symhmm.semiring import log_sum_exp

EXACT = {"rtol": 1e-11, "atol": 1e-11}


def by_hand(start, transition, emission, now_transition, now_emission, length):
    """One step after the other, in log space."""
    states, size = transition.shape[-2:]
    a, out = start, []
    for t in range(length):
        moves = [
            x[..., t % x.shape[-3], :, :] + e[..., t % e.shape[-2], None, :]
            for x, e in ((transition, emission), (now_transition, now_emission))
        ]
        out.append(log_sum_exp((a.unsqueeze(-1) + moves[1]).flatten(-2), -1))
        flow = (a.unsqueeze(-1) + moves[0]).unflatten(-2, (size, states // size))
        a = log_sum_exp(flow, -3).flatten(-2)
    return torch.stack(torch.broadcast_tensors(*out), -1)


def terms(history, constant, far=0.0, size=3, length=6):
    g = torch.Generator().manual_seed(history)
    states = size**history
    transition = torch.randn(2, 1, 1 if constant else length, states, size, generator=g, dtype=torch.float64)
    transition[0, 0, 0, 0, 1] = -torch.inf
    emission = torch.randn(1, 4, length, size, generator=g, dtype=torch.float64)
    emission[0, 1, 2:4, 0] -= far
    emission[0, 2, 3, 1] = -torch.inf
    return torch.randn(2, 1, states, generator=g, dtype=torch.float64), transition, emission


@pytest.mark.parametrize("far", [0.0, 900.0])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("history", [1, 2])
def test_weights_and_gradients(history, constant, far):
    start, transition, emission = terms(history, constant, far)
    for now in (emission, torch.zeros_like(emission), 0.5 * emission.clamp_min(-5.0)):
        leaves = [transition.clone().requires_grad_(), now.detach().clone().requires_grad_()]
        found = prefix_weights(start, transition, emission, *leaves, 6)
        copies = [x.detach().clone().requires_grad_() for x in leaves]
        wanted = by_hand(start, transition, emission, *copies, 6)
        assert_close(found, wanted, **EXACT)
        weight = torch.rand(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for mine, theirs in zip(
            torch.autograd.grad((weight * found).sum(), leaves), torch.autograd.grad((weight * wanted).sum(), copies),
            strict=True,
        ):  # fmt: skip
            assert_close(mine, theirs, **EXACT)


def test_the_same_terms_are_not_run_twice_and_give_the_same():
    start, transition, emission = terms(1, True)
    leaf = emission.detach().requires_grad_()
    found = prefix_weights(start, transition, emission, transition, leaf, 6)
    other = prefix_weights(start, transition, emission, transition.clone(), emission.clone(), 6)
    assert_close(found, other, **EXACT)
    (p,) = torch.autograd.grad(found.sum(), leaf)
    assert_close(p.sum(-1), torch.full((1, 4, 6), 2.0, dtype=torch.float64), **EXACT)


def test_what_is_left_behind_by_a_thousand_nats_is_not_lost():
    """Left to right: state 0 is a thousand nats worse, and then the only one that explains the last step."""
    transition = torch.tensor([[[0.0, 0.0], [-torch.inf, 0.0]]], dtype=torch.float64)
    emission = torch.tensor([[-1000.0, 0.0], [-1000.0, 0.0], [0.0, -torch.inf]], dtype=torch.float64)
    found = prefix_weights(torch.zeros(2, dtype=torch.float64), transition, emission, transition, emission, 3)
    assert found[-1].item() == pytest.approx(-2000.0, abs=1e-9)


def test_impossible_data_are_minus_infinity_and_nan_stays():
    transition, emission = torch.zeros(1, 2, 2), torch.zeros(4, 2)
    emission[2] = -torch.inf
    found = prefix_weights(torch.zeros(2), transition, emission, transition, emission, 4)
    assert found[:2].isfinite().all() and (found[2:] == -torch.inf).all()
    emission[1, 0] = torch.nan
    found = prefix_weights(torch.zeros(2), transition, emission, transition, emission, 4)
    assert found[1].isnan() and not found[1:].isfinite().any()


@pytest.mark.parametrize("far", [0.0, 900.0])
@pytest.mark.parametrize("history", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_probabilities_that_are_kept_are_the_gradient_of_the_emission(history, far, shared):
    """Asked about the emission alone nothing runs twice, chains in logarithms included; sizes of 1 are added up."""
    start, transition, emission = terms(history, True, far)
    now = emission[:, :1, :1].clone() if shared else emission.clone()
    leaf, copy = now.detach().requires_grad_(), now.detach().clone().requires_grad_()
    found = prefix_weights(start, transition, emission, transition, leaf, 6)
    wanted = by_hand(start, transition, emission, transition, copy, 6)
    assert_close(found, wanted, **EXACT)
    weight = torch.rand(found.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (mine,) = torch.autograd.grad((weight * found).sum(), leaf)
    (theirs,) = torch.autograd.grad((weight * wanted).sum(), copy)
    assert_close(mine, theirs, **EXACT)
