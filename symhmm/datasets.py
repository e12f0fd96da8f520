"""Data to try things on: one classic series of counts, and simulated individuals whose truth is known."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from symhmm.errors import DataError
from symhmm.tables.data import SequenceData

# Earthquakes of magnitude 7 or more in the world, 1900-2006 (US Geological Survey; Zucchini, MacDonald and Langrock
# 2016, table 1.1).
_EARTHQUAKES = """
    13 14  8 10 16 26 32 27 18 32 36 24 22 23 22 18 25 21 21 14  8 11 14 23 18 17 19 20 22 19 13 26 13 14 22 24
    21 22 26 21 23 24 27 41 31 27 35 26 28 36 39 21 17 22 17 19 15 34 10 15 22 18 15 20 15 22 19 16 30 27 29 23
    20 16 21 21 25 16 18 15 18 14 10 15  8 15  6 11  8  7 18 16 13 12 13 20 15 16 12 18 15 16 13 15 16 11 11
"""


def earthquakes() -> Tensor:
    """Number of major earthquakes in the world in each year from 1900 to 2006.

    Source: US Geological Survey, as in Zucchini, MacDonald and Langrock (2016), *Hidden Markov Models for Time Series*.

    Returns:
        shape (107,), counts as floats of the default dtype, oldest first.

    >>> counts = earthquakes()
    >>> len(counts), counts[:3]
    (107, tensor([13., 14.,  8.]))
    """
    return torch.tensor([float(count) for count in _EARTHQUAKES.split()])


@dataclass(frozen=True)
class MixedTruth:
    """What `simulate_mixed_hmm` drew its data from.

    Args:
        logits: shape (K, K), population transition logits, 0 on the diagonal; [i, j] is from i to j.
        spread: shape (K, K), standard deviations of the individuals' logits, 0 on the diagonal.
        effects: shape (N, K, K), what each individual adds to ``logits``.
        loc: shape (K,), mean of each state's observations.
        scale: shape (K,), their standard deviation.
        states: shape (T, N), int64; -1 after the end of a sequence.
    """

    logits: Tensor
    spread: Tensor
    effects: Tensor
    loc: Tensor
    scale: Tensor
    states: Tensor

    @property
    def transitions(self) -> Tensor:
        """Shape (N, K, K): each individual's transition probabilities, [n, i, j] from i to j."""
        return (self.logits + self.effects).softmax(-1)


