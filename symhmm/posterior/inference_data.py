"""ArviZ: draws, log-likelihoods of members with the hidden states summed out, and data, as `InferenceData`."""

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.align import Symmetry, aligned
from symhmm.posterior.evaluated import Values
from symhmm.posterior.pointwise import log_likelihood_by
from symhmm.posterior.series import Loop, at_label, loops
from symhmm.posterior.simulate import simulate

Array = NDArray[Any]


def inference_data(
    density: Density,
    draws: Mapping[str, Tensor],
    *,
    by: str | Sequence[str] | None = None,
    order: Symmetry | None = None,
    order_by: str | None = None,
    predictive: int = 0,
    seed: int = 0,
    labels: Mapping[str, Sequence[Any]] | None = None,
) -> Any:
    """Posterior draws, pointwise log-likelihood, observed data and, if asked for, predictive draws for ArviZ.

    The log-likelihood has one value per member of the plates ``by``, hidden states summed out and random effects of the
    member at their drawn values, nats. Members are independent given the values, so that ``az.loo`` and ``az.waic`` can
    leave them out one by one.

    Args:
        draws: by name, constrained, shape (chains, draws, *shape).
        by: plates whose members are the points; None for the plates that all observed sites and chains stand in.
        order: states to be brought into one order, see `symhmm.posterior.align.symmetry`; None leaves the draws as they are.
        order_by: a value that numbers the states by its mean.
        predictive: data sets to simulate, from as many of the draws, evenly spaced.
        seed: of the simulation.
        labels: names of the members of plates, of ``state``, or of other dimensions.

    Returns:
        ``arviz.InferenceData`` with the groups posterior, log_likelihood (unless there is no plate), observed_data and, if
        asked for, posterior_predictive; dimensions are called after plates, time axes and ``state``.

    Raises:
        GraphError: ``by`` has a time axis or a hidden state, whose steps are no points to leave out, or no such plate.
        IntractableError: members are coupled by a discrete latent outside the plates.

    >>> import symhmm, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("animal", len(y)):
    ...         z = pyro.sample("z", dist.Bernoulli(0.5))
    ...         pyro.sample("y", dist.Normal(mu + z, 1.0), obs=y)
    >>> inference_data(symhmm.compile(model, torch.zeros(3)), {"mu": torch.zeros(1, 4)}).log_likelihood["y"].dims
    ('chain', 'draw', 'animal')
    """
    with warnings.catch_warnings():
        # Announces, once, how the next major version will be imported.
        warnings.filterwarnings("ignore", category=FutureWarning, module="arviz")
        import arviz

    points = points_of(density.graph, by)
    chains, count = next(iter(draws.values())).shape[:2]
    flat = {n: x.detach().flatten(0, 1) for n, x in draws.items()}
    if order is not None:
        flat = dict(aligned(flat, order, order_by).draws)
    each = [{n: x[i] for n, x in flat.items()} for i in range(chains * count)]
    dims = {e.name: _dims_of_value(density, e.name, order) for e in density.layout.entries}
    groups: dict[str, dict[str, Array]] = {
        "posterior": {n: x.unflatten(0, (chains, count)).numpy() for n, x in flat.items()}
    }
    short = _short_names(density.graph)
    if points:
        joint = next(iter(short.values())) if len(set(short.values())) == 1 else "all_streams"
        terms = torch.stack([log_likelihood_by(density, v, *points).values for v in each])
        groups["log_likelihood"] = {joint: terms.unflatten(0, (chains, count)).numpy()}
    observed, own = _observed_data(density, each[0])
    if observed:
        groups["observed_data"] = observed
    if predictive:
        picked = np.linspace(0, len(each) - 1, predictive).round().astype(int)
        runs = [simulate(density, each[k], 1, seed=seed + i) for i, k in enumerate(picked)]
        groups["posterior_predictive"] = {
            short[n]: torch.stack([run[n].values for run in runs], 1).numpy() for n in runs[0] if n in short
        }
    coords: dict[str, list[Any]] = {p: list(range(x.size)) for p, x in density.graph.plates.items()}
    coords |= {loop.axis: list(loop.labels) for loop in loops(density.graph)}
    coords |= {d: list(x) for d, x in (labels or {}).items()}
    build: Any = arviz.from_dict
    data = build(
        **{name: group for name, group in groups.items() if name != "log_likelihood"},
        dims={**dims, **own}, coords=coords, attrs={"inference_library": "symhmm"},
    )  # fmt: skip
    if points:
        # Groups of their own: the streams of observed_data have other dimensions under the same names.
        name = next(iter(groups["log_likelihood"]))
        data.extend(
            build(
                log_likelihood=groups["log_likelihood"], dims={name: list(points)}, coords=coords,
                attrs={"inference_library": "symhmm", "pointwise": f"one value per {' and '.join(points)}, states summed out"},
            )
        )  # fmt: skip
    return data


