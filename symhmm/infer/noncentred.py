"""Noncentred: random effects in units of their own spread, as a change of coordinates with its Jacobian.

A normal effect ``u ~ Normal(loc, scale)`` is written ``u = loc + scale**(1 - c) * (w - c * loc)`` with a centredness c between
0 (non-centred, Papaspiliopoulos, Roberts and Skold 2007) and 1 (as the program has it). The spread of w does not follow
that of the population where the data say little about a member (c near 0), and where they say much (c near 1) w does not
follow the population's values. A spread that may be zero gets a sign that means nothing: then zero is no edge and no
infinitely long valley, but a place like any other.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import constraints

from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.infer.target import Target

Request = bool | str | Iterable[str]
TAIL = 0.05  # share of draws in which a spread is smallest
NEAR_ZERO = 0.1  # share of the data in the information on its effects there, below which a spread gets a sign


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The coordinates in which a sampler moves.

    Args:
        goal: the density and its own unconstrained vector u.
        names: sites in other coordinates, in the order of the program.
        centred: shape (size,), the centredness c of each coordinate; 1 where nothing changes.
        signed: shape (size,), whether a coordinate is a spread with a sign where the vector has its logarithm.
        spreads: for each spread that can have a sign, its position and those of the effects that it is the scale of.

    The laws: ``back(forward(w)[0]) == w`` up to signs, and the second value of ``forward`` is log abs det du/dw, nats.
    """

    goal: Target
    names: tuple[str, ...]
    centred: Tensor
    signed: Tensor
    spreads: tuple[tuple[int, Tensor], ...] = ()

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The density's own vector, shape (size,), and the log volume change, nats, shape ()."""
        log_size = torch.where(self.signed, w, 1.0).abs().log()
        u, volume = torch.where(self.signed, log_size, w), -log_size.sum()
        # In the order of the program: what an effect's loc and scale read has been written before.
        for e in self._entries:
            c = self.centred[e.start : e.stop]
            loc, precision = moments(self.goal, u, e)
            log_scale = -0.5 * precision.log()
            own = loc + ((1 - c) * log_scale).exp() * (u[e.start : e.stop] - c * loc)
            u = torch.cat([u[: e.start], own, u[e.stop :]])
            volume = volume + ((1 - c) * log_scale).sum()
        return u, volume

    def back(self, u: Tensor) -> Tensor:
        """The coordinates of the density's own vector ``u``, shape (size,); signs are positive."""
        w = torch.where(self.signed, torch.where(self.signed, u, 0.0).exp(), u)
        for e in self._entries:
            c = self.centred[e.start : e.stop]
            loc, precision = moments(self.goal, u, e)
            own = c * loc + (0.5 * (1 - c) * precision.log()).exp() * (u[e.start : e.stop] - loc)
            w = torch.cat([w[: e.start], own, w[e.stop :]])
        return w

    def informed(self, information: Tensor, precision: Tensor) -> "Coordinates":
        """Each effect centred by the share of its information that comes from the data; signs for spreads near zero.

        Args:
            information: shape (size,), what the data say about each effect: curvature of their log-density.
            precision: shape (draws, size), of the effects' priors at draws from the posterior, as `precisions` gives it.
        """
        share = information / (information + precision.median(0).values)
        least = information / (information + precision.quantile(1 - TAIL, dim=0))
        centred, signed = self.centred.clone(), torch.zeros_like(self.signed)
        for e in self._entries:
            centred[e.start : e.stop] = share[e.start : e.stop]
        for position, effects in self.spreads:
            if bool(least[effects].mean() < NEAR_ZERO):
                signed[position] = True
                centred[effects] = 0.0
        return replace(self, centred=centred, signed=signed)

    def plain(self) -> "Coordinates":
        """Those of the density itself."""
        return Coordinates(self.goal, (), torch.ones_like(self.centred), torch.zeros_like(self.signed))

    def precisions(self, u: Tensor) -> Tensor:
        """Precision of each effect's prior at ``u``, shape (size,); 1 elsewhere."""
        out = torch.ones_like(u)
        for e in self._entries:
            out[e.start : e.stop] = moments(self.goal, u, e)[1]
        return out

    @property
    def _entries(self) -> list[Entry]:
        return [e for e in self.goal.entries if e.name in self.names]


