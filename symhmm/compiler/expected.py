"""Expected: the complete-data log-density of a program, weighted by the posterior of its discrete latents."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import lower
from symhmm.graph import FactorGraph


@dataclass(frozen=True, eq=False)
class Expected:
    """The E-step of Dempster, Laird and Rubin (1977) at given values.

    Args:
        log_density: nats, shape (), of the observed data with all discrete latents summed out.
        weights: derivative of ``log_density`` with respect to each factor of the graph, in its order and of its shape: the
            posterior probability of the states that the factor reads, times what it counts for.
        value: nats, shape (), the expected complete log-density, ``sum(weights * factors)``. As a function of the values it
            is differentiable as often as the program, with the weights held; its gradient is that of ``log_density``
            (Fisher's identity).
        terms: the factors themselves, nats.
    """

    log_density: Tensor
    weights: tuple[Tensor, ...]
    value: Tensor
    terms: tuple[Tensor, ...]


def e_step(density: Density, values: Mapping[str, Tensor]) -> Expected:
    """Posterior weights at constrained ``values``, by one backward pass through the contraction.

    >>> import pyro, pyro.distributions as dist
    >>> from symhmm.compiler.density import compile
    >>> def model(y):
    ...     z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.5)))
    ...     pyro.sample("y", dist.Bernoulli(torch.tensor([0.2, 0.6])[z.long()]), obs=y)
    >>> e_step(compile(model, torch.tensor(1.0)), {}).weights[0]
    tensor([0.2500, 0.7500])
    """
    terms = _terms(density, values)
    leaves = [t.detach().requires_grad_() for t in terms]
    with torch.enable_grad():
        total = lower(_with(density.graph, leaves), density.plan)
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    weights = tuple(w.detach() for w in found)
    return Expected(total.detach(), weights, _weighted(terms, weights), tuple(leaves))


def expected_log_density(density: Density, values: Mapping[str, Tensor], weights: tuple[Tensor, ...]) -> Tensor:
    """``Expected.value`` at other ``values`` with the same weights, nats, shape (); differentiable."""
    return _weighted(_terms(density, values), weights)


def _terms(density: Density, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [_data(f.term) for f in density.factors_at(values).factors]


def _data(term: Any) -> Tensor:
    return term.data if isinstance(term.data, Tensor) else torch.as_tensor(term.data)


def _with(graph: FactorGraph, terms: list[Tensor]) -> FactorGraph:
    pairs = zip(graph.factors, terms, strict=True)
    return replace(graph, factors=tuple(replace(f, term=Term(x, f.term.inputs)) for f, x in pairs))


def _weighted(terms: list[Tensor], weights: tuple[Tensor, ...]) -> Tensor:
    # What is impossible has weight zero and counts for nothing, rather than for 0 * -inf.
    pieces = [torch.where(w == 0, 0.0, t * w).sum() for t, w in zip(terms, weights, strict=True)]
    return torch.stack(pieces).sum() if pieces else torch.zeros(())
