"""What is recorded of each kind of site."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch.testing import assert_close

from symhmm.capture.program import capture
from symhmm.testing import enumerate_joint

LOC = torch.tensor([-1.0, 1.0])


def test_roles_plates_and_families() -> None:
    def program(y):
        pyro.param("p", torch.tensor(1.0))
        with pyro.plate("outer", 2, dim=-2):
            u = pyro.sample("u", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            with pyro.plate("inner", 4, dim=-1):
                z = pyro.sample("z", dist.Categorical(torch.ones(3)))
                pyro.sample("y", dist.Normal(u[..., 0] + z, 1.0), obs=y)
        pyro.factor("penalty", u.sum())
        pyro.deterministic("twice", 2 * u)

    graph = capture(program, (torch.zeros(2, 4),))
    assert {f.name: f.role for f in graph.factors} == {
        "u": "continuous latent",
        "z": "discrete latent",
        "y": "observed",
        "penalty": "factor",
    }
    assert graph.recipe.max_plate_nesting == 2
    assert dict(graph.latents["u"].plates) == {"outer": -2}
    assert (graph.latents["u"].event_dim, graph.latents["u"].value.shape) == (1, (2, 1, 3))
    assert (graph.observed["y"].family, graph.observed["y"].shape) == ("Normal", (2, 4))
    assert graph.variables["z"].size == 3
    assert_close(graph.variables["z"].support, torch.arange(3))
    assert_close(graph.deterministic["twice"], 2 * graph.latents["u"].value)
    # The prior of z is the same for all members: it stands in its plates without being repeated over them.
    prior = next(f for f in graph.factors if f.name == "z")
    assert prior.inputs == {"z": 3} and set(prior.frames) == {"outer", "inner"}


def test_discrete_values_other_than_numbers() -> None:
    def program():
        z = pyro.sample("z", dist.OneHotCategorical(torch.tensor([0.2, 0.3, 0.5])))
        pyro.sample("y", dist.Normal(z @ torch.arange(3.0), 1.0), obs=torch.tensor(0.4))

    graph = capture(program)
    assert_close(graph.variables["z"].support, torch.eye(3))
    means = dist.Normal(torch.arange(3.0), 1.0).log_prob(torch.tensor(0.4))
    assert_close(enumerate_joint(graph), (torch.tensor([0.2, 0.3, 0.5]).log() + means).logsumexp(0))


def test_partly_observed_states() -> None:
    known = torch.tensor([True, False, True])
    states = torch.tensor([1, 0, 0])

    def program(y):
        with pyro.plate("data", 3):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])), obs=states, obs_mask=known)
            pyro.sample("y", dist.Normal(LOC[z], 1.0), obs=y)

    y = torch.randn(3)
    joint = torch.tensor([0.4, 0.6]).log() + dist.Normal(LOC, 1.0).log_prob(y[:, None])
    expected = joint[0, 1] + joint[1].logsumexp(0) + joint[2, 0]
    assert_close(enumerate_joint(capture(program, (y,))), expected)


def test_values_reach_networks() -> None:
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = PyroModule[torch.nn.Linear](2, 1)
            self.scale = PyroParam(torch.tensor(2.0), constraint=dist.constraints.positive)

        def forward(self, x, y):
            for t in pyro.markov(range(len(y))):
                pyro.sample(f"y_{t}", dist.Normal(self.linear(x[t])[0], self.scale), obs=y[t])

    net, x, y = Net(), torch.randn(6, 2), torch.randn(6)
    weight = torch.randn(1, 2, requires_grad=True)
    scale = torch.tensor(0.7, requires_grad=True)
    graph = capture(net, (x, y), values={"linear.weight": weight, "scale": scale})
    assert set(graph.params) == {"linear.weight", "linear.bias", "scale"}
    assert graph.loops["time"].tier == "vector"
    total = enumerate_joint(graph)
    expected = dist.Normal(x @ weight[0] + net.linear.bias, scale).log_prob(y).sum()
    assert_close(total, expected)
    for a, b in zip(*(torch.autograd.grad(v, [weight, scale]) for v in (total, expected)), strict=True):
        assert_close(a, b)


def test_a_module_registered_by_name() -> None:
    net = torch.nn.GRUCell(1, 2)
    names = [f"net$$${name}" for name, _ in net.named_parameters()]

    def program(y):
        pyro.module("net", net)
        pyro.sample("y", dist.Normal(net(torch.ones(1, 1)).sum(), 1.0), obs=y)

    values = {name: torch.zeros_like(p, requires_grad=True) for name, p in zip(names, net.parameters(), strict=True)}
    graph = capture(program, (torch.tensor(0.5),), values=values)
    assert set(graph.params) == set(names)
    assert_close(graph.factors[0].term.data, dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)))
    assert net.weight_ih.abs().sum() > 0


def test_a_random_effect_per_step_takes_its_values_by_name() -> None:
    def program(y):
        for t in pyro.markov(range(len(y))):
            u = pyro.sample(f"u_{t}", dist.Normal(0.0, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(u, 1.0), obs=y[t])

    y, u = torch.randn(6), torch.randn(6)
    graph = capture(program, (y,), values={f"u_{t}": u[t] for t in range(6)})
    assert set(graph.latents) == {f"u_{t}" for t in range(6)}
    assert graph.loops["time"].tier == "vector"
    expected = dist.Normal(0.0, 1.0).log_prob(u) + dist.Normal(u, 1.0).log_prob(y)
    assert_close(enumerate_joint(graph), expected.sum())


def test_masks_spare_discrete_latents() -> None:
    def program():
        with poutine.mask(mask=torch.tensor(False)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])))
            pyro.sample("y", dist.Normal(LOC[z], 1.0), obs=torch.tensor(0.0))

    first, second = capture(program).factors
    assert_close(first.term.data, torch.tensor([0.2, 0.8]).log())
    assert_close(second.term.data, torch.zeros(2))


def test_handlers_around_the_program() -> None:
    def program():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(u, 1.0), obs=torch.tensor(0.0))

    conditioned = capture(poutine.condition(program, data={"u": torch.tensor(2.0)}))
    below = dist.Normal(2.0, 1.0).log_prob(torch.tensor(0.0))
    assert not conditioned.latents
    assert_close(enumerate_joint(conditioned), below + dist.Normal(0.0, 1.0).log_prob(torch.tensor(2.0)))
    # An intervention cuts u from y; Pyro keeps the site u itself, at its own value.
    intervened = capture(poutine.do(program, data={"u": torch.tensor(2.0)}), values={"u": torch.tensor(0.5)})
    assert set(intervened.latents) == {"u"}
    assert_close(enumerate_joint(intervened), below + dist.Normal(0.0, 1.0).log_prob(torch.tensor(0.5)))
