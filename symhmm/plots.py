"""Pictures of a fit: states over time, emissions over the data, effects of individuals, moves, residuals. Matplotlib figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.densities import Curves, emission_curves, shares_of, the_chain, the_data
from symhmm.errors import DataError, FitError
from symhmm.fitting import Fit
from symhmm.tables.data import SequenceData
from symhmm.tables.states import STATE, Labelled

COLOURS = ("#4477aa", "#ddaa33", "#bb5566", "#228833", "#aa3377", "#66ccee", "#999933", "#332288")
GREY = "#777777"
TOTAL: dict[str, Any] = {"color": "0.2", "linestyle": "--", "linewidth": 1}  # all states together
LAGS = 30  # of the autocorrelation of residuals


def plot_states(fit: Fit, ids: Sequence[Any] | None = None, *, stream: str = "", most: int = 6) -> Any:
    """States over time: probabilities as areas, above them the jointly most probable path, below them a stream.

    Args:
        fit: of a program with a time loop and `SequenceData`.
        ids: individuals, with all their sessions, or pairs (individual, session). None takes the first session of each
            individual, then the second ones, ``most`` in all.
        stream: what is drawn below the probabilities; the first one if empty.

    Returns:
        a figure, two axes per sequence.

    Raises:
        FitError: the fit has no time loop or no `SequenceData`.
        DataError: there is no such individual, session or stream.
    """
    from matplotlib.colors import ListedColormap

    data, site = the_data(fit), the_chain(fit)
    smoothed, path = fit.smooth([site])[site], fit.viterbi([site])[site]
    who = _individuals(fit, smoothed)
    plates = fit.density.graph.plates
    between = next((d for d in smoothed.dims if d in plates and plates[d].dim == -2), None)
    chosen = _sequences(data, ids, most)
    stream = stream or next(iter(data.streams))
    y, seen = data[stream], data.observed[stream]
    figure = _figure(10, 1.55 * len(chosen) + 0.8)
    axes = figure.subplots(2 * len(chosen), 1, squeeze=False, sharex=True, height_ratios=[1.3, 1] * len(chosen))[:, 0]
    colours = _colours(smoothed)
    strip = {"cmap": ListedColormap(colours), "aspect": "auto", "interpolation": "nearest"}
    # A loop whose first steps have no state has answers for the later ones.
    first, end = data.num_steps - len(smoothed.values), 0
    for i, (place, session) in enumerate(chosen):
        picked = {who: smoothed.labels[who][place]}
        if between is not None:
            picked[between] = smoothed.labels[between][session]
        one, best = smoothed.sel(**picked).values, path.sel(**picked).values
        p = np.asarray(one.reshape(one.shape[0], -1, one.shape[-1])[:, 0])
        z = best.reshape(best.shape[0], -1)[:, 0].numpy()
        n = int((z >= 0).sum())
        top, low = axes[2 * i], axes[2 * i + 1]
        t = first + np.arange(n + 1)
        top.stackplot(t, np.vstack([p[:n], p[n - 1 : n]]).T, colors=colours, step="post", linewidth=0)
        top.imshow(z[:n][None], extent=(first, first + n, 1.15, 1.4), vmin=0, vmax=len(colours) - 1, **strip)
        top.set(ylim=(0, 1.42), yticks=[0, 1])
        top.text(-0.006, 1.275 / 1.42, "path", transform=top.transAxes, ha="right", va="center", fontsize=7)
        top.set_title(_title(data, place, session), loc="right", fontsize=9, pad=2)
        at = (place,) if data.mask.dim() == 2 else (session, place)
        where = np.flatnonzero(seen[(slice(first, first + n), *at)].numpy())
        points = y[(slice(first, first + n), *at)].reshape(n, -1)[where]
        colour = [colours[int(z[j])] for j in where]
        for column in points.unbind(-1):
            low.scatter(first + where + 0.5, column.numpy(), s=4, c=colour, linewidths=0)
        low.set(ylabel=_unit(data, stream))
        end = max(end, first + n)
    for a in axes:
        a.set_xlim(0, end)
        a.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("step")
    _legend(figure, smoothed, colours)
    return figure


def _sequences(data: SequenceData, ids: Sequence[Any] | None, most: int) -> list[tuple[int, int]]:
    """Which sequences are drawn: places of the individual and of its session."""
    has = data.lengths.reshape(-1, data.num_sequences) > 0
    if ids is None:
        first = has.nonzero()[:most].tolist()  # by session, then by individual
        return sorted((n, s) for s, n in first)
    names = data.labels.sessions
    out = []
    for x in ids:
        who, when = (x, None) if x in data.ids or not (isinstance(x, tuple) and len(x) == 2) else x
        if who not in data.ids:
            raise DataError(
                f"there is no {data.labels.id} {who!r}.", details=[f"known: {', '.join(map(repr, data.ids[:8]))}"]
            )
        place = data.ids.index(who)
        sessions = has[:, place].nonzero()[:, 0].tolist()
        known = {s: s if names is None else names[s, place] for s in sessions}
        found = [s for s in sessions if when is None or known[s] == when]
        if not found:
            raise DataError(
                f"{data.labels.id} {who!r} has no session {when!r}.",
                details=[f"known: {', '.join(map(repr, known.values()))}"],
            )
        out += [(place, s) for s in found]
    return out


def _title(data: SequenceData, place: int, session: int) -> str:
    text = f"{data.labels.id} {data.ids[place]}"
    if data.mask.dim() == 2:
        return text
    names = data.labels.sessions
    return f"{text}, {data.labels.session or 'session'} {session if names is None else names[session, place]}"


def plot_emissions(fit: Fit, streams: Sequence[str] | None = None) -> Any:
    """Densities of each stream in each state over a histogram of the data, each state weighted by the time spent in it.

    Where emissions differ between cells, by covariates or random effects, densities are averages over the cells, weighted
    by the probability of the state there. Single values with a probability of their own (zeros of a zero-inflated stream)
    are bars beside the curves, with an axis on the right: their share of the data in grey, that of the model in colours.

    Args:
        streams: which; all of one number per step if None.

    Raises:
        FitError: a stream is no argument of the program, is of vectors, or depends on several hidden states.
    """
    data, site = the_data(fit), the_chain(fit)
    names = [n for n, x in data.streams.items() if x.dim() == data.mask.dim()] if streams is None else list(streams)
    if not names:
        raise FitError("no stream has one number per step.", details=[f"streams: {', '.join(data.streams)}"])
    smoothed = fit.smooth([site])[site]
    colours = _colours(smoothed)
    figure = _figure(4.2 * min(len(names), 3), 3.1 * -(-len(names) // 3) + 0.3)
    axes = figure.subplots(-(-len(names) // 3), min(len(names), 3), squeeze=False).reshape(-1)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    for name, axis in zip(names, axes[: len(names)], strict=True):
        found = emission_curves(fit, name, smoothed)
        y = data.streams[name][data.observed[name]]
        single = torch.isin(y, torch.as_tensor(found.atoms, dtype=y.dtype))
        if found.discrete:
            values, counts = np.unique(y.numpy(), return_counts=True)
            axis.bar(values, counts / counts.sum(), color="0.85", width=0.9)
            axis.xaxis.get_major_locator().set_params(integer=True)
            draw = {"marker": "o", "markersize": 3.5, "linewidth": 1}
        else:
            heights, edges = np.histogram(y[~single].numpy(), bins=50)
            heights = heights / len(y) / np.diff(edges)
            axis.stairs(heights, edges, fill=True, color="0.85")
            draw = {"linewidth": 1.6}
            if found.density.max() > 3 * heights.max():
                axis.set_ylim(0, 1.5 * heights.max())
        for k, colour in enumerate(colours):
            axis.plot(found.at, found.density[:, k], color=colour, **draw)
        axis.plot(found.at, found.density.sum(1), **TOTAL)
        axis.set(xlabel=_unit(data, name), ylabel="share" if found.discrete else "density")
        axis.spines[["top", "right"]].set_visible(False)
        if len(found.atoms):
            _draw_atoms(axis, found, shares_of(y, found.atoms), colours)
    _legend(figure, smoothed, colours, whole=True)
    return figure


def _draw_atoms(axis: Any, found: Curves, shares: np.ndarray, colours: Sequence[str]) -> None:
    """Single values: the share of the data and, stacked by state, of the model, on an axis of their own."""
    wide = (found.at[-1] - found.at[0]) / 30
    other = axis.twinx()
    for value, share, states in zip(found.atoms, shares, found.shares, strict=True):
        outwards = 1 if value > found.at.mean() else -1
        x = value + outwards * 1.5 * wide
        other.bar(x - wide / 2, share, wide, color="0.85")
        other.bar(x + wide / 2, states, wide, bottom=np.cumsum(states) - states, color=colours)
        other.text(x, max(share, states.sum()), f"{share:.0%}", ha="center", va="bottom", fontsize=7)
    other.set(ylim=(0, 1.25 * max(shares.max(), found.shares.sum(1).max())))
    other.set_ylabel("share that is " + " or ".join(f"{v:g}" for v in found.atoms))
    other.spines[["top"]].set_visible(False)


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


def _individuals(fit: Fit, x: Labelled) -> str:
    plates: Mapping[str, Any] = fit.density.graph.plates
    found = [d for d in x.dims if d in plates and plates[d].dim == -1]
    if not found:
        raise FitError("the states stand in no plate of individuals.", suggestion="a plate in dimension -1")
    return found[0]


def _colours(x: Labelled) -> list[str]:
    size = x.values.shape[-1]
    return [COLOURS[k % len(COLOURS)] for k in range(size)]


def _legend(figure: Any, x: Labelled, colours: Sequence[str], whole: bool = False) -> None:
    """Colours of the states; with ``whole`` also those of all states together and of the data."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Rectangle

    handles: list[Any] = [Rectangle((0, 0), 1, 1, color=c) for c in colours]
    names = [n if isinstance(n, str) and not n.isdigit() else f"state {n}" for n in x.labels[STATE]]
    if whole:
        handles += [Line2D([], [], **TOTAL), Rectangle((0, 0), 1, 1, color="0.85")]
        names += ["all states", "data"]
    figure.legend(handles, names, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9)


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
