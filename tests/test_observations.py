"""Observed values: masked ones never matter, the others are checked, and the text says what is wrong."""

from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

from symhmm.capture.names import Names
from symhmm.capture.observations import check_mask, check_shape, check_values, checked_at_once, masked_log_prob
from symhmm.capture.time_index import Level
from symhmm.errors import DataError, ShapeError

NAN = float("nan")


def plate(name, size, dim):
    return SimpleNamespace(name=name, size=size, dim=dim)


def test_masked_values_leave_no_trace_in_value_or_gradient():
    scale = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    fn, mask = dist.Exponential(scale), torch.tensor([True, False, False])
    for other in (NAN, -5.0, float("inf")):
        value = torch.tensor([0.5, other, other], dtype=torch.float64)
        found = masked_log_prob(fn, value, mask, replace=True)
        assert_close(found, torch.tensor([-0.5, 0.0, 0.0], dtype=torch.float64))
        (slope,) = torch.autograd.grad(found.sum(), scale)
        assert_close(slope, torch.tensor([0.5, 0.0, 0.0], dtype=torch.float64))


def test_masks_of_vectors_and_masks_that_are_no_tensors():
    fn = dist.Normal(torch.zeros(2, 3), 1.0).to_event(1)
    value = torch.tensor([[0.0, 0.0, 0.0], [NAN, 0.0, 0.0]])
    found = masked_log_prob(fn, value, torch.tensor([True, False]), replace=True)
    assert_close(found, torch.tensor([3 * dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.0)), 0.0]))
    assert masked_log_prob(fn, value, False, replace=True) == 0
    assert torch.equal(masked_log_prob(fn, value[:1], None, replace=True), fn.log_prob(value[:1]))


def test_masks_fit_their_plates():
    fn, plates = dist.Normal(torch.zeros(4, 3), 1.0), {-1: plate("animal", 3, -1), -2: plate("day", 4, -2)}
    check_mask("y", torch.ones(4, 3).bool(), fn, plates, 2)
    check_mask("y", torch.ones(3).bool(), fn, plates, 2)
    check_mask("y", torch.ones(7, 1, 3).bool(), fn, plates, 2)  # what is left of the plates may be states
    with pytest.raises(ShapeError, match=r"mask of site 'y'[\s\S]*seen \(4,\)[\s\S]*'animal' of size 3 at dim -1"):
        check_mask("y", torch.ones(4).bool(), fn, plates, 2)


def test_values_fit_their_plates():
    check_shape("y", torch.zeros(4, 3, 2), 1, [plate("animal", 3, -1), plate("day", 4, -2)])
    check_shape("y", torch.zeros(1, 3), 0, [plate("animal", 3, -1), plate("day", 4, -2)])
    with pytest.raises(ShapeError, match=r"do not fit plate 'day'[\s\S]*size 5 at dim -3 of \(5, 3, 2\), wanted 4"):
        check_shape("y", torch.zeros(5, 3, 2), 1, [plate("animal", 3, -1), plate("day", 4, -2)])


def test_what_is_not_masked_is_checked():
    fn = dist.Exponential(torch.ones(3))
    mask = torch.tensor([True, True, False])
    check_values("y", fn, torch.tensor([1.0, 2.0, NAN]), mask, [])
    check_values("y", fn, torch.tensor([1.0, 2.0, -1.0]), mask, [])
    with pytest.raises(DataError, match="'y' contain 2 unmasked NaN"):
        check_values("y", fn, torch.tensor([NAN, NAN, NAN]), mask, [])
    with pytest.raises(DataError, match="'y' contain 1 unmasked values outside the support"):
        check_values("y", fn, torch.tensor([1.0, -2.0, -1.0]), mask, [])


def test_a_support_may_be_left_in_some_states_but_not_in_all():
    upper = torch.tensor([[1.0], [5.0]])  # states, members
    fn = dist.Uniform(torch.zeros(2, 1), upper)
    check_values("y", fn, torch.tensor([0.5, 3.0]), None, [])
    with pytest.raises(DataError, match="contain 1 unmasked values"):
        check_values("y", fn, torch.tensor([0.5, 7.0]), None, [])


def test_all_steps_are_checked_at_once():
    level = Level("loop", 4, 1, Names(), object())
    rows = torch.tensor([[1.0, 2.0], [NAN, 3.0], [1.0, 1.0], [NAN, 2.0]])
    seen = ~rows.isnan()
    with level.active():
        y, mask = level.batch(rows), level.batch(seen)
        check_values("y", dist.Exponential(torch.ones(2)), y, mask, [level])
        with pytest.raises(DataError, match="contain 2 unmasked NaN"):
            check_values("y", dist.Exponential(torch.ones(2)), y, None, [level])
        with pytest.raises(DataError, match="contain 3 unmasked values"):
            check_values(
                "y", dist.Exponential(torch.ones(2)), level.batch(rows.nan_to_num(1.0) - 2.5), seen[1], [level]
            )


def test_supports_made_of_others_are_checked_in_concrete_steps_only():
    assert checked_at_once(constraints.positive) and checked_at_once(constraints.simplex)

    class Own(constraints.Constraint):
        pass

    assert not checked_at_once(Own())