def points_of(graph: FactorGraph, by: str | Sequence[str] | None) -> tuple[str, ...]:
    """Plates whose members are the points of a pointwise log-likelihood, in the order of Pyro's dimensions.

    Raises:
        GraphError: ``by`` names a time axis, an observed or hidden site, or something unknown.
    """
    if by is None:
        seen = [set(f.frames) for f in graph.factors if f.role == "observed"]
        chained = [set(graph.variables[v.current].frames) for c in graph.chains.values() for v in c.variables]
        common = set.intersection(*(seen + chained)) if seen else set()
        wanted = [p for p in graph.plates if p in common]
    else:
        wanted = [by] if isinstance(by, str) else list(by)
    for name in wanted:
        if name in graph.plates:
            continue
        given = name in graph.loops or name in graph.chains or name in graph.variables or name in graph.observed
        if given:
            raise GraphError(
                f"there is no pointwise log-likelihood by {name!r}.",
                details=[
                    "given the hidden states, each observation has already been used to find its own state, and steps of one "
                    "sequence are not independent without them: LOO and WAIC of such values are wrong"
                ],
                suggestion=f"by={next(iter(graph.plates), 'a plate')!r}, one value per member with the states summed out; or "
                "log_likelihood_by for one-step-ahead terms",
            )
        raise GraphError(f"there is no plate {name!r}.", details=[f"plates: {', '.join(graph.plates) or 'none'}"])
    return tuple(sorted(wanted, key=lambda p: (graph.plates[p].dim or 0, wanted.index(p))))


def _dims_of_value(density: Density, name: str, order: Symmetry | None) -> list[str]:
    """Names of the dimensions of a value: its plates, those that number states, and numbers for the others."""
    entry = density.layout[name]
    event = density.graph.latents[name].event_dim if name in density.graph.latents else 0
    out = [f"{name}_dim_{i}" for i in range(len(entry.shape))]
    for plate, d in entry.plates.items():
        out[d - event] = plate
    states = order.dims.get(name, ()) if order is not None else ()
    for d, what in zip(states, ("state",) if len(states) == 1 else ("from_state", "to_state"), strict=False):
        out[d] = what
    return out


def _short_names(graph: FactorGraph) -> dict[str, str]:
    """Observed sites, the steps of a loop as one, and their names without the time: ``y_{time}`` is ``y``."""
    found = loops(graph)
    first = {
        at_label(n, x.axis, x.labels[k]) for n in graph.observed for x in found for k in range(x.first) if "{" in n
    }
    sites = [n for n in graph.observed if n not in first]
    short = {n: re.sub(r"_?\{[^}]*\}", "", n) or n for n in sites}
    return short if len(set(short.values())) == len(short) else {n: n for n in sites}


def _observed_data(density: Density, values: Values) -> tuple[dict[str, Array], dict[str, list[str]]]:
    """What was observed, NaN where it is masked, and the names of its dimensions; nothing for a factor graph."""
    if isinstance(density.program, FactorGraph):
        return {}, {}
    graph, program = density.graph, density.program
    args, kwargs = density.arguments.rebuild(density.data[: len(density.arguments.tensors)])
    latents = {n: x for n, x in values.items() if n in graph.latents and "{" not in n}
    params = {n: x for n, x in values.items() if n in graph.params}
    with torch.random.fork_rng(devices=[]), pyro.get_param_store().scope(), torch.no_grad():
        ready = poutine.substitute(poutine.condition(program, data=latents), data=params)
        nodes: Mapping[str, Any] = poutine.trace(ready).get_trace(*args, **kwargs).nodes
    found = loops(graph)
    out: dict[str, Array] = {}
    dims: dict[str, list[str]] = {}
    for site, name in _short_names(graph).items():
        loop = next((x for x in found if f"{{{x.axis}}}" in site), None)
        steps = [at_label(site, loop.axis, k) for k in loop.labels] if isinstance(loop, Loop) else [site]
        mine = [nodes[n] for n in steps if n in nodes]
        if not mine:
            continue
        values_ = torch.broadcast_tensors(*(_seen(node) for node in mine))
        plates = {f.dim: f.name for f in mine[-1]["cond_indep_stack"] if f.vectorized}
        batch = values_[0].dim() - mine[-1]["fn"].event_dim
        own = [plates.get(i - batch, f"{name}_dim_{i}") for i in range(batch)]
        own += [f"{name}_event_{i}" for i in range(mine[-1]["fn"].event_dim)]
        if loop is not None and len(mine) == len(loop.labels):
            out[name], dims[name] = torch.stack(values_).numpy(), [loop.axis, *own]
        elif loop is None:
            out[name], dims[name] = values_[0].numpy(), own
    return out, dims


def _seen(node: dict[str, Any]) -> Tensor:
    """The value of an observed site, NaN where it is masked."""
    value: Tensor = torch.as_tensor(node["value"]).detach()
    mask = node["mask"]
    if mask is None or mask is True:
        return value
    seen = torch.as_tensor(mask)
    seen = seen.reshape(*seen.shape, *(1 for _ in range(node["fn"].event_dim)))
    return torch.where(seen, value.to(torch.get_default_dtype()), torch.nan)
