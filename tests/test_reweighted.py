import closed_forms as cf
import pytest
import torch

from symhmm.tables.results import Normal, Posterior
from symhmm.tables.reweighted import Reweighted


@pytest.fixture
def posterior():
    generator = cf.generator(1)
    draws = torch.randn(1000, 3, generator=generator, dtype=cf.REAL)
    draws[:, 0] = 5.0  # a parameter
    weights = draws[:, 1].exp()  # a normal density with mean one in place of zero
    block = Normal((), torch.tensor([[1, 2]]), torch.zeros(1, 2, dtype=cf.REAL), torch.eye(2, dtype=cf.REAL)[None])
    return Reweighted(Posterior(cf.real([5.0, 0.0, 0.0]), (block,)), draws, weights / weights.sum())


def test_moments_are_weighted(posterior):
    torch.testing.assert_close(posterior.vector, cf.real([5.0, 1.0, 0.0]), rtol=0, atol=0.15)
    torch.testing.assert_close(posterior.sd, cf.real([0.0, 1.0, 1.0]), rtol=0, atol=0.12)
    assert posterior.sd[0] == 0
    assert posterior.blocks == posterior.guide.blocks


def test_draws_come_as_often_as_their_weights_say(posterior):
    drawn = posterior.sample(5000, seed=3)
    assert torch.equal(drawn, posterior.sample(5000, seed=3))
    assert not torch.equal(drawn, posterior.sample(5000, seed=4))
    often = (drawn[:, 1, None] == posterior.draws[None, :, 1]).sum(0)
    # Each as often as expected, up to one.
    assert ((often - 5000 * posterior.weights).abs() < 1).all()
    half = drawn[:2500, 1].mean() - drawn[2500:, 1].mean()
    assert half.abs() < 0.15  # the order says nothing


def test_coordinates_can_be_permuted(posterior):
    source = torch.tensor([2, 0, 1])
    other = posterior.permuted(source)
    assert torch.equal(other.sample(20), posterior.sample(20)[:, source])
    assert torch.equal(other.vector, posterior.vector[source])
    assert torch.equal(other.sd, posterior.sd[source])
