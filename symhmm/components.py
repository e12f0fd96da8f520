"""Components: how much the members of a plate differ in the population, and how strongly each of them is pooled.

The spread of the effects is read off the program. Where the gradient of their log-prior is linear in the effects, the prior
is normal, and minus the slope of the gradient is its precision. An effect of spread one, which the program multiplies
itself (``b = beta + tau * d``), is recognised by what scaling does to the log-likelihood f: where ``tau df/dtau`` is the sum
over members of ``d df/dd``, doubling tau is doubling the effects, and tau is their spread.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from torch import Tensor
from torch.distributions import constraints

from symhmm.compiler.density import Density
from symhmm.effects import Fitted, uncertain_effects
from symhmm.infer.guide import Block, blocks_by_role
from symhmm.infer.information import EDGE, Z95, interval, support
from symhmm.infer.verdict import NOTHING
from symhmm.tables.results import Table, label

Values = Mapping[str, Tensor]
DRAWS = 100  # of the posterior, for the uncertainty of a component
ALIKE = 1e-4  # share of an effect's variance that lies between members, at a maximum of the likelihood at zero
SAME = 1e-7  # relative difference up to which two derivatives count as the same


@dataclass(frozen=True, eq=False)
class Population:
    """The distribution from which the effects of one plate come, as the program has it.

    Args:
        block: the effects, shape (M, D).
        normal: whether it is normal (on the unconstrained scale).
        scales: for each of the D effects, the name and the element of the value that is its spread, where there is one.
    """

    block: Block
    normal: bool
    scales: tuple[tuple[str, int] | None, ...]


def variance_components(fit: Fitted) -> Table:
    """Standard deviations and correlations of the random effects in the population, one row per component.

    ``between`` is the spread of the members' own estimates, which are drawn towards each other and spread less. A standard
    deviation is ``at zero`` where the data do not tell the members apart; it has no standard error then. ``-`` is what
    the fit or the program does not say, such as the spread of a prior that is not normal.
    """
    rows: list[tuple[object, ...]] = []
    for p in populations(fit.density, fit.estimate.values):
        names, (m, d) = _names(fit.density, p.block), p.block.index.shape
        value, error = _components(fit, p)
        between, share = _between(fit, p.block)
        plates, zero = ", ".join(p.block.plates), [False] * d
        for k in range(d):
            zero[k] = bool(value[k] < EDGE) or bool(share[k] < (ALIKE if fit.estimate.integrated else NOTHING))
            v, se = float(value[k]), nan if zero[k] else float(error[k])
            low, high = (0.0, nan) if zero[k] else interval(v, se, constraints.positive)
            rows.append(
                (f"sd {names[k]}", plates, m, v, se, low, high, float(between[k]), "at zero" if zero[k] else "")
            )
        for k, (i, j) in enumerate(_pairs(d)):
            r, se = float(value[d + k]), float(error[d + k])
            if abs(r) > SAME and not zero[i] and not zero[j]:
                # Fisher's scale, on which the interval stays between -1 and 1.
                reach = Z95 * se / (1 - r * r) if r * r < 1 else nan
                ends = np.tanh([np.arctanh(r) - reach, np.arctanh(r) + reach]).tolist()
                rows.append((f"correlation {names[i]}, {names[j]}", plates, m, r, se, *ends, nan, ""))
    columns = ("component", "plate", "members", "estimate", "se", "2.5%", "97.5%", "between", "remark")
    return Table(columns, tuple(rows))


def shrinkage(fit: Fitted, plate: str | None = None) -> Table:
    """How strongly each member is drawn to the population, one row per effect and member.

    ``shrinkage`` is the variance of the effect given the data over its variance in the population: 0 where a member's own
    data decide, 1 where they say nothing. For normal data the estimate lies this share of the way from the member's own
    mean to the population's. ``observations`` are the member's own observed values.

    Raises:
        FitError: there are no random effects of that plate, or the fit does not know how uncertain they are.
    """
    posterior = uncertain_effects(fit, plate)
    density, rows = fit.density, list[tuple[object, ...]]()
    for p in populations(density, fit.estimate.values, plate):
        index, counts = p.block.index, observations_by(density, p.block.plates)
        with torch.no_grad():
            prior = _covariance(density, fit.estimate.values, p.block).diagonal()
        share = (posterior.sd[index].square() / prior).clamp(max=1.0) if p.normal else torch.full(index.shape, nan)
        for d in range(index.shape[1]):
            for i, at in enumerate(index[:, d].tolist()):
                own = float(posterior.vector[at]), float(posterior.sd[at])
                rows.append((_name(density, at), ", ".join(p.block.plates), int(counts[i]), *own, float(share[i, d])))
    return Table(("effect", "plate", "observations", "estimate", "sd", "shrinkage"), tuple(rows))


def populations(density: Density, values: Values, plate: str | None = None) -> tuple[Population, ...]:
    """The population of each plate's effects, read off the program at constrained ``values``."""
    held = {n: v.detach() for n, v in values.items()}
    found = []
    for block in blocks_by_role(density.layout.entries, density.graph, "full"):
        if block.plates and (plate is None or plate in block.plates):
            normal = _is_normal(density, held, block)
            found.append(Population(block, normal, _scales(density, held, block, normal)))
    return tuple(found)


