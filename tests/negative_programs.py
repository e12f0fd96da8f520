"""Programs that a vectorised loop body would get wrong: Python state, carried tensors, branches, random numbers.

None of them may give a wrong number without a word. Each is either captured another way, with one warning that gives
the reason, and then equal to Pyro on its data and on data bound later; or refused with an error that names the reason.
"""

import math
from functools import lru_cache

import pyro
import pyro.distributions as dist
import torch
from negative_table import STEPS, Negative, adder, series
from program_table import binary, normal
from programs_chains import chain_params
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

NEGATIVE: list[Negative] = []
negative = adder(NEGATIVE)


class Walk:
    """The part that all programs share: a chain of three states with normal emissions around ``loc * rate``."""

    def __init__(self, y: Tensor) -> None:
        self.y = y
        self.initial, self.transition, self.loc = chain_params()
        self.z: Tensor | None = None

    def step(self, t, rate=1.0, name=None) -> Tensor:
        name = t if name is None else name
        self.z = pyro.sample(f"z_{name}", dist.Categorical(self.initial if self.z is None else self.transition[self.z]))
        pyro.sample(f"y_{name}", dist.Normal(self.loc[self.z] * rate, 1.0), obs=self.y[t])
        return self.z


@negative("a Python counter as exponent")
def counter(y):
    walk, count = Walk(y), 0
    for t in pyro.markov(range(STEPS)):
        count += 1  # noqa: SIM113
        walk.step(t, 0.9**count)


@negative("a Python number from int(t)")
def exponent(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 0.9 ** int(t))


@negative("a list of numbers indexed by t")
def number_list(y):
    walk, rates = Walk(y), [1.0 + 0.1 * k for k in range(STEPS)]
    for t in pyro.markov(range(STEPS)):
        walk.step(t, rates[t])


@negative("a dict of numbers indexed by t")
def number_dict(y):
    walk, rates = Walk(y), {k: 1.0 + 0.1 * k for k in range(STEPS)}
    for t in pyro.markov(range(STEPS)):
        walk.step(t, rates[t])


@negative("an iterator consumed in the body")
def iterator(y):
    walk, rates = Walk(y), iter([1.0 + 0.1 * k for k in range(STEPS)])
    for t in pyro.markov(range(STEPS)):
        walk.step(t, next(rates))


@negative("the length of a growing list")
def growing_list(y):
    walk, seen = Walk(y), [None]
    for t in pyro.markov(range(STEPS)):
        seen.append(walk.step(t, 1.0 / len(seen)))


@negative("a late switch on an own counter")
def late_switch(y):
    walk, count = Walk(y), 0
    for t in pyro.markov(range(STEPS)):
        count += 1  # noqa: SIM113
        walk.step(t, 1.0 if count <= STEPS - 3 else 2.0)


@negative("a moving average of the data")
def moving_average(y):
    walk, average = Walk(y), torch.tensor(0.0)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + average)
        average = 0.9 * average + 0.1 * y[t]


@negative("time since the last event")
def time_since(y):
    walk, waited = Walk(y), torch.tensor(0.0)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + waited)
        waited = torch.where(y[t] > 0, 0.0, waited + 1.0)


def with_event(seed: int = 1):
    """Data whose fifth step is an event that the first data do not have."""

    def arguments():
        y = normal(STEPS, seed=seed)
        y[4] = 200.0
        return (y,)

    return arguments


@negative("a flag that never rises in the first data", later=with_event())
def sticky_flag(y):
    walk, flag = Walk(y), torch.tensor(False)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + flag)
        flag = flag | (y[t] > 100)


@negative("a running total in place")
def running_total(y):
    walk, total = Walk(y), torch.zeros(())
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + total.clone())
        total += y[t]


@negative("a discount multiplied on at each step")
def discount(y):
    walk, weight = Walk(y), torch.tensor(1.0)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, weight)
        weight = weight * 0.95


@negative("the observation two steps back, carried by hand")
def two_back(y):
    walk, last, before = Walk(y), torch.tensor(0.0), torch.tensor(0.0)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + before)
        before, last = last, y[t]


@negative("a branch on t % 3")
def remainder(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 if t % 3 == 0 else 2.0)


@negative("a branch on a step in the middle", warns=False)
def middle(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 if t < 7 else 2.0)


@negative("a branch on the last step")
def last_step(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 2.0 if t == STEPS - 1 else 1.0)


@negative("membership of t in a tuple", warns=False)
def membership(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 2.0 if t in (5, 9) else 1.0)


@negative("membership of str(t) in a set")
def spelled(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 2.0 if str(t) in {"5", "9"} else 1.0)


@negative("a cached function of t", warns=False)
def cached(y):
    walk = Walk(y)

    @lru_cache
    def rate(t):
        return 1.0 + 0.1 * t

    for t in pyro.markov(range(STEPS)):
        walk.step(t, rate(t), name=t)


@negative("the type of t", warns=False)
def type_of_t(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 if isinstance(t, int) else 2.0)


@negative("a slice that grows")
def growing_slice(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + y[: t + 1].mean())


@negative("a clamped lag", warns=False)
def clamped_lag(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + y[max(t - 3, 0)])


