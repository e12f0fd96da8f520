"""Test programs with plates: around and inside time, nested and crossed, mixtures and hierarchies without time."""

import pyro
import pyro.distributions as dist
import torch
from program_table import Rows, binary, integers, normal, row
from programs_chains import chain_params
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

ROWS: Rows = []


@row(ROWS, "one sequence after another, tones inside", lambda: (binary(3, 6, 2), [6, 4, 5]), nesting=1)
def sequential_sequences(y, lengths):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3) + torch.eye(3)).to_event(1))
    sounds = pyro.sample("sounds", dist.Beta(1.0, 2.0).expand([3, 2]).to_event(2))
    tones = pyro.plate("tones", y.shape[-1], dim=-1)
    for i in pyro.plate("sequences", len(y)):
        x = 0
        for t in pyro.markov(range(lengths[i])):
            x = pyro.sample(f"x_{i}_{t}", dist.Categorical(transition[x]))
            with tones:
                pyro.sample(f"y_{i}_{t}", dist.Bernoulli(sounds[x.squeeze(-1)]), obs=y[i, t])


def chorale(seed: int = 1):
    return lambda: (binary(3, 7, 2, seed=seed), torch.tensor([7, 3, 6]))


@row(ROWS, "sequences and tones plates", chorale(), nesting=2)
def sequences_and_tones(y, lengths):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3) + torch.eye(3)).to_event(1))
    sounds = pyro.sample("sounds", dist.Beta(1.0, 2.0).expand([3, 2]).to_event(2))
    tones = pyro.plate("tones", y.shape[-1], dim=-1)
    with pyro.plate("sequences", len(y), dim=-2) as batch:
        lengths, x = lengths[batch], 0
        for t in pyro.markov(range(int(lengths.max()))):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(transition[x]))
                with tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(sounds[x.squeeze(-1)]), obs=y[batch, t])


@row(ROWS, "tones depend on the tone before", chorale(), nesting=2)
def autoregressive_tones(y, lengths):
    transition = pyro.sample("transition", dist.Dirichlet(torch.ones(3) + torch.eye(3)).to_event(1))
    sounds = pyro.sample("sounds", dist.Beta(1.0, 2.0).expand([3, 2, 2]).to_event(3))
    tones_plate = pyro.plate("tones", y.shape[-1], dim=-1)
    with pyro.plate("sequences", len(y), dim=-2) as batch:
        lengths, x, last = lengths[batch], 0, 0
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(transition[x]))
                with tones_plate as tones:
                    emission = dist.Bernoulli(sounds[x, last, tones])
                    last = pyro.sample(f"y_{t}", emission, obs=y[batch, t]).long()


@row(ROWS, "factorial chains with a tones plate", chorale(), nesting=2)
def factorial_tones(y, lengths):
    first = pyro.sample("first", dist.Dirichlet(torch.ones(2) + torch.eye(2)).to_event(1))
    second = pyro.sample("second", dist.Dirichlet(torch.ones(2) + torch.eye(2)).to_event(1))
    sounds = pyro.sample("sounds", dist.Beta(1.0, 2.0).expand([2, 2, 2]).to_event(3))
    tones_plate = pyro.plate("tones", y.shape[-1], dim=-1)
    with pyro.plate("sequences", len(y), dim=-2) as batch:
        lengths, w, x = lengths[batch], 0, 0
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(first[w]))
                x = pyro.sample(f"x_{t}", dist.Categorical(second[x]))
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(sounds[w, x, tones]), obs=y[batch, t])


@row(ROWS, "second chain driven by the first, tones plate", chorale(), nesting=2)
def driven_tones(y, lengths):
    first = pyro.sample("first", dist.Dirichlet(torch.ones(2) + torch.eye(2)).to_event(1))
    second = pyro.sample("second", dist.Dirichlet(torch.ones(2, 2, 2)).to_event(2))
    sounds = pyro.sample("sounds", dist.Beta(1.0, 2.0).expand([2, 2, 2]).to_event(3))
    tones_plate = pyro.plate("tones", y.shape[-1], dim=-1)
    with pyro.plate("sequences", len(y), dim=-2) as batch:
        lengths = lengths[batch]
        w = x = torch.tensor(0, dtype=torch.long)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                w = pyro.sample(f"w_{t}", dist.Categorical(first[w]))
                x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(second)[w, x]))
                with tones_plate as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(sounds[w, x, tones]), obs=y[batch, t])


