"""Marginalised programs: ordinary Pyro programs, equal to the density, under Pyro's own algorithms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

import symhmm

N, T = 4, 6


@pytest.fixture(autouse=True)
def clean():
    pyro.clear_param_store()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def model(y):
    """A hidden Markov model with a random intercept and a prior on its locations."""
    stay = pyro.param("stay", torch.tensor(0.8), constraint=constraints.unit_interval)
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).to_event(1))
    transition = torch.stack([torch.stack([stay, 1 - stay]), torch.stack([1 - stay, stay])])
    with pyro.plate("individual", N, dim=-1):
        shift = pyro.sample("shift", dist.Normal(0.0, 0.5))
        z = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]), infer={"enumerate": "parallel"})
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[..., z] + shift, 1.0), obs=y[t])


def data():
    return torch.randn(T, N, generator=torch.Generator().manual_seed(3))


def latents():
    return {"loc": torch.tensor([-0.5, 0.7]), "shift": torch.linspace(-1, 1, N)}


def test_trace_is_the_density():
    y, values = data(), latents()
    trace = pyro.poutine.trace(pyro.poutine.condition(symhmm.marginalize(model), values)).get_trace(y)
    assert [n for n, s in trace.nodes.items() if s["type"] in ("sample", "param")] == [
        "stay", "loc", "individual", "shift", "log_marginal",
    ]  # fmt: skip
    wanted = symhmm.compile(model, y).log_prob({"stay": torch.tensor(0.8), **values})
    torch.testing.assert_close(trace.log_prob_sum(), wanted, rtol=1e-10, atol=0)


def loss_and_gradients(program, elbo, y, guide):
    pyro.clear_param_store()
    with pyro.poutine.trace(param_only=True) as capture:
        loss = elbo.differentiable_loss(program, guide, y)
    params = {n: s["value"].unconstrained() for n, s in capture.trace.nodes.items()}
    return loss, dict(zip(params, torch.autograd.grad(loss, params.values()), strict=True))


def delta_guide(y):
    pyro.sample("loc", dist.Delta(pyro.param("loc_point", latents()["loc"]), event_dim=1))
    with pyro.plate("individual", N, dim=-1):
        pyro.sample("shift", dist.Delta(pyro.param("shift_point", latents()["shift"])))


def test_svi_loss_and_gradients_equal_enumeration():
    y = data()
    seen, seen_gradients = loss_and_gradients(symhmm.marginalize(model), Trace_ELBO(), y, delta_guide)
    wanted, wanted_gradients = loss_and_gradients(model, TraceEnum_ELBO(max_plate_nesting=1), y, delta_guide)
    torch.testing.assert_close(seen, wanted, rtol=1e-10, atol=0)
    assert set(seen_gradients) == {"stay", "loc_point", "shift_point"}
    for name in wanted_gradients:
        torch.testing.assert_close(seen_gradients[name], wanted_gradients[name], rtol=1e-9, atol=1e-10)


def test_vectorised_particles_are_independent():
    y, marginal = data(), symhmm.marginalize(model)
    values = {"loc": torch.randn(3, 1, 2), "shift": torch.randn(3, N)}
    with pyro.plate("particles", 3, dim=-2):
        trace = pyro.poutine.trace(pyro.poutine.condition(marginal, values)).get_trace(y)
    trace.compute_log_prob()
    seen = trace.nodes["log_marginal"]["log_prob"].reshape(3)
    density = symhmm.compile(model, y)
    for k in range(3):
        one = {"stay": torch.tensor(0.8), "loc": values["loc"][k, 0], "shift": values["shift"][k]}
        prior = dist.Normal(torch.tensor([-1.0, 1.0]), 1.0).log_prob(one["loc"]).sum()
        prior = prior + dist.Normal(0.0, 0.5).log_prob(one["shift"]).sum()
        torch.testing.assert_close(seen[k], density.log_prob(one) - prior, rtol=1e-10, atol=0)


@pytest.mark.parametrize("vectorize", [False, True])
def test_autoguide_svi_and_predictive_run(vectorize):
    y, marginal = data(), symhmm.marginalize(model)
    guide = AutoNormal(marginal)
    svi = SVI(
        marginal,
        guide,
        pyro.optim.Adam({"lr": 0.05}),
        Trace_ELBO(num_particles=2, vectorize_particles=vectorize, max_plate_nesting=1),
    )
    losses = [svi.step(y) for _ in range(15)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert sum(losses[-5:]) < sum(losses[:5])
    draws = Predictive(marginal, guide=guide, num_samples=3, parallel=vectorize)(y)
    assert draws["shift"].shape[0] == 3 and draws["shift"].shape[-1] == N


def test_autodelta_finds_the_joint_maximum():
    # Two switches in five steps: the maximum lies inside, for any start.
    y = 0.3 * data() + torch.tensor([2.0, 2.0, -2.0, -2.0, -2.0, 2.0])[:, None]
    marginal = symhmm.marginalize(model)
    guide = AutoDelta(marginal)
    svi = SVI(marginal, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(120):
        svi.step(y)
    point = {"stay": pyro.param("stay").detach(), **{k: v.detach() for k, v in guide.median(y).items()}}
    best = symhmm.fit(model, y, method="map", restarts=1)
    density = best.density
    assert density.log_prob(best.values) >= density.log_prob(point)
    assert density.log_prob(best.values) - density.log_prob(point) < 0.05


def test_nuts_runs_on_it():
    torch.manual_seed(0)
    kernel = NUTS(symhmm.marginalize(model), max_tree_depth=2)
    chain = MCMC(kernel, num_samples=4, warmup_steps=4, disable_progbar=True)
    chain.run(data())
    assert chain.get_samples()["shift"].shape == (4, N)
    assert set(chain.get_samples()) == {"loc", "shift"}


def test_latents_of_each_step_are_statements_of_each_step():
    def drifting(y):
        z = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            e = pyro.sample(f"e_{t}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(e + z, 1.0), obs=y[t])

    y = data()[:, 0]
    values = {f"e_{t}": torch.tensor(0.1 * t) for t in range(T)}
    trace = pyro.poutine.trace(pyro.poutine.condition(symhmm.marginalize(drifting), values)).get_trace(y)
    torch.testing.assert_close(trace.log_prob_sum(), symhmm.compile(drifting, y).log_prob(values), rtol=1e-10, atol=0)