@negative("a Python loop up to t")
def inner_range(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        rate = 1.0
        for s in range(t):
            rate = rate + 0.01 * s
        walk.step(t, rate)


@negative("site names from an own counter")
def own_names(y):
    walk, count = Walk(y), 0
    for t in pyro.markov(range(STEPS)):
        walk.step(t, name=count)
        count += 1  # noqa: SIM113


@negative("a branch on the data", later=series(9))
def data_branch(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 if y[t] > 0 else 2.0)


@negative("a number read from the data in the body")
def data_number(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, math.exp(0.1 * float(y[t])))


@negative("numpy on the data in the body")
def data_numpy(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, float(y.numpy()[t]))


@negative("numpy on all data before the loop", warns=False)
def data_numpy_before(y):
    walk, level = Walk(y), float(y.numpy().mean())
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 1.0 + level)


@negative("a number read from a parameter")
def parameter_number(y):
    walk = Walk(y)
    rate = 1.0 + walk.loc.detach()[0].item() ** 2
    for t in pyro.markov(range(STEPS)):
        walk.step(t, rate)


@negative("a branch on a parameter")
def parameter_branch(y):
    walk = Walk(y)
    rate = 1.0 if walk.loc[0] > 0 else 2.0
    for t in pyro.markov(range(STEPS)):
        walk.step(t, rate)


@negative("math functions of t")
def math_of_t(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, 2.0 + math.sin(t))


def lengths_arguments(*lengths: int, seed: int = 1):
    return lambda: (normal(3, STEPS, seed=seed), torch.tensor(lengths))


short, longer = lengths_arguments(6, 4, 5), lengths_arguments(9, 12, 3, seed=2)


@negative("a loop as long as the longest sequence", short, longer, nesting=1, warns=False)
def longest(y, lengths):
    initial, transition, loc = chain_params()
    with pyro.plate("sequence", len(y), dim=-1):
        z = None
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
                pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[:, t])


def caught(seed: int = 1):
    return lambda: (binary(4, 8, seed=seed, probability=0.4),)


@negative("a running mask", caught(), caught(5), nesting=1)
def running_mask(y):
    survive = pyro.param("survive", torch.tensor(0.8))
    with pyro.plate("animals", len(y), dim=-1):
        alive, known = torch.ones(len(y)), torch.zeros(len(y), dtype=torch.bool)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=known):
                now = known.to(y.dtype)
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(now * survive * alive + 1.0 - now))
                pyro.sample(f"y_{t}", dist.Bernoulli(0.7 * alive), obs=y[:, t])
            known = known | y[:, t].bool()


@negative("a mask changed in place after its use", caught(), caught(5), nesting=1, outcome="refused", reason="in place")
def mask_in_place(y):
    survive = pyro.param("survive", torch.tensor(0.8))
    with pyro.plate("animals", len(y), dim=-1):
        alive, known = torch.ones(len(y)), torch.zeros(len(y), dtype=torch.bool)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=known):
                now = known.to(y.dtype)
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(now * survive * alive + 1.0 - now))
                pyro.sample(f"y_{t}", dist.Bernoulli(0.7 * alive), obs=y[:, t])
            known |= y[:, t].bool()


@negative("an observation changed in place after its use", outcome="refused", reason="in place")
def value_in_place(y):
    walk, value = Walk(y), torch.zeros(())
    for t in pyro.markov(range(STEPS)):
        z = walk.step(t)
        pyro.sample(f"w_{t}", dist.Normal(walk.loc[z], 1.0), obs=value)
        value += y[t]


@negative("dropout in the loop", outcome="refused", reason="random|dropout|differ")
def dropout(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t, torch.nn.functional.dropout(torch.ones(()), 0.5) + 1.0)


@negative("random numbers before the loop", outcome="refused", reason="random|differ")
def random_before(y):
    walk, noise = Walk(y), torch.rand(())
    for t in pyro.markov(range(STEPS)):
        walk.step(t, noise)


@negative("the state two steps back with history 1", plain=True)
def two_states_back(y):
    _, transition, loc = chain_params()
    before = now = torch.tensor(0)
    for t in pyro.markov(range(STEPS)):
        probs = 0.5 * Vindex(transition)[before] + 0.5 * Vindex(transition)[now]
        before, now = now, pyro.sample(f"z_{t}", dist.Categorical(probs))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[now], 1.0), obs=y[t])


@negative("a state of three steps back from a list", plain=True)
def states_list_back(y):
    initial, transition, loc = chain_params()
    z = []
    for t in pyro.markov(range(STEPS)):
        z.append(pyro.sample(f"z_{t}", dist.Categorical(initial if t < 3 else Vindex(transition)[z[t - 3]])))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z[t]], 1.0), obs=y[t])


@negative("a site name that does not change", outcome="refused", reason="'z'")
def same_name(y):
    _, transition, loc = chain_params()
    z = torch.tensor(0)
    for t in pyro.markov(range(STEPS)):
        z = pyro.sample("z", dist.Categorical(Vindex(transition)[z]))
        pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[t])


@negative("the last state read after the loop", plain=True, warns=False)
def state_after(y):
    walk = Walk(y)
    for t in pyro.markov(range(STEPS)):
        walk.step(t)
    pyro.sample("end", dist.Normal(walk.loc[walk.z], 1.0), obs=torch.tensor(0.5))


@negative("a tensor of the loop read after it", plain=True, reason="after")
def tensor_after(y):
    walk, rate = Walk(y), torch.zeros(())
    for t in pyro.markov(range(STEPS)):
        z = walk.step(t)
        rate = walk.loc[z]
    pyro.sample("end", dist.Normal(rate, 1.0), obs=torch.tensor(0.5))