def observations_by(density: Density, plates: tuple[str, ...]) -> Tensor:
    """Observed values of each member, masked ones left out, shape (members,); members in the order of ``plates``.

    A masked element is recognised by a log-density of exactly zero in every state.
    """
    graph = density.factors_at(density.initial())
    sizes = {n: p.size for n, p in graph.plates.items()} | {n: c.length for n, c in graph.chains.items()}
    total = torch.zeros([sizes[p] for p in plates])
    for f in (f for f in graph.factors if f.role == "observed" and set(plates) <= set(f.frames)):
        names, data = list(f.term.inputs), f.term.data
        states = [i for i, n in enumerate(names) if n in graph.variables]
        seen = (data != 0).any(dim=states) if states else data != 0
        order = [n for n in names if n not in graph.variables]
        missing = [n for n in f.frames if n not in order]
        seen = seen.reshape(*seen.shape, *[1] * len(missing)).expand(*seen.shape, *(sizes[n] for n in missing))
        order += missing
        front = [order.index(p) for p in plates]
        rest = [i for i in range(len(order)) if i not in front]
        total += seen.permute(*front, *rest).reshape(*total.shape, -1).sum(-1)
    return total.reshape(-1)


def _components(fit: Fitted, p: Population) -> tuple[Tensor, Tensor]:
    """Standard deviations, then correlations, and their standard errors; NaN where unknown."""

    def components(values: Values) -> Tensor:
        d = p.block.index.shape[1]
        named = {k: values[s[0]].reshape(-1)[s[1]] for k, s in enumerate(p.scales) if s is not None}
        if not p.normal:
            unknown = torch.full((), nan, dtype=fit.density.layout.dtype)
            return torch.stack([named.get(k, unknown) for k in range(d)] + [unknown] * len(_pairs(d)))
        covariance = _covariance(fit.density, values, p.block)
        sd = covariance.diagonal().sqrt()
        return torch.stack(
            [named.get(k, sd[k]) for k in range(d)] + [covariance[i, j] / sd[i] / sd[j] for i, j in _pairs(d)]
        )

    with torch.no_grad():
        value = components(fit.estimate.values)
    if fit.information is not None:
        return value, fit.delta(components)
    if fit.posterior_draws and any(not e.is_param and not e.plates for e in fit.density.layout.entries):
        with torch.no_grad():
            drawn = [components({n: x[i] for n, x in fit.posterior_draws.items()}) for i in range(DRAWS)]
        return value, torch.stack(drawn).std(0)
    return value, torch.full_like(value, nan)


def _between(fit: Fitted, block: Block) -> tuple[Tensor, Tensor]:
    """Standard deviation of the members' estimates and its share of the variance, both of shape (D,)."""
    posterior = fit.estimate.posterior
    vector = fit.estimate.vector if posterior is None else posterior.vector
    between = vector[block.index].var(0, correction=0)
    if posterior is None:
        return between.sqrt(), torch.ones_like(between)
    return between.sqrt(), between / (between + posterior.sd[block.index].square().mean(0))


def _covariance(density: Density, values: Values, block: Block) -> Tensor:
    """Covariance of the effects in a normal population, shape (D, D), mean over members; differentiable in ``values``."""
    u = torch.zeros(block.index.shape, dtype=density.layout.dtype)
    return torch.linalg.inv(_precision(density, values, block, u)).mean(0)


def _is_normal(density: Density, values: Values, block: Block) -> bool:
    """Whether the log-prior has the same negative definite curvature at two places."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, *block.index.shape, generator=generator, dtype=density.layout.dtype)
    first, second = (_precision(density, values, block, u) for u in points)
    if not bool(first.isfinite().all()) or not torch.allclose(first, second, rtol=1e-4, atol=1e-6):
        return False
    return bool((torch.linalg.eigvalsh(first) > 0).all())


def _precision(density: Density, values: Values, block: Block, u: Tensor) -> Tensor:
    """Minus the change of the prior's slope along each effect, a step of one; shape (M, D, D)."""
    slope = _prior_slope(density, values, block, u)
    d = u.shape[1]
    moved = [_prior_slope(density, values, block, u + e) for e in torch.eye(d, dtype=u.dtype)]
    matrix = torch.stack([slope - m for m in moved], -1)
    return (matrix + matrix.mT) / 2


