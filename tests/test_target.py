"""What drivers capture: played from tapes, numbers of one's own, and what data alone decide made once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

import symhmm
from symhmm.compiler.step import Step
from symhmm.compiler.taped import TapedStep
from symhmm.infer.laplace_members import members
from symhmm.infer.target import target, value_and_gradient

Y = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(y):
    loc = pyro.param("loc", torch.tensor([-1.0, 1.0], dtype=y.dtype))
    tau = pyro.param("tau", torch.tensor(0.7, dtype=y.dtype), constraints.positive)
    rows = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=y.dtype)
    with pyro.plate("n", y.shape[1], dim=-1):
        d = pyro.sample("d", dist.Normal(torch.zeros((), dtype=y.dtype), tau))
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z] + d, 1.0), obs=y[t])


@pytest.fixture(scope="module")
def density():
    return symhmm.compile(model, Y)


def test_gradients_beside_fixed_values_are_played_and_their_constants_made_once(density, monkeypatch):
    goal = target(density, {"tau": 0.4}, "mle")
    made, own = [], Step.constants
    monkeypatch.setattr(Step, "constants", lambda self, data: made.append(self) or own(self, data))
    x = goal.x + 0.2
    value, gradient = goal.evaluate(x)
    once = len(made)
    again = goal.evaluate(x)[1]
    assert len(made) == once
    wanted, slope = value_and_gradient(lambda u: density.log_prob(goal.values(goal.embed(u))), torch.from_numpy(x))
    assert value == pytest.approx(wanted.item(), rel=1e-12)
    assert_close(torch.from_numpy(gradient), slope, rtol=1e-10, atol=1e-10)
    assert (again == gradient).all()
    assert isinstance(goal._steps["fixed"][0], TapedStep)


def test_what_is_captured_for_several_inputs_is_nobody_elses(density):
    goal = target(density, {}, "svi")

    def f(v, w):
        value, slope = value_and_gradient(lambda v: (density.log_prob(density.unpack(v)) * w).sum(), v)
        return value, slope

    v, w = goal.start.clone(), torch.tensor([1.0, 2.0], dtype=torch.float64)
    replay = goal.captured("weighted", f, (v, w))
    first = replay(v, w)
    kept = [x.clone() for x in first]
    second = replay(v + 0.1, w)
    second[1].zero_()
    assert_close(list(first), kept)
    assert_close(list(replay(v - 0.2, w + 1)), list(f(v - 0.2, w + 1)), rtol=1e-10, atol=1e-10)
    # They may take part in derivatives again.
    free = torch.ones_like(v).requires_grad_()
    assert_close(torch.autograd.grad((free * first[1]).sum(), free)[0], first[1])
    assert isinstance(goal._steps["weighted"][0], TapedStep)


def test_terms_of_members_and_their_gradients_are_played(density):
    made = members(density)
    theta = made.flat(density.initial()).detach() + 0.1
    points = torch.randn(4, 3, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.rand(4, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    free = theta.clone().requires_grad_(), points.clone().requires_grad_()
    terms = torch.stack([made.terms(free[0], u) for u in free[1]])
    value, slope = made.slope(theta, points)
    assert_close([made.value(theta, points), value], [terms.detach()] * 2, rtol=1e-10, atol=1e-10)
    wanted = torch.autograd.grad(terms.sum(), free[1], retain_graph=True)[0]
    assert_close(slope, wanted, rtol=1e-10, atol=1e-10)
    gradients = torch.autograd.grad((weight * terms).sum(), free)
    assert_close(made.weighted(theta, points, weight), gradients, rtol=1e-10, atol=1e-10)
    assert {what for what, _ in made._steps} == {"value", "slope", "weighted"}
    assert all(isinstance(step, TapedStep) for (what, _), (step, _) in made._steps.items() if what != "value")