def noncentred(goal: Target, request: Request = True) -> Coordinates:
    """Coordinates in which normal random effects are independent of their population's location and spread.

    Args:
        request: True or ``auto`` for every random effect with a normal prior (see `normal_effects`), False for none, or
            names of sites.

    Raises:
        FitError: a name is not that of a random effect with a normal prior.

    >>> import pyro, pyro.distributions as dist, symhmm
    >>> from symhmm.infer.target import target
    >>> def model(y):
    ...     sd = pyro.sample("sd", dist.LogNormal(torch.zeros(()).double(), 1.0))
    ...     with pyro.plate("group", 2):
    ...         pyro.sample("y", dist.Normal(pyro.sample("d", dist.Normal(5.0, sd)), 1.0), obs=y)
    >>> goal = target(symhmm.compile(model, torch.zeros(2).double()), {}, "nuts")
    >>> noncentred(goal).forward(torch.tensor([-2.0, 1.0, -1.0]).double())[0]    # log sd; 5 + 2 and 5 - 2
    tensor([0.6931, 7.0000, 3.0000], dtype=torch.float64)
    """
    known = normal_effects(goal) if request is not False else ()
    if isinstance(request, str) and request != "auto":
        request = (request,)
    names = known
    if not isinstance(request, (bool, str)):
        wanted = tuple(request)
        for name in wanted:
            if name not in known:
                raise FitError(
                    f"{name!r} has no non-centred form.",
                    details=[
                        "that takes a random effect with a normal prior, elementwise, not fixed",
                        f"these are: {', '.join(known) or 'none'}",
                    ],
                    suggestion="noncentred='auto'",
                )
        names = tuple(n for n in known if n in wanted)
    centred, signed = torch.ones_like(goal.start), torch.zeros_like(goal.start, dtype=torch.bool)
    for e in goal.entries:
        if e.name in names:
            centred[e.start : e.stop] = 0.0
    spreads = _spreads(goal, names)
    for position, _ in spreads:
        signed[position] = True
    return Coordinates(goal, names, centred, signed, spreads)


def normal_effects(goal: Target) -> tuple[str, ...]:
    """Random effects whose prior is an elementwise normal density with a location or scale that is fitted.

    It is found out by differentiating the prior's own factor: its slope must be a straight line in each coordinate.
    """
    if goal.density.compiled.mode == "eager":
        return ()
    found = []
    goal.density.factors_at(goal.values(goal.start))  # captured here, where no transform of torch.func is at work
    factors = {f.name for f in goal.density.graph.factors}
    generator = torch.Generator().manual_seed(0)
    u = goal.start + 0.1 * torch.randn(goal.start.shape, generator=generator, dtype=goal.start.dtype)
    with torch.enable_grad():
        for e in goal.entries:
            if e.is_param or not e.plates or not _real(e) or e.name not in factors:
                continue
            free = u.clone().requires_grad_()
            r = 3 * torch.rand(e.stop - e.start, generator=generator, dtype=u.dtype)
            at_zero, precision = _slope(goal, free, e, torch.zeros_like(r)), moments(goal, free, e)[1]
            if not precision.requires_grad and not at_zero.requires_grad:
                continue
            straight = torch.allclose(_slope(goal, free, e, r), at_zero - precision * r, rtol=1e-8, atol=1e-8)
            if straight and bool((precision > 0).all()):
                found.append(e.name)
    return tuple(found)


def moments(goal: Target, u: Tensor, e: Entry) -> tuple[Tensor, Tensor]:
    """Location and precision of an effect's normal prior given the rest of ``u``, shapes (size of the effect,)."""
    zero = torch.zeros_like(u[e.start : e.stop])
    at_zero = _slope(goal, u, e, zero)
    precision = at_zero - _slope(goal, u, e, zero + 1)
    return at_zero / precision, precision


def _slope(goal: Target, u: Tensor, e: Entry, x: Tensor) -> Tensor:
    """Gradient of the effect's own prior at ``x``, shape (size of the effect,); differentiable in ``u``."""
    values = goal.values(u)

    def prior(x: Tensor) -> Tensor:
        graph = goal.density.factors_at({**values, e.name: x.reshape(e.shape)})
        total: Tensor = next(f for f in graph.factors if f.name == e.name).term.data.sum()
        return total

    slope: Tensor = torch.func.grad(prior)(x)
    return slope


def _spreads(goal: Target, names: tuple[str, ...]) -> tuple[tuple[int, Tensor], ...]:
    """Free positive population values to which the scale of effects in ``names`` is proportional, and these effects."""
    effects = [e for e in goal.entries if e.name in names]
    if not effects:
        return ()
    u, found = goal.start.clone(), []

    def log_precision(u: Tensor) -> Tensor:
        return torch.cat([moments(goal, u, e)[1].log() for e in effects])

    where = torch.cat([torch.arange(e.start, e.stop) for e in effects])
    before = log_precision(u)
    for e in goal.entries:
        free = u[e.start : e.stop].reshape(e.free_shape)
        if e.plates or e.shape != e.free_shape or not torch.equal(e.transform(free), free.exp()):
            continue
        for i in range(e.start, e.stop):
            moved = u.clone()
            moved[i] += 1.0
            change = log_precision(moved) - before
            own = (change + 2.0).abs() < 1e-8
            if bool(own.any()) and bool((own | (change.abs() < 1e-8)).all()):
                found.append((i, where[own]))
    return tuple(found)


def _real(e: Entry) -> bool:
    kind = e.constraint
    while isinstance(kind, constraints.independent):
        kind = kind.base_constraint
    return kind is constraints.real and e.shape == e.free_shape