def simulate_mixed_hmm(
    num_sequences: int = 20,
    num_steps: int = 200,
    num_states: int = 3,
    *,
    emission: Literal["gaussian", "poisson"] = "gaussian",
    shortest: int | None = None,
    missing: float = 0.0,
    spread: float | Tensor = 0.5,
    logits: Tensor | None = None,
    loc: Tensor | None = None,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
    generator: torch.Generator | None = None,
) -> tuple[SequenceData, MixedTruth]:
    """Simulate a hidden Markov model whose transition logits differ between individuals.

    Individual n leaves state i for j with probability ``softmax_j(logits[i, j] + effects[n, i, j])``. The effects off
    the diagonal are independent and normal with mean 0 and standard deviation ``spread``, those on the diagonal are 0.
    The first state is uniform. The same seed gives the same data.

    Args:
        num_sequences: N, individuals.
        num_steps: T, steps of the longest sequence.
        num_states: K.
        emission: ``"gaussian"``, y ~ Normal(loc, scale), or ``"poisson"``, y ~ Poisson(loc).
        shortest: lengths are uniform between this and T, and one sequence has T steps; None gives all of them T.
        missing: probability that a step inside a sequence has no observation.
        spread: scalar or shape (K, K), standard deviation between individuals, logit scale; 0 gives a plain model.
        logits: shape (K, K), diagonal 0 (else it is subtracted from its row); None gives -2 off the diagonal.
        loc: shape (K,); None gives 3 standard deviations between neighbours, or rates 2, 6, 18, ...
        scale: shape (K,), positive; None gives 1. Not for Poisson.
        dtype: of the numbers; None is torch's default.
        generator: source of the random numbers; None uses torch's own.

    Returns:
        the data, and the truth behind them.

    Raises:
        DataError: sizes below 1, ``missing`` outside [0, 1), a negative ``spread``, or an unknown ``emission``.

    >>> data, truth = simulate_mixed_hmm(4, 50, 2, shortest=30, missing=0.1, generator=torch.Generator().manual_seed(1))
    >>> data
    SequenceData: 4 individuals, 31-50 steps, torch.float32
      y  stream  19 missing, -3.364 to 3.19
    >>> data.y[0].shape, truth.transitions.shape
    (torch.Size([4]), torch.Size([4, 2, 2]))
    """
    least = num_steps if shortest is None else shortest
    _check(num_sequences, num_states, least, num_steps, missing, emission)
    n, t, k = num_sequences, num_steps, num_states
    dtype = torch.get_default_dtype() if dtype is None else dtype
    off_diagonal = 1 - torch.eye(k, dtype=dtype)

    # Step 1: the population.
    logits = 0 - 2 * off_diagonal if logits is None else logits - logits.diagonal().unsqueeze(-1)
    spread = torch.as_tensor(spread, dtype=dtype) * off_diagonal
    if (spread < 0).any():
        raise DataError(
            "spread of the individuals is negative.",
            details=[f"smallest entry {spread.min().item():g}, wanted >= 0"],
            suggestion="give standard deviations, 0 for effects that do not vary.",
        )
    poisson = emission == "poisson"
    if loc is None:
        order = torch.arange(k, dtype=dtype)
        loc = 2 * 3**order if poisson else 3 * (order - (k - 1) / 2)
    if scale is None or poisson:
        scale = loc.sqrt() if poisson else torch.ones(k, dtype=dtype)

    # Step 2: individuals, and their paths through the states.
    effects = spread * torch.randn(n, k, k, dtype=dtype, generator=generator)
    lengths = torch.randint(least, t + 1, (n,), generator=generator)
    lengths[0] = t
    states = _paths((logits + effects).softmax(-1), t, generator)

    # Step 3: what is seen of them.
    if poisson:
        y = torch.poisson(loc[states], generator=generator)
    else:
        y = loc[states] + scale[states] * torch.randn(t, n, dtype=dtype, generator=generator)
    inside = torch.arange(t).unsqueeze(-1) < lengths
    mask = inside & (torch.rand(t, n, generator=generator) >= missing)
    data = SequenceData.from_tensors({"y": y}, observed=mask, lengths=lengths)
    return data, MixedTruth(logits, spread, effects, loc, scale, torch.where(inside, states, -1))


def _paths(transitions: Tensor, num_steps: int, generator: torch.Generator | None) -> Tensor:
    """States of shape (T, N) drawn from transition probabilities of shape (N, K, K) and a uniform start."""
    n, k, _ = transitions.shape
    rows = torch.arange(n)
    state = torch.randint(k, (n,), generator=generator)
    path = [state]
    for _ in range(num_steps - 1):
        state = torch.multinomial(transitions[rows, state], 1, generator=generator).squeeze(-1)
        path.append(state)
    return torch.stack(path)


def _check(sequences: int, states: int, shortest: int, steps: int, missing: float, emission: str) -> None:
    """Raise `DataError` for sizes and names that no simulation can have."""
    if min(sequences, states) < 1 or not 1 <= shortest <= steps:
        raise DataError(
            "there is nothing to simulate.",
            details=[f"seen {sequences} sequences of {shortest} to {steps} steps and {states} states"],
            suggestion="give at least one of each, and shortest <= num_steps.",
        )
    if not 0 <= missing < 1:
        raise DataError(f"missing = {missing} is not a probability below 1.", suggestion="0.1 for one step in ten.")
    if emission not in ("gaussian", "poisson"):
        raise DataError(f"unknown emission {emission!r}.", suggestion="'gaussian' or 'poisson'.")
