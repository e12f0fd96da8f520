"""Expected: the complete-data log-density of a program, weighted by the posterior of its discrete latents."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symhmm.compiler.density import Density, Key, with_terms
from symhmm.compiler.lower import lower
from symhmm.compiler.steps import Plan
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
    return _weighed(density.factors_at(values), density.plan)


def expected_slopes(
    density: Density,
    key: Key,
    values: Callable[..., Mapping[str, Tensor]],
    u: Tensor,
    directions: Tensor,
    *others: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The log-density at ``values(u, *others)``, its gradient in ``u``, and curvatures of the expected one: all of an EM step.

    Recorded once and replayed, which takes a third of the time of `e_step` and its derivatives.

    Args:
        key: says which function ``values`` is.
        values: constrained values of the density, by name; differentiable.
        u: shape (n,).
        directions: shape (C, n).
        others: what ``values`` depends on besides, without derivatives.

    Returns:
        Nats, shape (); shape (n,); shape (C, n), the Hessian of `Expected.value` times each direction.
    """

    def slopes(
        factors: Callable[[Mapping[str, Tensor]], FactorGraph], u: Tensor, directions: Tensor, *others: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            found = _weighed(factors(values(leaf, *others)), density.plan)
            slope = _gradient(found.value, leaf, create_graph=True)
            rows = [_gradient((slope * d).sum(), leaf) for d in directions.unbind(0)]
        return found.log_density, slope.detach(), torch.stack(rows) if rows else directions

    value, gradient, rows = density.numbers(("expected", len(directions), *key), slopes, (u, directions, *others))
    return value, gradient, rows


def expected_log_density(density: Density, values: Mapping[str, Tensor], weights: tuple[Tensor, ...]) -> Tensor:
    """``Expected.value`` at other ``values`` with the same weights, nats, shape (); differentiable."""
    return _weighted(_terms(density, values), weights)


def _terms(density: Density, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [_data(f.term) for f in density.factors_at(values).factors]


def _weighed(graph: FactorGraph, plan: Plan) -> Expected:
    terms = [_data(f.term) for f in graph.factors]
    leaves = [t.detach().requires_grad_() for t in terms]
    with torch.enable_grad():
        total = lower(with_terms(graph, leaves), plan)
        found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    weights = tuple(w.detach() for w in found)
    return Expected(total.detach(), weights, _weighted(terms, weights), tuple(leaves))


def _gradient(value: Tensor, leaf: Tensor, *, create_graph: bool = False) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(
        value, leaf, retain_graph=True, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return found


def _data(term: Any) -> Tensor:
    return term.data if isinstance(term.data, Tensor) else torch.as_tensor(term.data)


def _weighted(terms: list[Tensor], weights: tuple[Tensor, ...]) -> Tensor:
    # What is impossible has weight zero and counts for nothing, rather than for 0 * -inf.
    pieces = [torch.where(w == 0, 0.0, t * w).sum() for t, w in zip(terms, weights, strict=True)]
    return torch.stack(pieces).sum() if pieces else torch.zeros(())
