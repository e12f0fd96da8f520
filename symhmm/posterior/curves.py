"""Curves: what the model says at covariate values that the data never had, with intervals from values that might be true."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import Named
from symhmm.distributions import stationary_distribution
from symhmm.errors import GraphError
from symhmm.posterior.emissions import Emission, Recipe, emissions
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.posterior.mixture import QUANTITY
from symhmm.posterior.prefix import the_loop
from symhmm.tables.results import label
from symhmm.tables.states import STATE, Answers, Labelled

INTERVAL, FROM, TO = "interval", "from", "to"


def curves(
    density: Density,
    estimate: Values,
    values: Sequence[Values],
    probabilities: Sequence[float],
    grid: tuple[str, Tensor] | None,
) -> Answers:
    """Transition probabilities, stationary distributions and emissions at each step of some data, with intervals.

    The data of ``density`` need no observations, all may be masked: their steps are a grid of covariate values, of which only
    those on the vectorised axis are shown. The numbers are read off the factors of the program's graph there.

    Args:
        density: the program on the grid.
        estimate: constrained values of the curve itself.
        values: constrained values whose spread makes the interval.
        probabilities: ends of the interval.
        grid: name and numbers of the covariate, one for each step of the program, that label the curve instead of the time.

    Returns:
        ``transition of z_{time}`` (time, *plates, *effects, from, to, interval), ``stationary z_{time}`` (.., state, interval)
        where a chain depends on its last state alone, and each observed site (time, *plates, *states, quantity, interval)
        with the numbers of its distribution; the interval has the estimate first, then quantiles by value.

    Raises:
        GraphError: the program has no time loop, or ``grid`` has another number of steps.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model(x):
    ...     b, z = pyro.param("b", torch.tensor(1.0)), torch.tensor(0)
    ...     for t in pyro.markov(range(len(x))):
    ...         p = (b * x[t]).sigmoid()
    ...         z = pyro.sample(f"z_{t}", dist.Categorical(torch.stack([1 - p, p])))
    ...         pyro.sample(f"y_{t}", dist.Normal(z * x[t], 1.0), obs=x[t])
    >>> draws = [{"b": torch.tensor(b)} for b in (0.5, 1.5)]
    >>> found = curves(symhmm.compile(model, torch.arange(4.0)), {"b": torch.tensor(1.0)}, draws, (0.0, 1.0), None)
    >>> found["y_{time}"].sel(time=2, quantity="loc", interval="estimate").values
    tensor([0., 2.])
    """
    found = [_read(density, v) for v in (estimate, *values)]
    loop = the_loop(evaluated(density, estimate))
    out = {}
    names = ("estimate", *(f"{100 * p:g}%" for p in probabilities))
    for name, first in found[0].items():
        spread = torch.stack([x[name].values for x in found[1:]])
        ends = [spread.quantile(p, 0) for p in probabilities]
        x = Labelled(
            name, torch.stack([first.values, *ends], -1), (*first.dims, INTERVAL), {**first.labels, INTERVAL: names}
        )
        out[name] = x if grid is None else _on(x, loop.axis, loop.first, len(loop.labels), *grid)
    return Answers("curves", out)


def interval(
    f: Callable[[Values], Tensor], estimate: Values, values: Sequence[Values], probabilities: Sequence[float]
) -> Labelled:
    """A function of the named values with its interval: (*its own dimensions, interval).

    >>> interval(lambda v: v["b"] ** 2, {"b": torch.tensor(2.0)}, [{"b": torch.tensor(x)} for x in (1.0, 3.0)], (0.0, 1.0)).values
    tensor([4., 1., 9.])
    """
    with torch.no_grad():
        best, spread = torch.as_tensor(f(estimate)), torch.stack([torch.as_tensor(f(v)) for v in values])
    ends = [spread.quantile(p, 0) for p in probabilities]
    names = ("estimate", *(f"{100 * p:g}%" for p in probabilities))
    dims = (*(f"dim_{i}" for i in range(best.dim())), INTERVAL)
    return Labelled("interval", torch.stack([best, *ends], -1), dims, {INTERVAL: names})


def _read(density: Density, values: Values) -> dict[str, Labelled]:
    at = evaluated(density, values)
    loop = the_loop(at)
    chain = at.graph.chains[loop.axis]
    labels = {loop.axis: loop.labels[loop.first :]}
    out: dict[str, Labelled] = {}
    factors = {f.name: f for f in at.graph.factors}
    for v in chain.variables:
        if v.current not in factors or factors[v.current].role != "discrete latent":
            continue
        f = factors[v.current]
        term = Named.from_funsor(f.term, f.name)
        lags = {n: FROM if len(v.previous) == 1 else f"{FROM} {n}" for n in v.previous}
        around = _frames(at, f.frames, loop.axis)
        others = [n for n in term.names if n not in {*around, *lags, v.current}]
        order = [*around, *others, *(n for n in v.previous if n in term.names), v.current]
        dims = (*around, *others, *(lags[n] for n in v.previous if n in term.names), TO)
        full = _full(at, term, order, around).exp()
        out[f"transition of {v.current}"] = Labelled(v.current, full, dims, labels)
        if len(v.previous) == 1 and v.previous[0] in term.names and not any(n in at.graph.variables for n in others):
            out[f"stationary {v.current}"] = Labelled(
                v.current, stationary_distribution(full), (*dims[:-2], STATE), labels
            )
    for site, e in emissions(density, values).items():
        if loop.axis in e.frames:
            out[site] = _numbers(at, site, e, loop.axis, labels)
    return out


def _numbers(at: Evaluated, site: str, e: Emission, axis: str, labels: Mapping[str, tuple[int, ...]]) -> Labelled:
    around = _frames(at, e.frames, axis)
    states = [n for n in e.names if n in at.graph.variables]
    order = [*around, *states]
    size = [at.graph.variables[n].size for n in states]
    columns = [_full(at, x, order, around).expand([*(at.size(n) for n in around), *size]) for x in e.numbers]
    dims = (*around, *(states if len(states) != 1 else [STATE]), QUANTITY)
    return Labelled(site, torch.stack(columns, -1), dims, {**labels, QUANTITY: tuple(_named(e.recipe))})


def _frames(at: Evaluated, frames: Sequence[str], axis: str) -> list[str]:
    return [axis, *at.ordered([n for n in frames if n in at.graph.plates])]


def _full(at: Evaluated, x: Named, order: list[str], around: list[str]) -> Tensor:
    data = x.aligned(order)
    return data.expand([*(at.size(n) for n in around), *data.shape[len(around) :]])


def _named(recipe: Recipe, inside: str = "") -> list[str]:
    """Names of the numbers of a distribution, in the order of the recipe."""
    own = [n for name, shape in recipe.shapes.items() for n in label(inside + name, shape)]
    single = len(recipe.inside) == 1
    return own + [n for k, r in recipe.inside.items() for n in _named(r, inside if single else f"{inside}{k}.")]


def _on(x: Labelled, axis: str, first: int, steps: int, name: str, numbers: Tensor) -> Labelled:
    if len(numbers) != steps:
        raise GraphError(
            f"the grid of {name!r} has another number of steps than the data.",
            details=[f"seen {len(numbers)}, wanted {steps}"],
        )
    labels = {name if d == axis else d: v for d, v in x.labels.items()}
    labels[name] = tuple(float(n) for n in numbers[first:])
    return Labelled(x.name, x.values, tuple(name if d == axis else d for d in x.dims), labels)
