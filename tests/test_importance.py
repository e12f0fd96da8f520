import closed_forms as cf
import numpy as np
import pytest
import torch

from symhmm.infer.importance import importance


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("spread", "draws"), [(0.3, 77), (1.0, 500), (2.0, 1000), (4.0, 2000)])
def test_smoothed_weights_are_those_of_arviz(spread, draws):
    import arviz

    x = spread * torch.randn(draws, generator=cf.generator(draws), dtype=cf.REAL)
    wanted, k = arviz.psislw(x.numpy())
    found = importance(x)
    assert found.k == pytest.approx(float(k), abs=1e-8)
    np.testing.assert_allclose(found.weights.numpy(), np.exp(wanted), rtol=1e-8, atol=1e-12)
    assert found.effective == pytest.approx(1 / np.exp(2 * wanted).sum(), rel=1e-8)
    assert found.reliable == (k < 0.7)


def test_equal_weights_and_too_few():
    equal = importance(torch.full((200,), 7.0))
    assert equal.effective == pytest.approx(200)
    assert equal.reliable
    few = importance(cf.real([0.0, 1.0, 2.0]))
    assert not few.reliable
    assert few.weights.sum().item() == pytest.approx(1.0)


def test_weighted_draws_have_the_moments_of_the_target():
    x = torch.randn(4000, generator=cf.generator(3), dtype=cf.REAL)
    log_weights = torch.distributions.Normal(0.3, 1.2).log_prob(x) - torch.distributions.Normal(0.0, 1.0).log_prob(x)
    w = importance(log_weights).weights
    mean = float(w @ x)
    assert mean == pytest.approx(0.3, abs=0.1)
    assert float(w @ (x - mean).square()) ** 0.5 == pytest.approx(1.2, abs=0.1)
