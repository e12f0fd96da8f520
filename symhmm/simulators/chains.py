"""Simulated chains: hidden Markov models with covariates and random effects, semi-Markov models, and continuous time."""

from collections.abc import Callable

import torch
from torch import Tensor

from symhmm.distributions import generator_matrix, stationary_distribution, stationary_of_generator, transition_after
from symhmm.simulators.holes import WHOLE, Emissions, Holes, Truth, check_emissions, check_sizes, observed, seeded
from symhmm.tables.data import SequenceData


def simulate_hmm(
    num_sequences: int,
    num_steps: int,
    transition: Tensor,
    emissions: Emissions,
    *,
    initial: Tensor | None = None,
    sessions: int | None = None,
    slope: Tensor | None = None,
    spread: float | Tensor = 0.0,
    weights: Tensor | None = None,
    holes: Holes = WHOLE,
    seed: int = 0,
) -> tuple[SequenceData, Truth]:
    """Simulate hidden Markov chains, with a covariate, random effects or kinds of individuals where asked for.

    Individual n leaves state i for j at step t with a probability proportional to
    ``transition[i, j] * exp(slope[i, j] * x[t, n] + effects[n, i, j])``.

    Args:
        num_sequences: N, individuals.
        num_steps: T, steps of the longest sequence.
        transition: shape (K, K), probabilities, [from, to]; (C, K, K) for C kinds of individuals.
        emissions: by stream, a distribution of batch shape (K,); by several streams, one of vectors of them.
        initial: shape (K,), distribution of the first state; None is the stationary distribution.
        sessions: S, chains of each individual; None gives each one chain and no dimension for sessions.
        slope: shape (K, K), effect of a standard normal covariate ``x`` on the logits; its diagonal counts too.
        spread: scalar or shape (K, K), standard deviation of the individuals' effects off the diagonal, logit scale.
        weights: shape (C,), probabilities of the kinds.
        holes: what is missing.
        seed: the same seed gives the same data.

    Returns:
        the data, with ``x`` among the covariates where there is a slope, and the truth.

    Raises:
        DataError: there is nothing to simulate, or shapes differ.

    >>> import pyro.distributions as dist
    >>> data, truth = simulate_hmm(
    ...     4, 50, torch.tensor([[0.9, 0.1], [0.2, 0.8]]), {"y": dist.Poisson(torch.tensor([1.0, 9.0]))}, seed=1)
    >>> data.y.shape, truth.states.shape
    (torch.Size([50, 4]), torch.Size([50, 4]))
    """
    kinds, matrix = None, torch.as_tensor(transition)
    states = matrix.shape[-1]
    check_sizes(num_sequences, num_steps, sessions, holes)
    check_emissions(emissions, states)
    size = (num_steps, *([] if sessions is None else [sessions]), num_sequences)
    with seeded(seed):
        if weights is not None:
            kinds = torch.multinomial(weights, num_sequences, replacement=True)
            matrix = matrix[kinds]
        effects = spread * torch.randn(num_sequences, states, states, dtype=matrix.dtype) * (1 - torch.eye(states))
        logits = matrix.log() + effects.to(matrix)
        x = torch.randn(size, dtype=matrix.dtype)
        begin = (
            stationary_distribution(logits.softmax(-1)) if initial is None else initial.expand(num_sequences, states)
        )

        def move(t: int) -> Tensor:
            own = logits if slope is None else logits + slope * x[t][..., None, None]
            return own.softmax(-1).expand(*size[1:], states, states)

        z = _walk(begin.expand(*size[1:], states), move, num_steps)
        covariates = {} if slope is None else {"x": x}
        data, z = observed(z, emissions, holes, covariates)
    given = {"transition": transition, "weights": weights, "slope": slope, "spread": spread, "initial": initial}
    parameters = {n: v for n, v in given.items() if v is not None}
    return data, Truth(parameters, z, kinds, {"transition": effects} if torch.as_tensor(spread).any() else {})


