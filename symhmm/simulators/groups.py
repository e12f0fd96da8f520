"""Simulated individuals without hidden chains: mixtures, capture histories, and regressions by group."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from symhmm.simulators.holes import WHOLE, Emissions, Holes, Truth, check_emissions, check_sizes, observed, seeded
from symhmm.tables.data import SequenceData


def simulate_captures(
    num_sequences: int, num_steps: int, phi: Tensor | float, p: Tensor | float, *, seed: int = 0
) -> tuple[SequenceData, Truth]:
    """Simulate capture histories, stream ``seen``: animals are marked on occasions drawn alike, all but the last.

    Args:
        num_sequences: N, animals.
        num_steps: T, occasions.
        phi, p: survival and detection; scalar or shape (T - 1,), by interval.
        seed: the same seed gives the same data.

    Raises:
        DataError: there is nothing to simulate.

    >>> data, _ = simulate_captures(200, 6, 0.8, 0.5)
    >>> (data.seen.sum(0) > 0).all()
    tensor(True)
    """
    check_sizes(num_sequences, num_steps, None, WHOLE)
    by_interval = [torch.as_tensor(v, dtype=torch.get_default_dtype()).expand(num_steps - 1) for v in (phi, p)]
    with seeded(seed):
        first = torch.randint(num_steps - 1, (num_sequences,))
        alive, seen, states = torch.ones(num_sequences), [], []
        for t in range(num_steps):
            here = t > first
            alive = torch.where(here, alive * torch.bernoulli(by_interval[0][t - 1].expand(num_sequences)), alive)
            caught = alive * torch.bernoulli(by_interval[1][t - 1].expand(num_sequences))
            seen.append(torch.where(here, caught, (first == t).to(alive)))
            states.append(torch.where(t < first, -1, alive.long()))
    data = SequenceData.from_tensors({"seen": torch.stack(seen)})
    return data, Truth({"phi": phi, "p": p}, torch.stack(states))


def simulate_regression(
    num_groups: int,
    rows: int,
    fixed: Tensor,
    *,
    spread: Tensor | None = None,
    weights: Tensor | None = None,
    family: Callable[[Tensor], Any] | None = None,
    seed: int = 0,
) -> tuple[Any, Truth]:
    """Simulate a table with columns ``id``, ``x1``, ``x2``, ... (standard normal) and ``y``, of regressions by group.

    Args:
        num_groups: G.
        rows: of each group.
        fixed: shape (P,), coefficients of the intercept and the columns; (C, P) for C kinds of groups.
        spread: shape (P,), standard deviations of the groups' own coefficients; None gives them none.
        weights: shape (C,), probabilities of the kinds.
        family: the distribution of y given the linear predictor; None is normal with standard deviation 1.
        seed: the same seed gives the same data.

    Returns:
        a pandas table, and the truth.

    Raises:
        DataError: there is nothing to simulate.

    >>> table, truth = simulate_regression(3, 4, torch.tensor([1.0, 0.5]), spread=torch.tensor([1.0, 0.0]))
    >>> list(table.columns), len(table)
    (['id', 'x1', 'y'], 12)
    """
    import pandas as pd

    check_sizes(num_groups, rows, None, WHOLE)
    columns = fixed.shape[-1]
    with seeded(seed):
        kinds = None if weights is None else torch.multinomial(weights, num_groups, replacement=True)
        own = fixed.expand(num_groups, columns) if kinds is None else fixed[kinds]
        effects = (torch.zeros(columns) if spread is None else spread) * torch.randn(num_groups, columns)
        x = torch.randn(num_groups, rows, columns, dtype=fixed.dtype)
        x[..., 0] = 1
        eta = torch.einsum("grp,gp->gr", x, own + effects.to(fixed))
        y = (torch.distributions.Normal(eta, 1.0) if family is None else family(eta)).sample()
    table = pd.DataFrame({"id": torch.arange(num_groups).repeat_interleave(rows).numpy()})
    for i in range(1, columns):
        table[f"x{i}"] = x[..., i].flatten().numpy()
    table["y"] = y.flatten().numpy()
    given = {"fixed": fixed, "spread": spread, "weights": weights}
    return table, Truth({n: v for n, v in given.items() if v is not None}, None, kinds, {"own": effects})


def simulate_mixture(
    num_sequences: int,
    weights: Tensor,
    emissions: Emissions,
    *,
    rows: int = 1,
    holes: Holes = WHOLE,
    seed: int = 0,
) -> tuple[SequenceData, Truth]:
    """Simulate individuals of several components, ``rows`` rows each; latent classes where emissions are Bernoulli.

    Args:
        num_sequences: N, individuals.
        weights: shape (C,), probabilities of the components.
        emissions, holes, seed: as in `simulate_hmm`, with components for states.

    Raises:
        DataError: there is nothing to simulate, or shapes differ.

    >>> import pyro.distributions as dist
    >>> yes = dist.Bernoulli(torch.tensor([0.1, 0.9]))
    >>> data, truth = simulate_mixture(100, torch.tensor([0.5, 0.5]), {"a": yes, "b": yes})
    >>> truth.kinds.shape
    torch.Size([100])
    """
    check_sizes(num_sequences, rows, None, holes)
    check_emissions(emissions, len(weights))
    with seeded(seed):
        kinds = torch.multinomial(weights, num_sequences, replacement=True)
        data, _ = observed(kinds.expand(rows, -1), emissions, holes, {})
    return data, Truth({"weights": weights}, None, kinds)