@row(ROWS, "second order with sequences and tones", chorale(), nesting=2)
def second_order_tones(y, lengths):
    table = pyro.param("table", lambda: torch.rand(2, 2, 2), constraint=constraints.simplex)
    sounds = pyro.param("sounds", lambda: torch.rand(2, 2), constraint=constraints.unit_interval)
    tones_plate = pyro.plate("tones", y.shape[-1], dim=-1)
    with pyro.plate("sequences", len(y), dim=-2) as batch:
        lengths = lengths[batch]
        now = before = torch.tensor(0)
        for t in pyro.markov(range(int(lengths.max())), history=2):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                probs = Vindex(table)[before, now]
                before, now = now, pyro.sample(f"x_{t}", dist.Categorical(probs))
                with tones_plate:
                    pyro.sample(f"y_{t}", dist.Bernoulli(sounds[now.squeeze(-1)]), obs=y[batch, t])


@row(ROWS, "a plate made at every step", chorale(), nesting=2)
def plate_per_step(y, lengths):
    transition = pyro.param("transition", lambda: torch.rand(3, 3), constraint=constraints.simplex)
    sounds = pyro.param("sounds", lambda: torch.rand(3, 2), constraint=constraints.unit_interval)
    with pyro.plate("sequences", len(y), dim=-2):
        x = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            with poutine.mask(mask=(t < lengths).unsqueeze(-1)):
                x = pyro.sample(f"x_{t}", dist.Categorical(Vindex(transition)[x]))
                with pyro.plate(f"tones_{t}", y.shape[-1], dim=-1) as tones:
                    pyro.sample(f"y_{t}", dist.Bernoulli(Vindex(sounds)[x, tones]), obs=y[:, t])


@row(ROWS, "plate of channels inside time with a local mixture", lambda: (normal(4, 2),), nesting=1)
def local_mixture(y):
    initial, transition, _ = chain_params(2)
    weights = pyro.param("weights", lambda: torch.rand(2, 3), constraint=constraints.simplex)
    loc = pyro.param("loc3", lambda: torch.randn(2, 3))
    channels = pyro.plate("channels", y.shape[-1], dim=-1)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
        with channels:
            k = pyro.sample(f"k_{t}", dist.Categorical(Vindex(weights)[z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z, k], 1.0), obs=y[t])


@row(
    ROWS,
    "individuals in groups",
    lambda: (normal(2, 3, 6), binary(2, 3, 6, probability=0.8).bool()),
    nesting=2,
)
def nested_individuals(y, mask):
    initial, transition, _ = chain_params()
    emission = pyro.sample("emission", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    spread = pyro.param("spread", torch.tensor(0.5), constraint=constraints.positive)
    with pyro.plate("group", 2, dim=-2):
        shift = pyro.sample("shift", dist.Normal(0.0, spread))
        with pyro.plate("individual", 3, dim=-1):
            own = pyro.sample("own", dist.Normal(shift, 0.3))
            z = None
            for t in pyro.markov(range(y.shape[-1])):
                with poutine.mask(mask=mask[..., t]):
                    z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
                    pyro.sample(f"y_{t}", dist.Normal(Vindex(emission)[z] + own, 1.0), obs=y[..., t])


@row(ROWS, "a state that a whole plate shares", lambda: (normal(6, 4),), nesting=1)
def shared_state(y):
    initial, transition, loc = chain_params()
    plate = pyro.plate("animals", y.shape[-1], dim=-1)
    with plate:
        own = pyro.sample("own", dist.Normal(0.0, 1.0))
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else Vindex(transition)[z]))
        with plate:
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z] + own, 1.0), obs=y[t])


