"""Reweighted: draws of a guide with the weights that make them draws of the posterior."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from symhmm.tables.results import Normal, Posterior


@dataclass(frozen=True, eq=False)
class Reweighted:
    """A posterior as weighted draws of a guide.

    Args:
        guide: of which they were drawn.
        draws: shape (S, size), unconstrained vectors.
        weights: shape (S,), sum one.
    """

    guide: Posterior
    draws: Tensor
    weights: Tensor

    @property
    def blocks(self) -> tuple[Normal, ...]:
        """Of the guide."""
        return self.guide.blocks

    @cached_property
    def vector(self) -> Tensor:
        """Weighted median of each unconstrained coordinate, shape (size,)."""
        values, order = self.draws.sort(0)
        below = self.weights[order].cumsum(0) < 0.5
        return values.gather(0, below.sum(0, keepdim=True).clamp(max=len(values) - 1))[0]

    @cached_property
    def sd(self) -> Tensor:
        """Standard deviation of each unconstrained coordinate, shape (size,); zero for points."""
        away = self.draws - self.draws[0]  # so that points differ by exactly nothing
        away = away - self.weights @ away
        return (self.weights @ away.square()).sqrt()

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Unconstrained vectors, shape (draws, size), each as often as its weight says up to one; the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        comb = (torch.arange(draws, dtype=self.weights.dtype) + torch.rand((), generator=generator)) / draws
        chosen = torch.searchsorted(self.weights.cumsum(0), comb).clamp(max=len(self.weights) - 1)
        return self.draws[chosen[torch.randperm(draws, generator=generator)]]

    def permuted(self, source: Tensor) -> "Reweighted":
        """The same posterior with coordinate ``source[i]`` as number i."""
        return Reweighted(self.guide.permuted(source), self.draws[:, source], self.weights)
