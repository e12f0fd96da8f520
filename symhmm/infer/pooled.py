"""Pooled: the fit in which all states share what they explain, closed forms found there, and starts around it.

A program's own start may lie far from its data: locations at zero for data in the thousands. Then one state explains
everything as soon as a climb begins, and the others are never used again. The fit in which every state has the same share of
everything is found in a few steps from anywhere, and tells the scale of the data; states are told apart around it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from symhmm.compiler.density import Density
from symhmm.infer.closed_forms import Along, Forms, find
from symhmm.infer.expectation import Expectation, expectation
from symhmm.infer.information import count_observations
from symhmm.infer.starts import bounded_scales, draw_starts, jitter_sizes, scales, unrestricted
from symhmm.infer.target import Array, Target

MOST = 600  # coordinates beyond which the M-step is left to L-BFGS
STEPS = 30  # M-steps to the pooled fit
STILL = 1e-3  # nats that another one must gain
OFF = 0.3  # jitter, in standard errors of one observation, of the point where forms are looked for


@dataclass(frozen=True)
class Search:
    """How starts are looked for: ``seed``, ``restarts``, ``jitter`` and ``screen`` of `symhmm.infer.mle.run`.

    ``keep``: the own start was asked for. It is kept without jitter, and with jitter of some values only, as well.
    """

    seed: int = 0
    restarts: int = 4
    jitter: float | Mapping[str, float] = 1.0
    screen: int = 10
    keep: bool = False


@dataclass(frozen=True, eq=False)
class Starts:
    """Where a driver starts.

    Args:
        points: each of shape (n,), coordinates of the target.
        scale: shape (n,), standard error that one observation would leave on each coordinate.
        forms: closed forms of the M-step.
        evaluations: passes through the density that this has cost.
    """

    points: tuple[Array, ...]
    scale: Array
    forms: Forms
    evaluations: int


def starts(goal: Target, search: Search) -> Starts:
    """Starting points around the program's own start, or around the pooled fit where that explains the data better.

    As many as there are restarts. Around its own start, the first is the program's own, hardly moved. What is tied or ordered
    is drawn as if it were not, and then tied or put in order.
    """
    count = 0

    def counted(at: Target) -> Callable[[Array], tuple[float, Array]]:
        def evaluate(x: Array) -> tuple[float, Array]:
            nonlocal count
            count += 1
            return at.evaluate(x)

        return evaluate

    def value(at: Target, x: Array) -> float:
        nonlocal count
        count += 1
        return _value(at, x)

    free, kept = unrestricted(goal)
    sizes = jitter_sizes(free, search.jitter)
    n, own, origin = max(count_observations(goal.density), 1), True, free.x
    found, forms = _formed(free, origin, n, search.seed)
    if found is None:
        scale = scales(counted(free), origin, n)
    else:
        if goal.density.graph.variables and not (
            search.keep or isinstance(search.jitter, Mapping) or search.jitter == 0
        ):
            pooled = _pooled(found, forms)
            if value(free, pooled.u) > value(free, origin) and pooled.u is not found.u:
                own, origin, found = False, pooled.u, pooled
        scale = bounded_scales(_size(found, forms), origin, n)
    drawn = draw_starts(
        lambda x: value(goal, kept(x)), origin, scale * sizes, search.restarts,
        seed=search.seed, screen=search.screen, own=own,
    )  # fmt: skip
    if free is not goal:
        found, forms = _formed(goal, kept(origin), n, search.seed)
        scale = (
            scales(counted(goal), kept(origin), n) if found is None else bounded_scales(_size(found, forms), found.u, n)
        )
    return Starts(tuple(kept(x) for x in drawn), scale, forms, count)


def _formed(goal: Target, x: Array, n_observations: int, seed: int) -> tuple[Expectation | None, Forms]:
    """The expectation at ``x`` with weights shared equally, None where it is of no use, and closed forms of the M-step."""
    # A density with effects integrated out is no product of factors.
    if isinstance(goal.density, Density) and goal.size <= MOST:
        shared = _averaged(expectation(goal, x))
        if np.isfinite(shared.gradient).all() and np.isfinite(shared.expected.value.item()):
            # Whether a block has a form may depend on the numbers that are held.
            held = tuple(tuple(v.flatten().tolist()) for v in goal.fixed.values())
            key = ("forms", held, goal.key)
            return shared, goal.density.compiled.once(key, lambda: _forms(shared, n_observations, seed))
    return None, Forms(goal.size, (), np.arange(goal.size))


def _value(goal: Target, x: Array) -> float:
    """Log-density in nats, without its gradient where it can be had so."""
    if not isinstance(goal.density, Density):
        return goal.evaluate(x)[0]
    with torch.no_grad():
        return goal.density.log_prob(goal.values(goal.embed(torch.from_numpy(x).to(goal.start.dtype)))).item()


def _averaged(at: Expectation) -> Expectation:
    """The same with weights shared equally by all states that are possible."""
    graph = at.goal.density.graph
    weights = []
    for f, w, term in zip(graph.factors, at.expected.weights, at.expected.terms, strict=True):
        states = [i for i, n in enumerate(f.inputs) if n in graph.variables]
        if states:
            possible = (term > -torch.inf).to(w.dtype)
            w = w.sum(states, keepdim=True) * possible / possible.sum(states, keepdim=True).clamp(min=1.0)
        weights.append(w)
    return replace(at, expected=replace(at.expected, weights=tuple(weights))).moved(at.u)


def _pooled(shared: Expectation, forms: Forms) -> Expectation:
    """M-steps with the weights held, as long as they gain, of what the data depend on.

    What only latents depend on (weights, moves between states) keeps its start: shared states say nothing about it.
    """
    graph = shared.goal.density.graph
    weights = [
        torch.zeros_like(w) if f.role == "discrete latent" else w
        for f, w in zip(graph.factors, shared.expected.weights, strict=True)
    ]
    data = replace(shared, expected=replace(shared.expected, weights=tuple(weights))).moved(shared.u)
    seen = data.along(np.random.default_rng(0).standard_normal(shared.u.size)) != 0
    here = shared
    for _ in range(STEPS):
        aim, _ = forms.update(here.u, here.gradient, here.curvature(forms.directions()))
        there = here.moved(np.where(seen, aim, here.u))
        gain = there.expected.value.item() - here.expected.value.item()
        if not gain > 0 or not np.isfinite(there.gradient).all():
            break
        here = there
        if gain < STILL:
            break
    return here


def _size(at: Expectation, forms: Forms) -> Array:
    """Size of the curvature of each coordinate."""
    return forms.update(at.u, at.gradient, at.curvature(forms.directions()))[1]


def _forms(shared: Expectation, n_observations: int, seed: int) -> Forms:
    """Closed forms, looked for away from points where derivatives vanish because states are alike."""
    n = shared.u.size
    size = np.abs(np.array([shared.along(row)[i] for i, row in enumerate(np.eye(n))]))
    noise = OFF * np.random.default_rng(seed).uniform(0.5, 1.0, n)
    return find(
        lambda x: _derivatives(shared.moved(x)), shared.u + noise * bounded_scales(size, shared.u, n_observations)
    )


def _derivatives(at: Expectation) -> tuple[Array, Along]:
    return at.gradient, at.along