@row(ROWS, "random transition matrices per individual", lambda: (normal(3, 6),), nesting=1, per="individual")
def random_transitions(y):
    base = pyro.param("base", lambda: torch.zeros(3, 3))
    spread = pyro.param("spread", torch.tensor(0.5), constraint=constraints.positive)
    loc = pyro.param("loc", lambda: torch.randn(3))
    with pyro.plate("individual", len(y), dim=-1):
        effect = pyro.sample("effect", dist.Normal(0.0, spread).expand([3, 3]).to_event(2))
        logits = base + effect
        z = 0
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(logits)[..., z, :]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[:, t])


@row(ROWS, "discrete effect per individual around the chain", lambda: (normal(3, 5),), nesting=1, per="individual")
def discrete_effect(y):
    weights = pyro.param("weights", lambda: torch.rand(2), constraint=constraints.simplex)
    tables = pyro.param("tables", lambda: torch.rand(2, 3, 3), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(3))
    with pyro.plate("individual", len(y), dim=-1):
        kind = pyro.sample("kind", dist.Categorical(weights))
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(tables)[kind, z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[:, t])


@row(ROWS, "global discrete latent above a plate of chains", lambda: (normal(2, 4),), nesting=1)
def global_effect(y):
    weights = pyro.param("weights", lambda: torch.rand(2), constraint=constraints.simplex)
    tables = pyro.param("tables", lambda: torch.rand(2, 2, 2), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2, 2))
    regime = pyro.sample("regime", dist.Categorical(weights))
    with pyro.plate("individual", len(y), dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(tables)[regime, z]))
            pyro.sample(f"y_{t}", dist.Normal(Vindex(loc)[regime, z], 1.0), obs=y[:, t])


@row(ROWS, "mixture of normals", lambda: (normal(8),), nesting=1, tier="none", per="data")
def mixture(y):
    weights = pyro.param("weights", lambda: torch.rand(3), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(3))
    scale = pyro.param("scale", lambda: torch.rand(3) + 0.5, constraint=constraints.positive)
    with pyro.plate("data", len(y), dim=-1):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[k], scale[k]), obs=y)


@row(ROWS, "mixture with components in a plate", lambda: (normal(6),), nesting=1, tier="none")
def mixture_components(y):
    weights = pyro.sample("weights", dist.Dirichlet(torch.ones(2)))
    with pyro.plate("components", 2, dim=-1):
        loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(y), dim=-1):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[k], scale[k]), obs=y)


@row(ROWS, "mixture of regressions", lambda: (normal(7), normal(7, 2, seed=2)), nesting=1, tier="none", per="data")
def mixture_of_regressions(y, x):
    gate = pyro.param("gate", lambda: torch.randn(2, 3))
    slopes = pyro.param("slopes", lambda: torch.randn(3, 2))
    with pyro.plate("data", len(y), dim=-1):
        k = pyro.sample("k", dist.Categorical(logits=x @ gate))
        pyro.sample("y", dist.Normal((Vindex(slopes)[k, :] * x).sum(-1), 1.0), obs=y)


@row(ROWS, "latent class of binary items", lambda: (binary(6, 4),), nesting=2, tier="none")
def latent_class(y):
    weights = pyro.param("weights", lambda: torch.rand(3), constraint=constraints.simplex)
    yes = pyro.param("yes", lambda: torch.rand(3, 4), constraint=constraints.unit_interval)
    with pyro.plate("person", len(y), dim=-2):
        k = pyro.sample("k", dist.Categorical(weights))
        with pyro.plate("item", y.shape[-1], dim=-1) as item:
            pyro.sample("y", dist.Bernoulli(Vindex(yes)[k, item]), obs=y)


@row(ROWS, "raters of items (crossed plates)", lambda: (integers(4, 3, below=2),), nesting=2, tier="none")
def raters(y):
    truth_probs = pyro.param("truth_probs", lambda: torch.rand(2), constraint=constraints.simplex)
    with pyro.plate("rater", y.shape[-1], dim=-1):
        confusion = pyro.sample("confusion", dist.Dirichlet(torch.ones(2, 2)).to_event(1))
    items = pyro.plate("item", len(y), dim=-2)
    with items:
        truth = pyro.sample("truth", dist.Categorical(truth_probs))
        with pyro.plate("rating", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Categorical(Vindex(confusion)[..., truth, :]), obs=y)


