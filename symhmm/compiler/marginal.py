"""`marginalize`: a program without its discrete latents, for every algorithm that Pyro itself has."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import pyro

from symhmm.capture.open import outer_plates
from symhmm.capture.program import capture
from symhmm.compiler.arguments import take_apart
from symhmm.compiler.lower import lower
from symhmm.compiler.plan import plan
from symhmm.graph import Recipe


def marginalize(program: Callable[..., Any], *, name: str = "log_marginal") -> Callable[..., None]:
    """An ordinary Pyro program whose discrete latents have been summed out.

    Parameters and continuous latents are statements of the new program, under the same names, plates and priors, so that
    Pyro's SVI, NUTS, autoguides, ``Predictive`` and handlers work on it; all that is observed enters through one
    ``pyro.factor`` called ``name``, which depends on no discrete latent. The program runs at each evaluation, with time
    loops for all steps at once; `compile` is the faster way where symhmm's own drivers serve.

    Handlers that condition or block observed or discrete sites belong inside: ``marginalize(condition(program, ...))``.

    >>> import torch, pyro.distributions as dist
    >>> def program(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("y", dist.Normal(mu * z, 1.0), obs=y)
    >>> trace = pyro.poutine.trace(marginalize(program)).get_trace(torch.tensor(0.0))
    >>> [name for name in trace.nodes if not name.startswith("_")]
    ['mu', 'log_marginal']
    """
    recipes: dict[Hashable, Recipe] = {}

    def marginal(*args: Any, **kwargs: Any) -> None:
        key = take_apart(args, kwargs).signature
        if key not in recipes:
            graph = capture(program, args, kwargs).check()
            assert graph.recipe is not None
            inside_loop = any(
                f.role == "continuous latent" and set(f.frames) & set(graph.chains) for f in graph.factors
            )
            # A latent of each step is a statement of each step: such loops cannot be run for all steps at once.
            recipes[key] = replace(graph.recipe, tier="unrolled") if inside_loop else graph.recipe
        outside = outer_plates()
        nesting = max([recipes[key].max_plate_nesting, *(-dim for dim in outside.values())])
        recipe = replace(recipes[key], max_plate_nesting=nesting)
        graph = capture(program, args, kwargs, recipe=recipe, open=True).check()
        kept = sorted(p for p in outside if p in graph.plates)
        log_prob = lower(graph, plan(graph, keep=kept))
        # From named plates to the positions that Pyro gave them.
        shape = [1] * max((-outside[p] for p in kept), default=0)
        for p, size in zip(kept, log_prob.shape, strict=True):
            shape[outside[p]] = size
        order = sorted(range(len(kept)), key=lambda i: outside[kept[i]])
        pyro.factor(name, log_prob.permute(order).reshape(shape) if kept else log_prob)

    return marginal
