"""Values of parameters, latents and subsamples: drawn once for all runs, inside their support."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

from symhmm.capture.inputs import Inputs, feasible_point, initial_latent, initial_param
from symhmm.errors import ValuesError


def test_given_values_come_first_and_others_are_made_once():
    made = []

    def default():
        made.append(1)
        return torch.tensor(2.0)

    inputs = Inputs({"a": torch.tensor(1.0)}, None)
    assert inputs.get("a", default) == 1 and not made
    assert inputs.get("b", default) == inputs.get("b", default) == 2 and made == [1]


def test_all_runs_draw_the_same_numbers_and_leave_none_behind():
    torch.manual_seed(0)
    wanted = torch.rand(3)
    torch.manual_seed(0)
    inputs, draws = Inputs(None, None), []
    for _ in range(2):
        inputs.restart()
        draws.append(torch.rand(3))
    inputs.finish()
    assert_close(draws[0], draws[1], rtol=0, atol=0)
    assert_close(torch.rand(3), wanted, rtol=0, atol=0)


def test_subsamples_are_drawn_anew_by_each_capture():
    torch.manual_seed(0)

    def capture():
        inputs = Inputs(None, None)
        inputs.restart()
        torch.rand(2)  # what the program draws besides
        first = inputs.subsample("plate", lambda: torch.randperm(1000)[:5])
        inputs.restart()
        again = inputs.subsample("plate", lambda: torch.randperm(1000)[:5])
        inputs.finish()
        return first, again

    (a, b), (c, _) = capture(), capture()
    assert torch.equal(a, b) and not torch.equal(a, c)
    held = Inputs(None, {"plate": [3, 1]})
    assert held.subsample("plate", lambda: torch.randperm(10)).tolist() == [3, 1]


def test_parameters_start_inside_their_constraint():
    given = torch.tensor([0.2, 0.8])
    found = initial_param("p", given, constraints.simplex)
    assert torch.equal(found, given) and found is not given
    assert_close(initial_param("p", torch.tensor([1.0, 3.0]), constraints.simplex), torch.tensor([0.25, 0.75]))
    with pytest.raises(ValuesError, match="'sd' lies outside its constraint"):
        initial_param("sd", torch.tensor(-1.0), constraints.positive)


def test_latents_start_at_the_mean_or_inside_the_support():
    assert_close(initial_latent(dist.Normal(torch.tensor([1.0, 2.0]), 1.0), torch.Size([2])), torch.tensor([1.0, 2.0]))
    # States of an outer site are averaged over.
    outer = dist.Normal(torch.tensor([[1.0], [3.0]]), 1.0)
    assert_close(initial_latent(outer, torch.Size([3])), torch.full((3,), 2.0))
    assert_close(initial_latent(dist.HalfCauchy(torch.tensor(1.0)), torch.Size([2])), torch.ones(2))
    assert initial_latent(dist.Gamma(torch.tensor(2.0).double(), 1.0), torch.Size([])).dtype == torch.float64


@pytest.mark.parametrize(
    "fn",
    [dist.Normal(0.0, 1.0), dist.Gamma(2.0, 1.0), dist.Beta(2.0, 1.0), dist.VonMises(0.0, 1.0), dist.Poisson(2.0),
     dist.Dirichlet(torch.ones(3)), dist.OneHotCategorical(torch.ones(3)), dist.LKJCholesky(3, 1.0),
     dist.Normal(torch.zeros(2), 1.0).to_event(1), dist.Pareto(2.0, 1.0), dist.Uniform(-3.0, -1.0)],
    ids=lambda fn: type(fn).__name__,
)  # fmt: skip
def test_there_is_a_point_in_every_support(fn):
    point = feasible_point(fn.support, torch.Size([4]) + fn.event_shape, torch.float32)
    full = point.expand(fn.event_shape)
    assert bool(fn.support.check(full).all()) and bool(fn.log_prob(full).isfinite().all())