def simulate_semi_markov(
    num_sequences: int,
    num_steps: int,
    dwell: Tensor,
    emissions: Emissions,
    *,
    moves: Tensor | None = None,
    holes: Holes = WHOLE,
    seed: int = 0,
) -> tuple[SequenceData, Truth]:
    """Simulate chains whose states last for times with distributions of their own; a state begins with the data.

    Args:
        dwell: shape (K, R), probabilities of dwell times 1, ..., R.
        moves: shape (K, K), probabilities of the next state, 0 on the diagonal; None takes all others alike.
        num_sequences, num_steps, emissions, holes, seed: as in `simulate_hmm`.

    Raises:
        DataError: there is nothing to simulate, or shapes differ.

    >>> import pyro.distributions as dist
    >>> three = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    >>> data, truth = simulate_semi_markov(1, 7, three, {"y": dist.Normal(torch.tensor([0.0, 9.0]), 1.0)}, seed=1)
    >>> truth.states[:, 0]
    tensor([1, 1, 1, 0, 0, 0, 1])
    """
    states = len(dwell)
    check_sizes(num_sequences, num_steps, None, holes)
    check_emissions(emissions, states)
    chain = (torch.ones(states, states) - torch.eye(states)) if moves is None else moves
    with seeded(seed):
        z = torch.randint(states, (num_sequences,))
        left = torch.multinomial(dwell[z], 1).squeeze(-1) + 1
        path = []
        for _ in range(num_steps):
            path.append(z)
            left = left - 1
            new = torch.multinomial(chain[z], 1).squeeze(-1)
            over = left == 0
            z = torch.where(over, new, z)
            left = torch.where(over, torch.multinomial(dwell[z], 1).squeeze(-1) + 1, left)
        data, states_seen = observed(torch.stack(path), emissions, holes, {})
    return data, Truth({"dwell": dwell, "moves": chain}, states_seen)


def simulate_continuous_time(
    num_sequences: int,
    num_steps: int,
    rates: Tensor,
    emissions: Emissions,
    *,
    apart: float = 1.0,
    holes: Holes = WHOLE,
    seed: int = 0,
) -> tuple[SequenceData, Truth]:
    """Simulate chains in continuous time, observed at the times of a Poisson process; ``time`` is a covariate.

    Args:
        rates: shape (K, K - 1), moves per unit of time, row by row without the diagonal.
        apart: mean time between observations.
        num_sequences, num_steps, emissions, holes, seed: as in `simulate_hmm`.

    Raises:
        DataError: there is nothing to simulate, or shapes differ.

    >>> import pyro.distributions as dist
    >>> data, _ = simulate_continuous_time(2, 9, torch.tensor([[0.1], [0.3]]), {"y": dist.Poisson(torch.tensor([1.0, 9.0]))})
    >>> (data.time.diff(dim=0) > 0).all()
    tensor(True)
    """
    states = len(rates)
    check_sizes(num_sequences, num_steps, None, holes)
    check_emissions(emissions, states)
    generator = generator_matrix(rates)
    with seeded(seed):
        waits = -apart * torch.rand(num_steps, num_sequences, dtype=rates.dtype).clamp_min(1e-12).log()
        begin = stationary_of_generator(generator).expand(num_sequences, states)
        z = _walk(begin, lambda t: transition_after(generator, waits[t]), num_steps)
        data, z = observed(z, emissions, holes, {"time": waits.cumsum(0)})
    return data, Truth({"rates": rates}, z)


def _walk(begin: Tensor, move: Callable[[int], Tensor], steps: int) -> Tensor:
    """States of shape (T, *batch): the first from ``begin`` (*batch, K), step t from ``move(t)`` (*batch, K, K)."""
    states = begin.shape[-1]
    z = torch.multinomial(begin.reshape(-1, states), 1).reshape(begin.shape[:-1])
    path = [z]
    for t in range(1, steps):
        rows = move(t).reshape(-1, states, states)
        z = torch.multinomial(rows[torch.arange(len(rows)), z.flatten()], 1).reshape(z.shape)
        path.append(z)
    return torch.stack(path)
