"""Test programs that use more of Pyro: handlers, factors, networks, subsampling, other discrete distributions."""

import pyro
import pyro.distributions as dist
import torch
from program_table import Rows, binary, normal, row
from programs_chains import chain_params, hmm
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from pyro.ops.indexing import Vindex
from torch import nn
from torch.distributions import constraints

ROWS: Rows = []


def emission_net(outputs: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


@row(ROWS, "neural emissions", lambda: (normal(6), emission_net()))
def neural(y, net):
    net = pyro.module("net", net)
    _, transition, _ = chain_params()
    z, last = torch.tensor(0), torch.zeros(())
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(transition)[z]))
        one_hot = (z.unsqueeze(-1) == torch.arange(3)).to(y.dtype)
        features = torch.cat([one_hot, last.expand(one_hot.shape[:-1]).unsqueeze(-1)], -1)
        last = pyro.sample(f"y_{t}", dist.Normal(net(features).squeeze(-1), 1.0), obs=y[t])


@row(ROWS, "neural transitions from covariates", lambda: (normal(6), normal(6, 4, seed=2), emission_net(9)))
def neural_transitions(y, x, net):
    pyro.module("net", net)
    _, _, loc = chain_params()
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        logits = net(x[t]).reshape(3, 3)
        z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[z, :]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(
    ROWS,
    "network over tones in ragged sequences",
    lambda: (binary(3, 5, 4), torch.tensor([5, 2, 4]), emission_net(4)),
    nesting=2,
)
def neural_tones(y, lengths, net):
    pyro.module("net", net)
    table = pyro.param("table", lambda: torch.rand(3, 3), constraint=constraints.simplex)
    bias = pyro.param("bias", lambda: torch.randn(3, 4))
    with pyro.plate("sequences", len(y), dim=-2) as batch:
        lengths, x, last = lengths[batch], torch.tensor(0), torch.zeros(4)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(table)[x]))
                with pyro.plate(f"tones_{t}", 4, dim=-1) as tones:
                    logits = net(last) + Vindex(bias)[x, tones]
                    last = pyro.sample(f"y_{t}", dist.Bernoulli(logits=logits), obs=y[batch, t])


