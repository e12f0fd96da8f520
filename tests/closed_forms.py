"""Programs whose maxima, marginals and posteriors are known in closed form."""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, constraints

REAL = torch.float64


def real(x: float | list[float]) -> Tensor:
    return torch.tensor(x, dtype=REAL)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(n: int = 60, seed: int = 0) -> Tensor:
    return 20.0 + 3.0 * torch.randn(n, generator=generator(seed), dtype=REAL)


def gaussian(y: Tensor) -> None:
    """Maximum at the sample mean and the standard deviation with denominator n."""
    loc = pyro.param("loc", real(0.0))
    sd = pyro.param("sd", real(1.0), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(loc, sd), obs=y)


def gaussian_maximum(y: Tensor) -> float:
    return float(dist.Normal(y.mean(), y.std(correction=0)).log_prob(y).sum())


def balanced(groups: int = 12, per_group: int = 6, seed: int = 1) -> Tensor:
    """Shape (groups, per_group); between-group sd 1.5, within 2."""
    noise = torch.randn(groups, per_group + 1, generator=generator(seed), dtype=REAL)
    return 5.0 + 1.5 * noise[:, :1] + 2.0 * noise[:, 1:]


def random_intercept(y: Tensor) -> None:
    """Within-group sd known (2); spread ``tau`` and mean ``loc`` fitted."""
    loc = pyro.param("loc", real(0.0))
    tau = pyro.param("tau", real(1.0), constraint=constraints.positive)
    with pyro.plate("group", y.shape[0], dim=-1):
        d = pyro.sample("d", dist.Normal(real(0.0), tau))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(loc + d, real(2.0)), obs=y.T)


def random_intercept_marginal(y: Tensor, loc: float, tau: float) -> float:
    m = y.shape[1]
    covariance = 4.0 * torch.eye(m, dtype=REAL) + tau**2
    return float(MultivariateNormal(torch.full((m,), loc, dtype=REAL), covariance).log_prob(y).sum())


def random_intercept_maximum(y: Tensor) -> tuple[float, float]:
    """Maximum likelihood of (loc, tau) in a balanced design: group means have variance tau^2 + 4 / m."""
    means = y.mean(1)
    return float(means.mean()), float((means.var(correction=0) - 4.0 / y.shape[1]).clamp(min=0).sqrt())


def random_intercept_posterior(y: Tensor, loc: float, tau: float) -> tuple[Tensor, float]:
    """Conditional mean of each group's effect and their common standard deviation."""
    precision = 1 / tau**2 + y.shape[1] / 4.0
    return (y - loc).sum(1) / 4.0 / precision, precision**-0.5


def with_prior(y: Tensor) -> None:
    """Two correlated regression coefficients with priors; posterior is normal."""
    x = torch.linspace(0.0, 2.0, len(y), dtype=REAL)
    b = pyro.sample("b", dist.Normal(real([0.0, 0.0]), real(10.0)).to_event(1))
    with pyro.plate("n", len(y)):
        pyro.sample("y", dist.Normal(b[0] + b[1] * x, real(3.0)), obs=y)


def with_prior_posterior(y: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean, covariance, log-evidence."""
    x = torch.stack([torch.ones(len(y), dtype=REAL), torch.linspace(0.0, 2.0, len(y), dtype=REAL)], 1)
    covariance = torch.linalg.inv(x.T @ x / 9.0 + torch.eye(2, dtype=REAL) / 100.0)
    marginal = 9.0 * torch.eye(len(y), dtype=REAL) + 100.0 * x @ x.T
    evidence = MultivariateNormal(torch.zeros(len(y), dtype=REAL), marginal).log_prob(y)
    return covariance @ x.T @ y / 9.0, covariance, float(evidence)


def mixture(y: Tensor) -> None:
    """Two components that start equal: a symmetric stationary point, where the gradient tells nothing."""
    loc = pyro.param("loc", lambda: torch.full((2,), float(y.mean()), dtype=REAL))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(real([0.5, 0.5])))
        pyro.sample("y", dist.Normal(loc[z], real(1.0)), obs=y)


def two_lumps() -> Tensor:
    y = torch.randn(80, generator=generator(2), dtype=REAL)
    return torch.cat([y[:40] - 3.0, y[40:] + 4.0])


def one_state(y: Tensor) -> None:
    """A hidden Markov model with a single state is a sample from its emission distribution."""
    loc = pyro.param("loc", lambda: real([0.0]))
    sd = pyro.param("sd", lambda: real([1.0]), constraint=constraints.positive)
    z = 0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(1, 1, dtype=REAL)[z]))
        pyro.sample(f"y_{t}", dist.Normal(loc[z], sd[z]), obs=y[t])
