"""Simulation: the program run forwards at fitted values, with everything that was observed drawn anew."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.evaluated import Values
from symhmm.posterior.series import Loop, at_label, loops
from symhmm.tables.states import Answers, Labelled

DRAW = "draw"


def simulate(density: Density, values: Values, draws: int = 1, *, seed: int = 0, new_members: bool = False) -> Answers:
    """New data and their hidden states, drawn from the program at some values.

    The program runs as written, once for each draw, its observed and discrete sites drawn. Masked values are drawn, too.
    What the program computes from its own data (``y[t - 1]`` in an autoregression) is computed from the given data.

    Args:
        values: constrained parameters and continuous latents.
        draws: how many data sets.
        seed: of all that is random.
        new_members: draw the random effects from the population as well, for other individuals than those of the data.

    Returns:
        for each observed site and discrete latent (draw, time, *plates, ...).

    Raises:
        GraphError: the density was made of a factor graph, or a continuous latent belongs to single steps of a loop.
        ValuesError: values are missing, unknown or of the wrong shape.

    >>> import symhmm, pyro.distributions as dist
    >>> def model(y):
    ...     rate = pyro.param("rate", torch.tensor(0.0))
    ...     with pyro.plate("n", len(y)):
    ...         pyro.sample("y", dist.Poisson(rate), obs=y)
    >>> simulate(symhmm.compile(model, torch.ones(3)), {"rate": torch.tensor(1e-9)}, 2)["y"].values
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    program, graph = density.program, density.graph
    if isinstance(program, FactorGraph):
        raise GraphError("a factor graph knows no distributions to draw from.", suggestion="compile a program")
    checked = {n: x.detach() for n, x in density.layout.check(values).items()}
    inside = [n for n in graph.latents if "{" in n]
    if inside:
        raise GraphError(
            f"the continuous latent {inside[0]!r} is one for each step: such programs cannot be rerun at it."
        )
    kept = {n: checked[n] for n, x in graph.latents.items() if not (new_members and x.plates)}
    params = {n: checked[n] for n in graph.params}
    count = len(density.arguments.tensors)
    args, kwargs = density.arguments.rebuild(density.data[:count])
    anew = poutine.condition(poutine.uncondition(program), data=kept)
    runs = []
    with _alone(seed):
        for _ in range(draws):
            trace = poutine.trace(poutine.substitute(anew, data=params)).get_trace(*args, **kwargs)
            runs.append({n: node for n, node in trace.nodes.items() if node["type"] == "sample"})
    found = density.compiled.once("loops", lambda: tuple(loops(graph)))
    names = [*graph.observed, *(n for n, v in graph.variables.items() if v.site in ("", n))]
    out: dict[str, Labelled] = {}
    first = {at_label(n, x.axis, x.labels[k]) for n in names for x in found for k in range(x.first) if "{" in n}
    for name in names:
        if name not in first:
            out[name] = _together(name, runs, found)
    return Answers("simulated data", out)


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Pyro's parameters and torch's random numbers are afterwards what they were."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _together(name: str, runs: list[dict[str, Any]], found: tuple[Loop, ...]) -> Labelled:
    """A site in all runs, the steps of its loop joined: those that have it."""
    loop = next((x for x in found if f"{{{x.axis}}}" in name), None)
    if loop is None:
        values = torch.stack([run[name]["value"] for run in runs])
        return Labelled(name, values, (DRAW, *_dims(runs[0][name])))
    steps = {k: at_label(name, loop.axis, label) for k, label in enumerate(loop.labels)}
    steps = {k: n for k, n in steps.items() if n in runs[0]}
    last = runs[0][steps[max(steps)]]
    shape = last["value"].shape
    values = torch.stack([torch.stack([_expanded(run[n]["value"], shape) for n in steps.values()]) for run in runs])
    labels = {loop.axis: tuple(loop.labels[k] for k in steps)}
    return Labelled(name, values, (DRAW, loop.axis, *_dims(last)), labels)


def _expanded(x: Tensor, shape: torch.Size) -> Tensor:
    return x.expand(shape) if x.shape != shape else x


def _dims(node: dict[str, Any]) -> list[str]:
    """Names of the dimensions of a site's value: its plates, and numbers for the others."""
    value, event = node["value"], node["fn"].event_dim
    plates = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
    batch = value.dim() - event
    named = [plates.get(i - batch, f"batch_{i}") for i in range(batch)]
    return [*named, *(f"event_{i}" for i in range(event))]
