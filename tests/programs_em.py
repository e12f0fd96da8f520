"""Programs for maximum likelihood: mixtures, mixtures of regressions and of sequences, latent classes, plain chains."""

import pyro
import pyro.distributions as dist
import torch
from closed_forms import REAL, real
from torch import Tensor
from torch.distributions import constraints

from symhmm.distributions import stationary_distribution, with_zero_diagonal


def lumps(y: Tensor) -> None:
    """Two normal components."""
    weights = pyro.param("weights", lambda: real([0.5, 0.5]), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: real([-1.0, 1.0]))
    scale = pyro.param("scale", lambda: real([1.0, 1.0]), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale[z]), obs=y)


def touching(points: int = 200) -> Tensor:
    """Normal samples around -1 and 1.5 that overlap."""
    y = torch.randn(points, generator=torch.Generator().manual_seed(5), dtype=REAL)
    return y + torch.where(torch.arange(points) % 3 == 0, -1.5, 1.5)


def gamma_mixture(y: Tensor) -> None:
    """Two gamma components, whose M-step has no closed form."""
    weights = pyro.param("weights", lambda: real([0.5, 0.5]), constraint=constraints.simplex)
    shape = pyro.param("shape", lambda: real([1.0, 2.0]), constraint=constraints.positive)
    rate = pyro.param("rate", lambda: real([1.0, 0.5]), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Gamma(shape[z], rate[z]), obs=y)


def crossing(points: int = 60) -> Tensor:
    """Half of the points on the line 1 + 2 x, half on -1 - x, noise 0.3; shape (2, points)."""
    x = torch.linspace(-1.0, 1.0, points, dtype=REAL)
    noise = 0.3 * torch.randn(len(x), generator=torch.Generator().manual_seed(4), dtype=REAL)
    first = torch.arange(len(x)) % 2 == 0
    return torch.stack([x, torch.where(first, 1.0 + 2.0 * x, -1.0 - x) + noise])


def lines(xy: Tensor) -> None:
    """A mixture of two regressions; ``xy`` has shape (2, points)."""
    x, y = xy
    weights = pyro.param("weights", lambda: real([0.5, 0.5]), constraint=constraints.simplex)
    line = pyro.param("line", lambda: torch.tensor([[0.5, 0.0], [-0.5, 0.0]], dtype=REAL))
    scale = pyro.param("scale", lambda: real([1.0, 1.0]), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(line[z, 0] + line[z, 1] * x, scale[z]), obs=y)


def sequences(number: int = 12, steps: int = 15) -> Tensor:
    """Shape (number, steps): states around -2 and 2 that alternate in some sequences and stay in the others."""
    g = torch.Generator().manual_seed(6)
    move = torch.where(torch.arange(number) % 2 == 0, 0.15, 0.6)
    state = (torch.rand(number, steps, generator=g) < move[:, None]).long().cumsum(1) % 2
    return 4.0 * state - 2.0 + 1.5 * torch.randn(number, steps, generator=g, dtype=REAL)


def class_mixture(y: Tensor) -> None:
    """Sequences, shape (N, T), each of one of two classes with their own transition matrix; states shared."""
    weights = pyro.param("weights", lambda: real([0.5, 0.5]), constraint=constraints.simplex)
    rows = pyro.param(
        "rows",
        lambda: torch.tensor([[[0.6, 0.4], [0.4, 0.6]], [[0.9, 0.1], [0.1, 0.9]]], dtype=REAL),
        constraint=constraints.simplex,
    )
    loc = pyro.param("loc", lambda: real([-2.0, 2.0]))
    with pyro.plate("sequence", y.shape[0], dim=-1):
        c = pyro.sample("class", dist.Categorical(weights))
        z = None
        for t in pyro.markov(range(y.shape[1])):
            p = torch.ones(2, dtype=REAL) / 2 if z is None else rows[c, z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.5), obs=y[:, t])


def latent_class(items: Tensor) -> None:
    """Two classes of people answering binary items, shape (people, items)."""
    weights = pyro.param("weights", lambda: real([0.5, 0.5]), constraint=constraints.simplex)
    prob = pyro.param(
        "prob", lambda: torch.full((2, items.shape[1]), 0.5, dtype=REAL), constraint=constraints.unit_interval
    )
    with pyro.plate("people", len(items)):
        c = pyro.sample("class", dist.Categorical(weights))
        pyro.sample("items", dist.Bernoulli(prob[c]).to_event(1), obs=items)


def earthquakes(y: Tensor, m: int) -> None:
    """A Poisson chain that starts in its stationary distribution."""
    rate = pyro.param("rate", lambda: torch.full((m,), 15.0, dtype=REAL), constraint=constraints.positive)
    rows = pyro.param("rows", lambda: torch.full((m, m), 1 / m, dtype=REAL), constraint=constraints.simplex)
    start = stationary_distribution(rows)
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(start if t == 0 else rows[z]))
        pyro.sample(f"y_{t}", dist.Poisson(rate[z]), obs=y[t])


def plain_hmm(y: Tensor) -> None:
    """Sequences, shape (N, T), of three normal states that start equal; transition logits relative to staying."""
    beta = pyro.param("beta", lambda: torch.full((3, 2), -2.0, dtype=REAL))
    loc = pyro.param("loc", lambda: torch.zeros(3, dtype=REAL))
    scale = pyro.param("scale", lambda: torch.ones(3, dtype=REAL), constraint=constraints.positive)
    rows = with_zero_diagonal(beta)
    with pyro.plate("individual", y.shape[0], dim=-1):
        z = 0
        for t in pyro.markov(range(y.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=torch.zeros(3, dtype=REAL) if t == 0 else rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=y[:, t])
