"""A program run forwards at fitted values: many draws in one run, with whatever is known about its states held."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.evaluated import Values
from symhmm.posterior.series import Loop, at_label, loops
from symhmm.tables.states import Labelled

DRAW = "draw"


@dataclass(frozen=True)
class Drawn:
    """The value of a site in all draws: (draw, *plates, *event), the names of its dimensions, and the site of the program."""

    value: Tensor
    dims: tuple[str, ...]
    node: Mapping[str, Any]


def run(
    density: Density,
    values: Values,
    draws: int,
    *,
    seed: int = 0,
    known: Mapping[str, Tensor] | None = None,
    new_members: bool = False,
    observed: bool = False,
) -> dict[str, Drawn]:
    """All sites of one run of the program in which every observed site is drawn anew.

    The draws are the members of a plate around the program, which broadcasts over it as it does over the states that are
    summed out.

    Args:
        values: constrained parameters and continuous latents.
        draws: how many.
        seed: of all that is random.
        known: discrete sites to hold, by their names in the program: (draws, *plates) each.
        new_members: draw the random effects from the population, too.
        observed: leave observed sites as they are, with NaN where a mask hides them.

    Raises:
        GraphError: the density was made of a factor graph, or a continuous latent belongs to single steps of a loop.
        ValuesError: values are missing, unknown or of the wrong shape.
    """
    program, graph = density.program, density.graph
    if isinstance(program, FactorGraph):
        raise GraphError("a factor graph knows no distributions to draw from.", suggestion="compile a program")
    if draws < 1:
        raise GraphError(f"there is nothing to draw: {draws} draws.", suggestion="1000, say")
    checked = {n: x.detach() for n, x in density.layout.check(values).items()}
    inside = [n for n in graph.latents if "{" in n]
    if inside:
        raise GraphError(
            f"the continuous latent {inside[0]!r} is one for each step: such programs cannot be rerun at it."
        )
    plates = [p.dim for p in graph.plates.values() if p.dim is not None]
    nesting = -min([0, *plates, *(d for x in graph.latents.values() for d in x.plates.values())])
    held = {n: checked[n] for n, x in graph.latents.items() if not (new_members and x.plates)}
    held |= {n: _outside(x, nesting) for n, x in (known or {}).items()}
    args, kwargs = density.arguments.rebuild(density.data[: len(density.arguments.tensors)])
    anew = program if observed else poutine.uncondition(program)
    anew = poutine.substitute(poutine.condition(anew, data=held), data={n: checked[n] for n in graph.params})
    with _alone(seed), poutine.trace() as found, pyro.plate(DRAW, draws, dim=-nesting - 1):
        anew(*args, **kwargs)
    return {n: _drawn(_seen(x) if observed else x, draws) for n, x in found.trace.nodes.items() if _is_site(x)}


def series(name: str, found: Mapping[str, Drawn], density: Density) -> Labelled:
    """A site in all draws, the steps of its loop joined: (draw, time, *plates, *event)."""
    loop = next((x for x in every_loop(density) if f"{{{x.axis}}}" in name), None)
    if loop is None:
        return Labelled(name, found[name].value, found[name].dims)
    steps = {k: at_label(name, loop.axis, label) for k, label in enumerate(loop.labels)}
    steps = {k: n for k, n in steps.items() if n in found}
    last = found[steps[max(steps)]]
    values = torch.stack([found[n].value.expand(last.value.shape) for n in steps.values()], 1)
    labels = {loop.axis: tuple(loop.labels[k] for k in steps)}
    return Labelled(name, values, (DRAW, loop.axis, *last.dims[1:]), labels)


def data(density: Density, values: Values) -> dict[str, Labelled]:
    """The observed sites as they are, (time, *plates, *event) floats each: NaN where a mask hides them."""
    found = run(density, values, 1, observed=True)
    return {n: series(n, found, density).sel(draw=0) for n in observed_sites(density)}


def every_loop(density: Density) -> tuple[Loop, ...]:
    """The time loops of the program."""
    return density.compiled.once("loops", lambda: tuple(loops(density.graph)))


def observed_sites(density: Density) -> list[str]:
    """Observed sites, each once: ``y_{time}`` stands for the first steps, too."""
    return _once(density, density.graph.observed)


def discrete_sites(density: Density) -> list[str]:
    """Discrete latents, each once."""
    return _once(density, [n for n, v in density.graph.variables.items() if v.site in ("", n)])


def _once(density: Density, names: Any) -> list[str]:
    first = {
        at_label(n, x.axis, x.labels[k]) for n in names for x in every_loop(density) for k in range(x.first) if "{" in n
    }
    return [n for n in names if n not in first]


@contextmanager
def _alone(seed: int) -> Iterator[None]:
    """Pyro's parameters and torch's random numbers are afterwards what they were."""
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), torch.no_grad():
        torch.manual_seed(seed)
        yield


def _outside(x: Tensor, nesting: int) -> Tensor:
    """A value (draws, *plates) with the draws in the dimension of their plate."""
    return x.reshape([x.shape[0], *[1] * (nesting - x.dim() + 1), *x.shape[1:]])


def _is_site(node: Mapping[str, Any]) -> bool:
    """Whether a node is a sample site, not a plate."""
    return node["type"] == "sample" and isinstance(node["fn"], TorchDistributionMixin)


def _seen(node: Mapping[str, Any]) -> Mapping[str, Any]:
    """A site whose value is NaN where it is masked, by a handler or by its distribution."""
    fn, mask = node["fn"], node["mask"]
    masks = [torch.as_tensor(m) for m in (mask, getattr(fn, "_mask", None)) if m is not None]
    if not masks or not node["is_observed"]:
        return node
    seen = masks[0] if len(masks) == 1 else masks[0] & masks[1]
    value = node["value"] if node["value"].is_floating_point() else node["value"].to(torch.get_default_dtype())
    shape = fn.batch_shape + value.shape[value.dim() - fn.event_dim :]
    seen = seen.expand(fn.batch_shape).reshape([*fn.batch_shape, *[1] * fn.event_dim])
    return {**node, "value": torch.where(seen, value.expand(shape), torch.nan)}


def _drawn(node: Mapping[str, Any], draws: int) -> Drawn:
    """Value and dimensions of a site: its plates by name, and numbers for the dimensions of an event."""
    value, event = node["value"], node["fn"].event_dim
    plates = {f.dim: f.name for f in node["cond_indep_stack"] if f.vectorized}
    shape = torch.broadcast_shapes(value.shape, node["fn"].batch_shape + value.shape[value.dim() - event :])
    value = value.expand(shape)
    batch = value.dim() - event
    dims = []
    for i in reversed(range(batch)):
        if i - batch in plates:
            dims.append(plates[i - batch])
        elif value.shape[i] == 1:
            value = value.squeeze(i)
        else:
            dims.append(f"batch_{i}")
    dims.reverse()
    if DRAW not in dims:
        value, dims = value.expand(draws, *value.shape), [DRAW, *dims]
    return Drawn(value, (*dims, *(f"event_{i}" for i in range(event))), node)
