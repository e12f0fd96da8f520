import closed_forms as cf
import pytest
import torch
from torch import nn

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.fitting import fit
from symhmm.infer import svi
from symhmm.infer.amortised import Amortised

REAL = cf.REAL


def network(inputs=1, outputs=2):
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).to(REAL)


def test_a_network_learns_the_posterior_means():
    """Posterior means are linear in the groups' means, which a linear network can say exactly."""
    y = cf.balanced()
    features = y.mean(1, keepdim=True) - y.mean()
    f = fit(
        cf.random_intercept,
        y,
        method="svi",
        guide=Amortised(network(), features),
        steps=900,
        cooldown=400,
        evaluate=100,
    )
    loc, tau = f.values["loc"].item(), f.values["tau"].item()
    mean, sd = cf.random_intercept_posterior(y, loc, tau)
    torch.testing.assert_close(f.estimate.posterior.blocks[0].loc[:, 0], mean, rtol=0, atol=0.05)
    assert f.estimate.posterior.sd[-len(y) :].tolist() == pytest.approx([sd] * len(y), rel=0.1)
    assert tau == pytest.approx(cf.random_intercept_maximum(y)[1], rel=0.05)
    assert f.objective == pytest.approx(cf.random_intercept_marginal(y, loc, tau), abs=0.1)


def test_free_numbers_are_the_weights():
    y = cf.balanced()
    goal = svi.target(compile(cf.random_intercept, y), {}, "svi")
    net = network()
    state = svi.init(goal, svi.Options(guide=Amortised(net, y[:, :1]), restarts=1))
    assert state.guide.size == 2 + 4
    assert torch.equal(state.phi[2:4], net.weight.detach().reshape(-1))
    before = net.weight.detach().clone()
    svi.step(state, svi.Options())
    assert torch.equal(net.weight, before)


def test_wrong_output_and_unknown_plates_are_refused():
    y = cf.balanced()
    with pytest.raises(FitError, match=r"returns shape \(12, 3\)(.|\n)*last layer of 2 outputs"):
        fit(cf.random_intercept, y, method="svi", guide=Amortised(network(1, 3), y[:, :1]))
    with pytest.raises(FitError, match="'herd' was named"):
        fit(cf.random_intercept, y, method="svi", guide=Amortised(network(), y[:, :1], plate="herd"))
