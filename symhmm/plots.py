"""Pictures of a fit: states over time, emissions over the data, effects of individuals, moves, residuals. Matplotlib figures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.lower import Named
from symhmm.errors import FitError
from symhmm.fitting import Fit
from symhmm.tables.data import SequenceData
from symhmm.tables.states import STATE, Labelled

COLOURS = ("#4477aa", "#ddaa33", "#bb5566", "#228833", "#aa3377", "#66ccee", "#999933", "#332288")
GREY = "#777777"
GRID = 120  # values at which an emission's density is drawn
LAGS = 30  # of the autocorrelation of residuals


def plot_states(fit: Fit, ids: Sequence[Any] | None = None, *, stream: str = "", most: int = 6) -> Any:
    """States over time: probabilities as areas, above them the jointly most probable path, below them a stream.

    Of individuals with several sessions the first is drawn.

    Args:
        fit: of a program with a time loop and `SequenceData`.
        ids: individuals; None takes the first ``most``.
        stream: what is drawn below the probabilities; the first one if empty.

    Returns:
        a figure, one row of axes per individual.

    Raises:
        FitError: the fit has no time loop or no `SequenceData`.
    """
    from matplotlib.colors import ListedColormap

    data, site = _data(fit), the_chain(fit)
    smoothed, path = fit.smooth([site])[site], fit.viterbi([site])[site]
    who = _individuals(fit, smoothed)
    chosen = list(smoothed.labels[who][:most] if ids is None else ids)
    stream = stream or next(iter(data.streams))
    figure = _figure(10, 1.7 * len(chosen) + 0.6)
    axes = figure.subplots(2 * len(chosen), 1, squeeze=False, height_ratios=[1.2, 1] * len(chosen))[:, 0]
    colours = _colours(smoothed)
    strip = {"cmap": ListedColormap(colours), "aspect": "auto", "interpolation": "nearest"}
    for i, x in enumerate(chosen):
        one, best = smoothed.sel(**{who: x}), path.sel(**{who: x})
        p, z = _flat(one), best.values.movedim(0, -1).reshape(-1, best.values.shape[0])[0]
        n, place = int((z >= 0).sum()), data.ids.index(x)
        top, low = axes[2 * i], axes[2 * i + 1]
        t = np.arange(n + 1)
        top.stackplot(t, np.vstack([p[:n], p[n - 1 : n]]).T, colors=colours, step="post", linewidth=0)
        top.imshow(z[:n][None].numpy(), extent=(0, n, 1.06, 1.22), vmin=0, vmax=len(colours) - 1, **strip)
        top.set(xlim=(0, len(p)), ylim=(0, 1.22), yticks=[0, 1], xticks=[])
        top.set_title(f"{data.labels.id} {x}", loc="right", fontsize=9, pad=2)
        y = data.streams[stream].reshape(data.num_steps, -1, data.num_sequences)[:, 0, place]
        seen = data.observed[stream].reshape(data.num_steps, -1, data.num_sequences)[:, 0, place]
        at = np.flatnonzero(seen.numpy())
        low.scatter(at + 0.5, y[seen].numpy(), s=4, c=[colours[int(z[j])] for j in at if j < n], linewidths=0)
        low.set(xlim=(0, len(p)), ylabel=_unit(data, stream))
        for a in (top, low):
            a.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    _legend(figure, smoothed, colours)
    return figure


def plot_emissions(fit: Fit, streams: Sequence[str] | None = None) -> Any:
    """Densities of each stream in each state over a histogram of the data, each state weighted by the time spent in it.

    Where emissions differ between cells, by covariates or random effects, densities are averages over the cells, weighted
    by the probability of the state there.

    Args:
        streams: which; all of one number per step if None.

    Raises:
        FitError: a stream is no argument of the program, or depends on several hidden states.
    """
    data, site = _data(fit), the_chain(fit)
    names = [n for n, x in data.streams.items() if x.dim() == data.mask.dim()] if streams is None else list(streams)
    smoothed = fit.smooth([site])[site]
    colours = _colours(smoothed)
    figure = _figure(4.2 * min(len(names), 3), 3.1 * -(-len(names) // 3) + 0.3)
    axes = figure.subplots(-(-len(names) // 3), min(len(names), 3), squeeze=False).reshape(-1)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes[: len(names)], strict=True):
        found = emission_curves(fit, name, smoothed)
        y = data.streams[name][data.observed[name]].numpy()
        if found.discrete:
            values, counts = np.unique(y, return_counts=True)
            axis.bar(values, counts / counts.sum(), color="0.85", width=0.9)
            draw = {"marker": "o", "markersize": 3.5, "linewidth": 1}
        else:
            axis.hist(y, bins=50, density=True, color="0.85")
            draw = {"linewidth": 1.6}
        for k, colour in enumerate(colours):
            axis.plot(found.at, found.density[:, k], color=colour, **draw)
        axis.plot(found.at, found.density.sum(1), color="0.2", linestyle="--", linewidth=1, label="all states")
        top = np.histogram(y, bins=50, density=True)[0].max() if not found.discrete else 1.0
        if found.density.max() > 3 * top:
            axis.set_ylim(0, 1.5 * top)
        axis.set(xlabel=_unit(data, name), ylabel="share" if found.discrete else "density")
        axis.spines[["top", "right"]].set_visible(False)
    _legend(figure, smoothed, colours)
    return figure


@dataclass(frozen=True)
class Curves:
    """Densities of a stream: ``density`` has shape (G, K), at the G values ``at``, weighted by the time in each state."""

    at: np.ndarray
    density: np.ndarray
    discrete: bool


def emission_curves(fit: Fit, stream: str, smoothed: Labelled | None = None) -> Curves:
    """The density of a stream in each state, by evaluating the program with other data in its place.

    Raises:
        FitError: see `plot_emissions`.
    """
    data, site = _data(fit), the_chain(fit)
    smoothed = fit.smooth([site])[site] if smoothed is None else smoothed
    arguments = fit.density.arguments
    place = [i for i, n in enumerate(arguments.names) if n.endswith(f"streams[{stream!r}]")]
    if not place:
        raise FitError(
            f"stream {stream!r} is no argument of the program.",
            details=[f"arguments: {', '.join(arguments.names[:8])}"],
        )
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
    rows = [(terms(float(v))[own[0]].aligned([*frames, site]).exp() * weight).sum(inside) for v in at]
    return Curves(at, torch.stack(rows).numpy(), discrete)


def plot_random_effects(fit: Fit, plate: str | None = None, *, most: int = 60) -> Any:
    """Effects of each member with 95 percent intervals, sorted, one panel per effect (a caterpillar plot).

    Args:
        plate: as for `symhmm.Fit.random_effects`.
        most: members shown in a panel; of more, the extremes.

    Raises:
        FitError: there are none.
    """
    table = fit.random_effects(plate)
    rows = [dict(zip(table.columns, r, strict=True)) for r in table.rows]
    panels: dict[str, list[dict[str, Any]]] = {}
    for r in rows:
        effect, member = _effect_and_member(r["name"], () if fit.data is None else fit.data.ids)
        panels.setdefault(effect, []).append({**r, "member": member})
    wide = min(len(panels), 3)
    figure = _figure(
        3.8 * wide, min(9.0, 1.2 + 0.16 * min(most, max(map(len, panels.values())))) * -(-len(panels) // wide)
    )
    axes = figure.subplots(-(-len(panels) // wide), wide, squeeze=False).reshape(-1)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, (effect, members) in zip(axes[: len(panels)], panels.items(), strict=True):
        members = sorted(members, key=lambda r: r["estimate"])
        if len(members) > most:
            members = members[: most // 2] + members[-(most - most // 2) :]
        x = np.array([r["estimate"] for r in members])
        y = np.arange(len(members))
        low, high = (np.array([r[c] for r in members]) for c in ("2.5%", "97.5%"))
        axis.axvline(0, color="0.8", linewidth=1)
        axis.hlines(y, low, high, color=GREY, linewidth=1)
        axis.plot(x, y, "o", color=COLOURS[0], markersize=3.5)
        axis.set_yticks(y, [r["member"] for r in members], fontsize=7)
        axis.set_title(effect, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("effect with 95 percent interval", fontsize=9)
    return figure


def plot_transitions(fit: Fit) -> Any:
    """Share of the moves out of each state that go to each state, expected given the data, all individuals together."""
    site = the_chain(fit)
    found = fit.transition_counts([site])[site]
    counts = found.values.reshape(-1, *found.values.shape[-2:]).sum(0)
    share = (counts / counts.sum(-1, keepdim=True)).numpy()
    names = [str(x) for x in found.labels["from"]]
    figure = _figure(1.6 + 0.8 * len(names), 1.4 + 0.7 * len(names))
    axis = figure.subplots()
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(names)):
        for j in range(len(names)):
            axis.text(j, i, f"{share[i, j]:.3f}", ha="center", va="center", color="w" if share[i, j] > 0.5 else "k")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="to", ylabel="from", title="share of expected moves")
    return figure


def plot_residuals(fit: Fit, stream: str) -> Any:
    """Quantile residuals of a stream: against a normal distribution, over time, and their autocorrelation.

    Points on the line, no trend and bars within the band (95 percent, if independent) are what a right model gives.
    """
    from scipy.stats import norm

    sites = [n for n in fit.density.graph.observed if n == stream or n.startswith(f"{stream}_{{")]
    if not sites:
        raise FitError(
            f"no observed site is called after stream {stream!r}.",
            details=[f"observed: {', '.join(fit.density.graph.observed)}"],
            suggestion="name it f'" + stream + "_{t}' in the program",
        )
    found = fit.residuals(sites[-1])
    x = found.values.reshape(found.values.shape[0], -1)
    figure = _figure(11, 3.2)
    left, middle, right = figure.subplots(1, 3)
    flat = np.sort(x[x.isfinite()].numpy())
    wanted = norm.ppf((np.arange(len(flat)) + 0.5) / len(flat))
    left.plot(wanted[[0, -1]], wanted[[0, -1]], color="0.7", linewidth=1)
    left.plot(wanted, flat, ".", color=COLOURS[0], markersize=2)
    left.set(xlabel="normal quantiles", ylabel=f"residuals of {stream}")
    step, _ = np.nonzero(x.isfinite().numpy())
    middle.plot(step, x[x.isfinite()].numpy(), ".", color=COLOURS[0], markersize=1.5, alpha=0.5)
    middle.axhline(0, color="0.7", linewidth=1)
    middle.set(xlabel="step", ylabel="residual")
    lags, values, band = _autocorrelation(x)
    right.bar(lags, values, color=COLOURS[0], width=0.5)
    right.fill_between([0, lags[-1] + 1], -band, band, color="0.9", zorder=0)
    right.set(xlabel="lag", ylabel="autocorrelation", xlim=(0, lags[-1] + 1))
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _autocorrelation(x: Tensor) -> tuple[np.ndarray, np.ndarray, float]:
    """Lags, correlation of residuals that many steps apart in one sequence, and what chance keeps within."""
    seen = x.isfinite()
    centred = torch.where(seen, x - x[seen].mean(), 0.0)
    total = centred.square().sum() / seen.sum()
    lags = np.arange(1, min(LAGS, len(x) - 1) + 1)
    values = []
    for lag in lags:
        pairs = (seen[lag:] & seen[:-lag]).sum()
        values.append(float((centred[lag:] * centred[:-lag]).sum() / pairs.clamp_min(1) / total))
    return lags, np.array(values), float(1.96 / seen.sum().sqrt())


def _data(fit: Fit) -> SequenceData:
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


def _individuals(fit: Fit, x: Labelled) -> str:
    plates: Mapping[str, Any] = fit.density.graph.plates
    found = [d for d in x.dims if d in plates and plates[d].dim == -1]
    if not found:
        raise FitError("the states stand in no plate of individuals.", suggestion="a plate in dimension -1")
    return found[0]


def _flat(x: Labelled) -> np.ndarray:
    """Probabilities of the steps of a first session, (T, K)."""
    values = x.values
    return np.asarray(values.reshape(values.shape[0], -1, values.shape[-1])[:, 0])


def _colours(x: Labelled) -> list[str]:
    size = x.values.shape[-1]
    return [COLOURS[k % len(COLOURS)] for k in range(size)]


def _legend(figure: Any, x: Labelled, colours: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    handles = [Rectangle((0, 0), 1, 1, color=c) for c in colours]
    names = [n if isinstance(n, str) and not n.isdigit() else f"state {n}" for n in x.labels[STATE]]
    figure.legend(handles, names, loc="outside upper left", ncols=len(colours), frameon=False, fontsize=9)


def _unit(data: SequenceData, column: str) -> str:
    unit = data.labels.units.get(column, "")
    return f"{column} ({unit})" if unit else column


def _effect_and_member(name: str, ids: Sequence[Any]) -> tuple[str, str]:
    """``own[3, 1]`` is effect ``own[1]`` of member 3; names of a model end with the member, ``transitions|ID 0>1 ann``.

    >>> _effect_and_member("own[3, 1]", ()), _effect_and_member("step.mean|ID ann lee", ("lee", "ann lee"))
    (('own[1]', '3'), ('step.mean|ID', 'ann lee'))
    """
    if name.endswith("]"):
        site, _, index = name[:-1].partition("[")
        member, _, rest = index.partition(", ")
        known = [str(x) for x in ids]
        who = known[int(member)] if member.isdigit() and int(member) < len(known) else member
        return (f"{site}[{rest}]" if rest else site), who
    ends = [str(x) for x in ids if name.endswith(f" {x}")]
    member = max(ends, key=len) if ends else name.rpartition(" ")[2]
    return name[: -len(member)].rstrip() or name, member


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
