"""Test programs with one time loop and no plates, or plates around it: the shapes that `pyro.markov` loops come in."""

import pyro
import pyro.distributions as dist
import torch
from program_table import Rows, binary, integers, normal, row, uniform
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints

ROWS: Rows = []


def chain_params(states: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Initial probabilities (K,), transition probabilities (K, K) from row to column, emission means (K,)."""
    initial = pyro.param("initial", lambda: torch.rand(states), constraint=constraints.simplex)
    transition = pyro.param("transition", lambda: torch.rand(states, states), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(states))
    return initial, transition, loc


def series(length: int):
    return lambda: (normal(length),)


@row(ROWS, "hmm", series(8))
@row(ROWS, "hmm, T = 1", series(1), tier="unrolled")
@row(ROWS, "hmm, T = 2", series(2), tier="unrolled")
@row(ROWS, "hmm, T = 3", series(3))
@row(ROWS, "hmm, T = 4", series(4))
def hmm(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "hmm from state 0, format and percent names", series(7))
def hmm_from_zero(y):
    _, transition, loc = chain_params()
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample("z_{}".format(t), dist.Categorical(transition[z]))  # noqa: UP032
        pyro.sample("y_%d" % t, dist.Normal(loc[z], 1.0), obs=y[t])  # noqa: UP031


@row(ROWS, "branch on the first step", series(8))
def first_step_branch(y):
    initial, transition, loc = chain_params()
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        probs = initial if t == 0 else Vindex(transition)[z]
        z = pyro.sample(f"z_{t}", dist.Categorical(probs))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[t])


@row(ROWS, "first state before the loop", series(8))
def first_state_outside(y):
    initial, transition, loc = chain_params()
    z = pyro.sample("z_0", dist.Categorical(initial))
    pyro.sample("y_0", dist.Normal(loc[z], 1.0), obs=y[0])
    for t in pyro.markov(range(1, len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "states in a list", series(8))
def states_in_list(y):
    initial, transition, loc = chain_params()
    z = []
    for t in pyro.markov(range(len(y))):
        z.append(pyro.sample(f"z_{t}", dist.Categorical(transition[z[t - 1]] if t > 0 else initial)))
        pyro.sample(f"y_{t}", dist.Normal(loc[z[t]], 1.0), obs=y[t])


@row(ROWS, "states in a dict", series(8))
def states_in_dict(y):
    _, transition, loc = chain_params()
    z = {-1: torch.tensor(0)}
    for t in pyro.markov(range(len(y))):
        z[t] = pyro.sample(f"z_{t}", dist.Categorical(transition[z[t - 1]]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z[t]], 1.0), obs=y[t])


@row(ROWS, "autoregressive emissions", series(8))
def autoregressive(y):
    initial, transition, loc = chain_params()
    slope = pyro.param("slope", lambda: torch.rand(3), constraint=constraints.unit_interval)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        mean = loc[z] if t == 0 else loc[z] + slope[z] * y[t - 1]
        pyro.sample(f"y_{t}", dist.Normal(mean, 1.0), obs=y[t])


@row(ROWS, "autoregressive through the returned observation", lambda: (binary(8),))
def autoregressive_returned(y):
    _, transition, _ = chain_params()
    table = pyro.param("table", lambda: torch.rand(3, 2), constraint=constraints.unit_interval)
    z = last = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        last = pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(table)[z, last]), obs=y[t]).long()


@row(ROWS, "window of observations", series(9))
def window(y):
    _, transition, loc = chain_params()
    weights = pyro.param("weights", lambda: torch.randn(2))
    z = torch.tensor(0)
    for t in pyro.markov(range(1, len(y) - 1)):
        z = pyro.sample(f"z_{t}", dist.Categorical(transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z] + (weights * y[t - 1 : t + 1]).sum(), 1.0), obs=y[t + 1])


@row(ROWS, "two coupled chains", lambda: (normal(7),))
def coupled(y):
    first = pyro.param("first", lambda: torch.rand(2, 3, 2), constraint=constraints.simplex)
    second = pyro.param("second", lambda: torch.rand(2, 3, 3), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, 3))
    a = b = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        a, b = (
            pyro.sample(f"a_{t}", dist.Categorical(Vindex(first)[a, b])),
            pyro.sample(f"b_{t}", dist.Categorical(Vindex(second)[a, b])),
        )
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[a, b], 1.0), obs=y[t])


@row(ROWS, "two independent chains, joint emission", lambda: (normal(7),))
def factorial(y):
    first = pyro.param("first", lambda: torch.rand(2, 2), constraint=constraints.simplex)
    second = pyro.param("second", lambda: torch.rand(3, 3), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, 3))
    a = b = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        a = pyro.sample(f"a_{t}", dist.Categorical(first[a]))
        b = pyro.sample(f"b_{t}", dist.Categorical(second[b]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[a, b], 1.0), obs=y[t])


@row(ROWS, "second order", series(8))
@row(ROWS, "second order, T = 5", series(5))
@row(ROWS, "second order, T = 3", series(3), tier="unrolled")
def second_order(y):
    table = pyro.param("table", lambda: torch.rand(3, 3, 3), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(3))
    before = now = torch.tensor(0)
    for t in pyro.markov(range(len(y)), history=2):
        before, now = now, pyro.sample(f"z_{t}", dist.Categorical(Vindex(table)[before, now]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[now], 1.0), obs=y[t])


@row(ROWS, "second order, additive, with first-order companion", lambda: (normal(8),))
def second_order_companion(y):
    near = pyro.param("near", lambda: torch.randn(2, 2))
    far = pyro.param("far", lambda: torch.randn(2, 2))
    follow = pyro.param("follow", lambda: torch.rand(2, 2, 2), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, 2))
    before = now = companion = torch.tensor(0)
    for t in pyro.markov(range(len(y)), history=2):
        logits = Vindex(near)[now, :] + Vindex(far)[before, :]
        before, now = now, pyro.sample(f"z_{t}", dist.Categorical(logits=logits))
        companion = pyro.sample(f"w_{t}", dist.Categorical(Vindex(follow)[companion, now]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[now, companion], 1.0), obs=y[t])


@row(ROWS, "ragged sequences", lambda: (normal(4, 7), torch.tensor([7, 3, 1, 5])), nesting=1, per="sequence")
def ragged(y, lengths):
    initial, transition, loc = chain_params()
    with pyro.plate("sequence", len(y), dim=-1):
        z = None
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
                pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[:, t])


@row(ROWS, "covariates on transitions and emissions", lambda: (normal(8), normal(8, 2, seed=2)))
def covariates(y, x):
    base = pyro.param("base", lambda: torch.randn(3, 3))
    slope = pyro.param("slope", lambda: torch.randn(2, 3, 3))
    effect = pyro.param("effect", lambda: torch.randn(2))
    loc = pyro.param("loc", lambda: torch.randn(3))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        logits = base + torch.einsum("p,pij->ij", x[t], slope)
        z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[z, :]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z] + x[t] @ effect, 1.0), obs=y[t])


@row(ROWS, "history 0: a mixture at every step", series(6))
def mixture_per_step(y):
    initial, _, loc = chain_params()
    for t in pyro.markov(range(len(y)), history=0):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "zip of two series", lambda: (normal(8), binary(8)))
def zipped(y, w):
    initial, transition, loc = chain_params()
    rate = pyro.param("rate", lambda: torch.rand(3), constraint=constraints.unit_interval)
    z, steps = None, list(range(len(y)))
    for t, a, b in pyro.markov(zip(steps, y, w, strict=True)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=a)
        pyro.sample(f"w_{t}", dist.Bernoulli(rate[z]), obs=b)


@row(ROWS, "enumerate over the series", series(8))
def enumerated(y):
    initial, transition, loc = chain_params()
    z = None
    for t, value in pyro.markov(enumerate(y)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=value)


@row(ROWS, "list of steps, backwards", series(7))
def backwards(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov([6, 5, 4, 3, 2, 1, 0]):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "initial values drawn at each run", series(6))
def eager_initial_values(y):
    transition = pyro.param("transition", torch.rand(3, 3), constraint=constraints.simplex)
    loc = pyro.param("loc", torch.randn(3))
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(transition)[z]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[t])


@row(ROWS, "every second step", series(11))
def every_second(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(0, len(y), 2)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "last axis is time", lambda: (normal(2, 8),))
def last_axis(y):
    initial, transition, _ = chain_params()
    loc = pyro.param("loc2", lambda: torch.randn(3, 2))
    z = None
    for t in pyro.markov(range(y.shape[-1])):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z, :], 1.0).to_event(1), obs=y[..., t])


@row(ROWS, "multivariate normal emissions", lambda: (normal(7, 2),))
def multivariate(y):
    initial, transition, _ = chain_params()
    loc = pyro.param("loc2", lambda: torch.randn(3, 2))
    root = pyro.param("root", lambda: torch.eye(2).expand(3, 2, 2).clone(), constraint=constraints.lower_cholesky)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.MultivariateNormal(loc[z], scale_tril=root[z]), obs=y[t])


@row(ROWS, "left to right, forbidden transitions", series(8))
def left_to_right(y):
    stay = pyro.param("stay", lambda: torch.rand(3), constraint=constraints.unit_interval)
    loc = pyro.param("loc", lambda: torch.randn(3))
    go = 1.0 - stay[:2]
    zero = torch.zeros(())
    table = torch.stack(
        [torch.stack([stay[0], go[0], zero]), torch.stack([zero, stay[1], go[1]]), torch.tensor([0.0, 0.0, 1.0])]
    )
    z = torch.tensor(0)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(table[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "missing observations masked", lambda: (normal(8), binary(8, probability=0.6).bool()))
def missing(y, seen):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        with poutine.mask(mask=seen[t]):
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "all states known", lambda: (normal(7), integers(7, below=3)), tier="vector")
def known_states(y, states):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]), obs=states[t])
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "states partly known by a label", lambda: (normal(8), integers(8, below=3), binary(8).bool()))
def partly_known(y, label, known):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        agrees = torch.where(z == label[t], 0.0, -torch.inf)
        with poutine.mask(mask=known[t]):
            pyro.factor(f"label_{t}", agrees)
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


@row(ROWS, "two loops after one another", series(12))
def two_loops(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(6)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])
    z = None
    for t in pyro.markov(range(6, 12)):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 2.0), obs=y[t])


@row(ROWS, "alternating emissions (t % 2)", series(8), tier="stacked")
def alternating(y):
    initial, transition, loc = chain_params()
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        scale = 1.0 if t % 2 else 2.0
        pyro.sample(f"y_{t}", dist.Normal(loc[z], scale), obs=y[t])


@row(ROWS, "list of numbers indexed by t", series(8), tier="stacked")
def list_of_numbers(y):
    initial, transition, loc = chain_params()
    scales = [1.0 + 0.1 * k for k in range(len(y))]
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], scales[t]), obs=y[t])


@row(ROWS, "an extra site at odd steps", series(8), tier="unrolled")
def odd_sites(y):
    initial, transition, loc = chain_params()
    rate = pyro.param("rate", lambda: torch.rand(3), constraint=constraints.unit_interval)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])
        if t % 2 == 1:
            pyro.sample(f"w_{t}", dist.Bernoulli(rate[z]), obs=(y[t] > 0).double())


@row(ROWS, "proportions", lambda: (uniform(7),))
def proportions(y):
    initial, transition, _ = chain_params()
    shape = pyro.param("shape", lambda: torch.rand(3, 2) + 0.5, constraint=constraints.positive)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.Beta(shape[z, 0], shape[z, 1]), obs=y[t])
