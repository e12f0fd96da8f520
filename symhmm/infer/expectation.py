"""Expectation: the E-step of a target, and the expected complete log-density as a function of its coordinates."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.expected import Expected, e_step, expected_log_density, expected_slopes
from symhmm.infer.closed_forms import Index
from symhmm.infer.lbfgs import Evaluate
from symhmm.infer.target import Array, Target

RECORDED = 8  # curvatures beyond which recording them, one after the other, costs more than it saves


@dataclass(frozen=True, eq=False)
class Expectation:
    """The E-step at ``u`` with the weights that it found.

    Args:
        u: shape (n,), coordinates of the target.
        leaves: tensors that the values were made of, one for each entry of the layout, so that derivatives of one entry do not
            visit the factors of the others; a single one, of ``u`` itself, where coordinates are tied or ordered.
        expected: weights and expected complete log-density, differentiable in ``leaves``.
    """

    goal: Target
    u: Array
    leaves: tuple[Tensor, ...]
    expected: Expected

    @property
    def value(self) -> float:
        """Log-density of the observed data, nats."""
        return self.expected.log_density.item()

    @cached_property
    def _slopes(self) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(
                self.expected.value, self.leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )

    @cached_property
    def gradient(self) -> Array:
        """Of the log-density and of the expected one alike, shape (n,)."""
        return self._gathered([s.detach() for s in self._slopes])

    def along(self, direction: Array) -> Array:
        """Hessian of the expected log-density times a direction, shape (n,)."""
        pieces = self._scattered(direction)
        moved = [(s, d) for s, d in zip(self._slopes, pieces, strict=True) if s.requires_grad and bool(d.any())]
        if not moved:
            return np.zeros_like(self.u)
        with torch.enable_grad():
            slope = torch.stack([(s * d).sum() for s, d in moved]).sum()
            found = torch.autograd.grad(
                slope, self.leaves, retain_graph=True, allow_unused=True, materialize_grads=True
            )
        return self._gathered(found)

    def curvature(self, directions: Array) -> Array:
        """`along` each of ``directions``, shape (C, n)."""
        return np.stack([self.along(d) for d in directions]) if len(directions) else np.zeros((0, self.u.size))

    def moved(self, u: Array) -> "Expectation":
        """The expected log-density with the same weights at other coordinates."""
        leaves, values = _leaves(self.goal, u)
        with torch.enable_grad():
            value = expected_log_density(self.goal.density, values, self.expected.weights)
        return Expectation(self.goal, u, leaves, replace(self.expected, value=value))

    def evaluate(self, free: Index, held: Array) -> Evaluate:
        """The expected log-density and its gradient over the coordinates ``free``, the others held at those of ``held``."""

        def evaluate(x: Array) -> tuple[float, Array]:
            u = held.copy()
            u[free] = x
            there = self.moved(u)
            return there.expected.value.item(), there.gradient[free]

        return evaluate

    def _gathered(self, pieces: tuple[Tensor, ...] | list[Tensor]) -> Array:
        return _gather(self.goal, pieces)

    def _scattered(self, direction: Array) -> list[Tensor]:
        row = torch.from_numpy(direction).to(self.goal.start.dtype)
        if self.goal.restriction is not None:
            return [row]
        whole = torch.zeros_like(self.goal.start).index_put((self.goal.free,), row)
        return [whole[e.start : e.stop] for e in self.goal.entries]


@dataclass(frozen=True, eq=False)
class Measured:
    """What one iteration of EM reads at ``u``, as numbers.

    Args:
        u: shape (n,), coordinates of the target.
        value: log-density of the observed data, nats.
        gradient: shape (n,), of the log-density and of the expected one alike.
        curvature: shape (C, n), Hessian of the expected log-density times each of C directions.
    """

    goal: Target
    u: Array
    value: float
    gradient: Array
    curvature: Array

    @cached_property
    def expectation(self) -> Expectation:
        """The E-step once more, with its weights."""
        return expectation(self.goal, self.u)


def measured(goal: Target, u: Array, directions: Array) -> Measured:
    """The E-step of ``goal`` at ``u`` and what an M-step in closed form needs of it, replayed from one recording."""
    if len(directions) > RECORDED:
        there = expectation(goal, u)
        return Measured(goal, u, there.value, there.gradient, there.curvature(directions))
    like = goal.start

    def values(x: Tensor, start: Tensor, *fixed: Tensor) -> Mapping[str, Tensor]:
        there = replace(goal, start=start, fixed=dict(zip(goal.fixed, fixed, strict=True)))
        return there.values(there.embed(x))

    value, gradient, curvature = expected_slopes(
        goal.density,
        goal.key,
        values,
        torch.from_numpy(u).to(like.dtype),
        torch.from_numpy(directions).to(like.dtype),
        like,
        *goal.fixed.values(),
    )
    return Measured(goal, u, value.item(), gradient.double().numpy(), curvature.double().numpy())


def expectation(goal: Target, u: Array) -> Expectation:
    """The E-step of ``goal`` at the coordinates ``u``."""
    leaves, values = _leaves(goal, u)
    with torch.enable_grad():
        return Expectation(goal, u, leaves, e_step(goal.density, values))


def _leaves(goal: Target, u: Array) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
    free = torch.from_numpy(u).to(goal.start.dtype)
    with torch.enable_grad():
        if goal.restriction is not None:
            leaf = free.requires_grad_()
            return (leaf,), goal.values(goal.embed(leaf))
        vector = goal.embed(free)
        leaves = tuple(vector[e.start : e.stop].clone().requires_grad_() for e in goal.entries)
        made = {
            e.name: e.transform(x.reshape(e.free_shape)).to(e.dtype) for e, x in zip(goal.entries, leaves, strict=True)
        }
    return leaves, {**made, **goal.fixed}


def _gather(goal: Target, pieces: tuple[Tensor, ...] | list[Tensor]) -> Array:
    flat = torch.cat([p.reshape(-1) for p in pieces])
    if goal.restriction is None and flat.numel() != goal.size:
        whole = torch.zeros_like(goal.start)
        for e, p in zip(goal.entries, pieces, strict=True):
            whole[e.start : e.stop] = p
        flat = whole[goal.free]
    out: Array = flat.double().numpy()
    return out