@row(ROWS, "topics of words in documents", lambda: (integers(4, 3, below=5),), nesting=2, tier="none")
def topics(words):
    with pyro.plate("topic", 3, dim=-1):
        popularity = pyro.sample("popularity", dist.Gamma(2.0, 1.0))
        vocabulary = pyro.sample("vocabulary", dist.Dirichlet(torch.ones(5)))
    with pyro.plate("document", words.shape[1], dim=-1):
        mix = pyro.sample("mix", dist.Dirichlet(popularity))
        with pyro.plate("word", words.shape[0], dim=-2):
            topic = pyro.sample("topic_of_word", dist.Categorical(mix))
            pyro.sample("words", dist.Categorical(vocabulary[topic]), obs=words)


@row(ROWS, "three discrete levels", lambda: (normal(2, 2, 2),), nesting=3, tier="none", per="school")
def discrete_levels(y):
    top = pyro.param("top", lambda: torch.rand(2), constraint=constraints.simplex)
    middle = pyro.param("middle", lambda: torch.rand(2, 3), constraint=constraints.simplex)
    low = pyro.param("low", lambda: torch.rand(3, 2), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2))
    with pyro.plate("school", 2, dim=-3):
        a = pyro.sample("a", dist.Categorical(top))
        with pyro.plate("room", 2, dim=-2):
            b = pyro.sample("b", dist.Categorical(Vindex(middle)[a]))
            with pyro.plate("pupil", 2, dim=-1):
                c = pyro.sample("c", dist.Categorical(Vindex(low)[b]))
                pyro.sample("y", dist.Normal(Vindex(loc)[c], 1.0), obs=y)


@row(ROWS, "discrete latents without any data", lambda: (), tier="none")
def prior_only():
    first = pyro.param("first", lambda: torch.rand(2), constraint=constraints.simplex)
    second = pyro.param("second", lambda: torch.rand(2, 3), constraint=constraints.simplex)
    weight = pyro.param("weight", lambda: torch.randn(3))
    a = pyro.sample("a", dist.Categorical(first))
    b = pyro.sample("b", dist.Categorical(second[a]))
    pyro.factor("weighted", weight[b])


@row(ROWS, "continuous only", lambda: (normal(5),), nesting=1, tier="none", per="data")
def continuous_only(y):
    loc = pyro.param("loc", torch.tensor(0.0))
    with pyro.plate("data", len(y), dim=-1):
        effect = pyro.sample("effect", dist.StudentT(4.0, loc, 1.0))
        pyro.sample("y", dist.Normal(effect, 0.5), obs=y)


@row(ROWS, "nested time loops", lambda: (normal(4, 4),))
def nested_loops(y):
    outer = pyro.param("outer", lambda: torch.rand(2, 2), constraint=constraints.simplex)
    inner = pyro.param("inner", lambda: torch.rand(2, 2, 2), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: torch.randn(2))
    x = torch.tensor(0)
    for s in pyro.markov(range(y.shape[0])):
        x = pyro.sample(f"x_{s}", dist.Categorical(Vindex(outer)[x]))
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{s}_{t}", dist.Categorical(Vindex(inner)[x, z]))
            pyro.sample(f"y_{s}_{t}", dist.Normal(Vindex(loc)[z], 1.0), obs=y[s, t])


@row(ROWS, "loop per member of a sequential plate", lambda: (normal(2, 6),))
def loop_in_sequential_plate(y):
    initial, transition, loc = chain_params()
    for i in pyro.plate("individual", len(y)):
        own = pyro.sample(f"own_{i}", dist.Normal(0.0, 1.0))
        z = None
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{i}_{t}", dist.Categorical(initial if z is None else transition[z]))
            pyro.sample(f"y_{i}_{t}", dist.Normal(loc[z] + own, 1.0), obs=y[i, t])