class Chain(PyroModule):
    """A PyroModule with a constrained parameter, a plain network and the model as its forward method."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = PyroParam(torch.full((3, 3), 1.0 / 3.0, dtype=torch.float64), constraint=constraints.simplex)
        self.mean = PyroModule[nn.Linear](3, 1).double()

    def forward(self, y):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(self.table)[z]))
            loc = self.mean(torch.eye(3)[z]).squeeze(-1)
            pyro.sample(f"y_{t}", dist.Normal(loc, 1.0), obs=y[t])


@row(ROWS, "PyroModule", lambda: (Chain(), normal(6)))
def pyro_module(chain, y):
    chain(y)


@row(ROWS, "condition outside", lambda: (normal(5),), tier="stacked")
def conditioned(y):
    def program():
        initial, transition, loc = chain_params()
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0))

    poutine.condition(program, data={f"y_{t}": y[t] for t in range(len(y))})()


@row(ROWS, "one state known by condition", lambda: (normal(6),))
def state_conditioned(y):
    poutine.condition(hmm, data={"z_0": torch.tensor(1)})(y)


@row(ROWS, "do on a continuous site", lambda: (normal(6),))
def intervened(y):
    def program():
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        hmm(y + shift)

    poutine.do(program, data={"shift": torch.tensor(0.7)})()


@row(ROWS, "observation hidden by block", lambda: (normal(6),))
def blocked(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])
        with poutine.block():
            pyro.sample(f"hidden_{t}", dist.Normal(0.0, 1.0))


@row(ROWS, "scaled program", lambda: (normal(6),))
def scaled(y):
    with poutine.scale(scale=0.25):
        hmm(y)


@row(ROWS, "scaled prior beside the chain", lambda: (normal(6),))
def scaled_prior(y):
    with poutine.scale(scale=3.0):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    hmm(y + shift)


@row(ROWS, "prior switched off by mask", lambda: (normal(6),))
def masked_prior(y):
    with poutine.mask(mask=False):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
    hmm(y + shift)


@row(ROWS, "factor and deterministic in the loop", lambda: (normal(6),))
def factors(y):
    initial, transition, loc = chain_params()
    penalty = pyro.param("penalty", torch.tensor(0.1))
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        mean = pyro.deterministic(f"mean_{t}", loc[z])
        pyro.factor(f"penalty_{t}", -penalty * mean**2)
        pyro.sample(f"y_{t}", dist.Normal(mean, 1.0), obs=y[t])


@row(ROWS, "factor between neighbouring states", lambda: (normal(6),))
def neighbour_factor(y):
    initial, transition, loc = chain_params()
    cost = pyro.param("cost", lambda: torch.randn(3, 3))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        before = z
        z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(transition)[z] if t > 0 else initial))
        pyro.factor(f"cost_{t}", Vindex(cost)[before, z])
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[t])


@row(ROWS, "subsampled sequences", lambda: (normal(6, 5), torch.tensor([4, 0, 3])), nesting=1)
def subsampled(y, chosen):
    initial, transition, loc = chain_params()
    with pyro.plate("sequences", len(y), subsample=chosen, dim=-1) as batch:
        z = None
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[batch, t])


@row(ROWS, "subsampled mixture", lambda: (normal(8), torch.tensor([1, 6, 2, 5])), nesting=1, tier="none")
def subsampled_mixture(y, chosen):
    weights = pyro.param("weights", lambda: torch.rand(2), constraint=constraints.simplex)
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y), subsample=chosen, dim=-1) as batch:
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[k], 1.0), obs=y[batch])


@row(ROWS, "Bernoulli states", lambda: (normal(7),))
def bernoulli_states(y):
    go = pyro.param("go", lambda: torch.rand(2), constraint=constraints.unit_interval)
    loc = pyro.param("loc", lambda: torch.randn(2))
    z = torch.tensor(0.0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(go[0] + (go[1] - go[0]) * z))
        pyro.sample(f"y_{t}", dist.Normal(loc[0] * (1 - z) + loc[1] * z, 1.0), obs=y[t])


@row(ROWS, "Binomial states", lambda: (normal(6),))
def binomial_states(y):
    rate = pyro.param("rate", torch.tensor(0.3))
    z = torch.tensor(1.0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Binomial(3, logits=rate * z - 0.5))
        pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])


@row(ROWS, "one-hot states", lambda: (normal(6),))
def one_hot_states(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.OneHotCategorical(initial if z is None else z @ transition))
        pyro.sample(f"y_{t}", dist.Normal(z @ loc, 1.0), obs=y[t])


@row(ROWS, "one-hot states in a plate", lambda: (normal(2, 5),), nesting=1, per="sequence")
def one_hot_plate(y):
    _, transition, loc = chain_params()
    with pyro.plate("sequence", len(y), dim=-1):
        z = torch.tensor([1.0, 0.0, 0.0])
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.OneHotCategorical(z @ transition))
            pyro.sample(f"y_{t}", dist.Normal(z @ loc, 1.0), obs=y[:, t])


@row(ROWS, "a pair of switches as one latent", lambda: (normal(5),), tier="none")
def vector_event(y):
    rates = pyro.param("rates", lambda: torch.rand(5, 2), constraint=constraints.unit_interval)
    weights = pyro.param("weights", lambda: torch.randn(2))
    for i in range(len(y)):
        on = [pyro.sample(f"on_{i}_{j}", dist.Bernoulli(rates[i, j])) for j in range(2)]
        pyro.sample(f"y_{i}", dist.Normal(on[0] * weights[0] + on[1] * weights[1], 1.0), obs=y[i])


@row(ROWS, "continuous autoregressive latent given", lambda: (normal(6),))
def continuous_chain(y):
    slope = pyro.param("slope", torch.tensor(0.7))
    x = torch.zeros(())
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(slope * x, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


@row(ROWS, "switching linear dynamics given", lambda: (normal(6),))
def switching(y):
    initial, transition, _ = chain_params(2)
    slope = pyro.param("slope", lambda: torch.rand(2))
    x, z = torch.zeros(()), None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
        x = pyro.sample(f"x_{t}", dist.Normal(Vindex(slope)[z] * x, 1.0))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


@row(ROWS, "random effect per step, given", lambda: (normal(3, 6),), nesting=1)
def step_effects(y):
    initial, transition, loc = chain_params()
    spread = pyro.param("spread", torch.tensor(0.4), constraint=constraints.positive)
    plate = pyro.plate("animals", len(y), dim=-1)
    z = None
    for t in pyro.markov(range(y.shape[1])):
        weather = pyro.sample(f"weather_{t}", dist.Normal(0.0, spread))
        with plate:
            z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z] + weather, 1.0), obs=y[:, t])


@row(ROWS, "markov with keep", lambda: (normal(4),), tier="unrolled")
def kept(y):
    initial, transition, loc = chain_params(2)
    z = None
    for t in pyro.markov(range(len(y)), keep=True):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "plain Python loop", lambda: (normal(5),), tier="none")
def plain_loop(y):
    initial, transition, loc = chain_params(2)
    z = None
    for t in range(len(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "markov as a decorator", lambda: (normal(5),), tier="none")
def decorated(y):
    initial, transition, loc = chain_params(2)

    @pyro.markov
    def step(t, z):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])
        if t + 1 < len(y):
            step(t + 1, z)

    step(0, None)


@row(ROWS, "mixture of two chains", lambda: (normal(5),))
def mixture_of_chains(y):
    which = pyro.sample(
        "which", dist.Categorical(pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex))
    )
    tables = pyro.param("tables", lambda: torch.rand(2, 2, 2), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(tables)[which, z]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[t])


@row(ROWS, "emission tables scattered from one-hot data", lambda: (torch.eye(4)[torch.tensor([0, 3, 1, 2, 0, 1])],))
def one_hot_emissions(y):
    initial, transition, _ = chain_params()
    table = pyro.param("table", lambda: torch.rand(3, 4), constraint=constraints.simplex)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.OneHotCategorical(table[z]), obs=y[t])


@row(ROWS, "written in place in the body", lambda: (normal(6),))
def written_in_place(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        mean = torch.zeros(2)
        mean[0] = y[t]
        mean[1] = 2.0 * y[t]
        pyro.sample(f"y_{t}", dist.Normal(loc[z] + mean.sum(), 1.0), obs=y[t])