def _prior_slope(density: Density, values: Values, block: Block, u: Tensor) -> Tensor:
    """Gradient of the effects' own log-prior at unconstrained effects ``u``, shape (M, D)."""
    further = any(v.requires_grad for v in values.values())
    with torch.enable_grad():
        free = u.detach().requires_grad_()
        effects, total = _named(density, block, free)
        total = total + _priors(density, {**values, **effects}, set(effects))
        (slope,) = torch.autograd.grad(total, free, create_graph=further)
    return slope


def _priors(density: Density, values: Values, names: set[str]) -> Tensor:
    """Sum of the log-priors of some latents, nats."""
    graph = density.factors_at(values)
    total = torch.zeros((), dtype=density.layout.dtype)
    for f in (f for f in graph.factors if f.name in names):
        missing = (graph.plates[n].size for n in f.frames if n not in f.term.inputs)
        total = total + f.scale * torch.Size(missing).numel() * f.term.data.sum()
    return total


def _named(density: Density, block: Block, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Constrained effects by name and their log volume change, from unconstrained ones of shape (M, D)."""
    flat = u.new_zeros(density.size).index_put((block.index.reshape(-1),), u.reshape(-1))
    effects, change = {}, u.new_zeros(())
    for name in block.names:
        e = density.layout[name]
        free = flat[e.start : e.stop].reshape(e.free_shape)
        effects[name] = e.transform(free)
        change = change + e.transform.log_abs_det_jacobian(free, effects[name]).sum()
    return effects, change


def _scales(density: Density, values: Values, block: Block, normal: bool) -> tuple[tuple[str, int] | None, ...]:
    """For each effect of spread one, the positive value that multiplies it in the likelihood."""
    d = block.index.shape[1]
    if not normal:
        return (None,) * d
    sd = _covariance(density, values, block).diagonal().sqrt()
    latents = {e.name for e in density.layout.entries if not e.is_param}
    by_effect, by_value = [], dict[tuple[str, int], list[Tensor]]()
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(block.index.shape, generator=generator, dtype=density.layout.dtype).requires_grad_()
        with torch.enable_grad():
            effects, _ = _named(density, block, u)
            free = {n: v.clone().requires_grad_() for n, v in values.items() if n not in effects}
            every = {**free, **effects}
            # What is left when all priors are taken away is the likelihood.
            total = density.log_prob(every) - _priors(density, every, latents)
            slopes = torch.autograd.grad(total, [u, *free.values()], allow_unused=True, materialize_grads=True)
        by_effect.append((u.detach() * slopes[0]).sum(0))
        for (name, v), slope in zip(free.items(), slopes[1:], strict=True):
            if support(density.layout[name].constraint) == "positive" and not density.layout[name].plates:
                for i, x in enumerate((v.detach() * slope).reshape(-1)):
                    by_value.setdefault((name, i), []).append(x)
    moved = torch.stack(by_effect)
    out: list[tuple[str, int] | None] = [None] * d
    for key, seen in by_value.items():
        for group in _groups(density, block):
            alike = (moved[:, group].sum(-1) - torch.stack(seen)).abs() <= SAME * moved.abs().max()
            if bool(alike.all()) and bool((sd[group] - 1).abs().max() < SAME) and float(seen[0].abs()) > 0:
                out = [key if k in group else old for k, old in enumerate(out)]
    return tuple(out)


def _groups(density: Density, block: Block) -> list[list[int]]:
    """Effects that one value may multiply: one alone, those of a site, all."""
    sites: dict[str, list[int]] = {}
    for k, at in enumerate(block.index[0].tolist()):
        sites.setdefault(next(e.name for e in density.layout.entries if e.start <= at < e.stop), []).append(k)
    every = [[k] for k in range(block.index.shape[1])] + list(sites.values()) + [list(range(block.index.shape[1]))]
    return [g for i, g in enumerate(every) if g not in every[:i]]


def _pairs(d: int) -> list[tuple[int, int]]:
    return [(i, j) for j in range(d) for i in range(j)]


def _names(density: Density, block: Block) -> list[str]:
    """Names of the D effects without their member."""
    out = []
    for name in block.names:
        e = density.layout[name]
        front = [len(e.shape) - density.graph.latents[name].event_dim + d for d in e.plates.values()]
        out += label(name, [s for i, s in enumerate(e.free_shape) if i not in front])
    return out


def _name(density: Density, position: int) -> str:
    """Name of one coordinate of the vector."""
    e = next(e for e in density.layout.entries if e.start <= position < e.stop)
    return label(e.name, e.free_shape)[position - e.start]
