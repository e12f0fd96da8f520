"""Densities of the streams of a fit in each state, weighted by the time spent there: what a histogram is compared with."""

from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.lower import Named
from symhmm.distributions import Hurdle, ZeroInflated, ZeroOneInflated
from symhmm.errors import FitError
from symhmm.fitting import Fit
from symhmm.tables.data import SequenceData
from symhmm.tables.states import STATE, Labelled

GRID = 120  # values at which an emission's density is drawn
ATOMS = {ZeroInflated.__name__: (0.0,), Hurdle.__name__: (0.0,), ZeroOneInflated.__name__: (0.0, 1.0)}


@dataclass(frozen=True)
class Curves:
    """Densities of a stream, each state weighted by the share of time spent in it.

    Args:
        at: shape (G,), values; the counts where the stream is ``discrete``.
        density: shape (G, K), at these values; probabilities where the stream is ``discrete``.
        atoms: shape (A,), single values with a probability of their own beside a density.
        shares: shape (A, K), their probabilities.
    """

    at: np.ndarray
    density: np.ndarray
    discrete: bool
    atoms: np.ndarray = field(default_factory=lambda: np.zeros(0))
    shares: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


def emission_curves(fit: Fit, stream: str, smoothed: Labelled | None = None) -> Curves:
    """The density of a stream in each state, by evaluating the program with other data in its place.

    Where emissions differ between cells, by covariates or random effects, densities are averages over the cells, weighted
    by the probability of the state there.

    Raises:
        FitError: the stream is no argument of the program, is of vectors, or depends on several hidden states.
    """
    data, site = the_data(fit), the_chain(fit)
    smoothed = fit.smooth([site])[site] if smoothed is None else smoothed
    arguments = fit.density.arguments
    place = [i for i, n in enumerate(arguments.names) if n.endswith(f"streams[{stream!r}]")]
    if not place:
        raise FitError(
            f"stream {stream!r} is no argument of the program.",
            details=[f"arguments: {', '.join(arguments.names[:8])}"],
        )
    if data.streams[stream].dim() != data.mask.dim():
        raise FitError(f"stream {stream!r} is of vectors.", suggestion="a stream of single numbers")
    y = data.streams[stream][data.observed[stream]]
    discrete = bool((y == y.round()).all()) and float(y.max() - y.min()) <= GRID
    low, high = float(y.min()), float(y.max())
    at = np.arange(low, high + 1) if discrete else np.linspace(low, high, GRID + 2)[1:-1]

    def terms(value: float | None) -> dict[str, Named]:
        tensors = list(arguments.tensors)
        if value is not None:
            for i in place:
                tensors[i] = torch.full_like(tensors[i], value)
        density = replace(fit.density, data=(*tensors, *fit.density.data[len(tensors) :]), _constants={})
        with torch.no_grad():
            graph = density.factors_at(fit.values)
        return {f.name: Named.from_funsor(f.term, f.name) for f in graph.factors if f.role == "observed"}

    base, other = terms(None), terms(float(at[len(at) // 2]))
    own = [n for n, x in base.items() if site in x.names and not torch.equal(x.data, other[n].data)]
    if len(own) != 1:
        raise FitError(
            f"stream {stream!r} is observed at {len(own)} sites that depend on {site!r}.",
            suggestion="emissions of one state",
        )
    axes = fit.density.graph.chains
    frames = [d for d in smoothed.dims if d != STATE]
    known = {*frames, *axes, site}
    if not {*base[own[0]].names} <= known:
        raise FitError(f"stream {stream!r} depends on several hidden states: {', '.join(base[own[0]].names)}.")
    axis = next(d for d in frames if d in axes)
    steps = smoothed.values.shape[smoothed.dims.index(axis)]
    length = axes[axis].length
    weight = smoothed.values.narrow(smoothed.dims.index(axis), steps - length, length)
    seen = base[own[0]].aligned([*frames, site]) != 0
    weight = weight * seen.any(-1, keepdim=True)
    weight = weight / weight.sum()
    inside = tuple(range(weight.dim() - 1))

    def rows(values: np.ndarray) -> np.ndarray:
        found = [(terms(float(v))[own[0]].aligned([*frames, site]).exp() * weight).sum(inside) for v in values]
        return torch.stack(found).numpy() if found else np.zeros((0, weight.shape[-1]))

    atoms = np.array(() if discrete else ATOMS.get(fit.density.graph.observed[own[0]].family, ()))
    return Curves(at, rows(at), discrete, atoms, rows(atoms))


def the_data(fit: Fit) -> SequenceData:
    """The sequences of a fit. Raises `FitError` where there are none."""
    if fit.data is None:
        raise FitError("the program has no SequenceData among its arguments.", suggestion="SequenceData.from_tensors")
    return fit.data


def the_chain(fit: Fit) -> str:
    """The first hidden state in a time loop, ``z_{time}``. Raises `FitError` where there is none."""
    graph = fit.density.graph
    found = [v.current for c in graph.chains.values() for v in c.variables]
    if not found:
        raise FitError("the program has no hidden states in a time loop.", suggestion="fit.smooth().only.to_frame()")
    return found[0]


def shares_of(y: Tensor, values: np.ndarray) -> np.ndarray:
    """Share of the numbers ``y`` that are exactly each of some values.

    >>> shares_of(torch.tensor([0.0, 0.0, 0.5, 2.0]), np.array([0.0, 1.0])).tolist()
    [0.5, 0.0]
    """
    return np.array([float((y == v).double().mean()) for v in values])
