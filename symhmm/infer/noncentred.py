"""Noncentred: random effects in units of their own uncertainty, as a change of coordinates with its Jacobian.

A normal effect ``u ~ Normal(loc, 1 / sqrt(p))`` of which the data say about as much as a normal likelihood of precision h around
m is written ``u = (p loc + h m) / (p + h) + w / sqrt(p + h)``: given the population's values, w is about standard normal. With
h = 0 this is the non-centred form (Papaspiliopoulos, Roberts and Skold 2007), with h far above p the centred one, and in
between w follows neither the spread of the population, however small, nor its values. A spread that may be zero gets a sign
that means nothing: then zero is no edge and no infinitely long valley, but a place like any other.
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
LEAST = 0.01  # share of the data below which they are taken to say nothing


@dataclass(frozen=True, eq=False)
class Coordinates:
    """The coordinates in which a sampler moves.

    Args:
        goal: the density and its own unconstrained vector u.
        names: sites in other coordinates, in the order of the program.
        information: shape (size,), the precision h with which the data know each effect; 0 where nothing is known.
        peak: shape (size,), the place m where the data have it.
        signed: shape (size,), whether a coordinate is a spread with a sign where the vector has its logarithm.
        spreads: for each spread that can have a sign, its position and those of the effects that it is the scale of.

    The laws: ``back(forward(w)[0]) == w`` up to signs, and the second value of ``forward`` is log abs det du/dw, nats.
    """

    goal: Target
    names: tuple[str, ...]
    information: Tensor
    peak: Tensor
    signed: Tensor
    spreads: tuple[tuple[int, Tensor], ...] = ()

    @property
    def constants(self) -> tuple[Tensor, Tensor, Tensor]:
        """What may change without another capture; see `given`."""
        return self.information, self.peak, self.signed

    def given(self, information: Tensor, peak: Tensor, signed: Tensor) -> "Coordinates":
        """Those of the same sites with other constants."""
        return replace(self, information=information, peak=peak, signed=signed)

    def forward(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """The density's own vector, shape (size,), and the log volume change, nats, shape ()."""
        log_size = torch.where(self.signed, w, 1.0).abs().log()
        u, volume = torch.where(self.signed, log_size, w), -log_size.sum()
        # In the order of the program: what an effect's loc and scale read has been written before.
        for e in self._entries:
            h, m = self.information[e.start : e.stop], self.peak[e.start : e.stop]
            loc, precision = moments(self.goal, u, e)
            total = precision + h
            own = (precision * loc + h * m) / total + total.rsqrt() * u[e.start : e.stop]
            u = torch.cat([u[: e.start], own, u[e.stop :]])
            volume = volume - 0.5 * total.log().sum()
        return u, volume

    def back(self, u: Tensor) -> Tensor:
        """The coordinates of the density's own vector ``u``, shape (size,); signs are positive."""
        w = torch.where(self.signed, torch.where(self.signed, u, 0.0).exp(), u)
        for e in self._entries:
            h, m = self.information[e.start : e.stop], self.peak[e.start : e.stop]
            loc, precision = moments(self.goal, u, e)
            total = precision + h
            own = total.sqrt() * (u[e.start : e.stop] - (precision * loc + h * m) / total)
            w = torch.cat([w[: e.start], own, w[e.stop :]])
        return w

    def informed(self, information: Tensor, peak: Tensor) -> "Coordinates":
        """Those of effects of which the data say as much as normal likelihoods, shapes (size,)."""
        known = torch.zeros_like(self.signed)
        for e in self._entries:
            known[e.start : e.stop] = information[e.start : e.stop] > 0
        return replace(self, information=torch.where(known, information, 0.0), peak=torch.where(known, peak, 0.0))

    def with_signs(self, precision: Tensor) -> "Coordinates":
        """Signs for those spreads alone that come near zero.

        Args:
            precision: shape (draws, size), of the effects' priors at draws from the posterior, as `priors` gives it.
        """
        share = self.information / (self.information + precision.quantile(1 - TAIL, dim=0))
        signed = torch.zeros_like(self.signed)
        for position, effects in self.spreads:
            signed[position] = bool(share[effects].mean() < NEAR_ZERO)
        return replace(self, signed=signed)

    def plain(self) -> "Coordinates":
        """Those of the density itself."""
        zero = torch.zeros_like(self.peak)
        return Coordinates(self.goal, (), zero, zero, torch.zeros_like(self.signed))

    def priors(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Location and precision of each effect's prior at ``u``, shapes (size,); itself and 1 elsewhere."""
        loc, precision = u.clone(), torch.ones_like(u)
        for e in self._entries:
            loc[e.start : e.stop], precision[e.start : e.stop] = moments(self.goal, u, e)
        return loc, precision

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
    signed = torch.zeros_like(goal.start, dtype=torch.bool)
    spreads = _spreads(goal, names)
    for position, _ in spreads:
        signed[position] = True
    return Coordinates(goal, names, torch.zeros_like(goal.start), torch.zeros_like(goal.start), signed, spreads)


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

    limited = set() if goal.restriction is None else set(goal.free[goal.restriction.limited].tolist())
    where = torch.cat([torch.arange(e.start, e.stop) for e in effects])
    before = log_precision(u)
    for e in goal.entries:
        free = u[e.start : e.stop].reshape(e.free_shape)
        if e.plates or e.shape != e.free_shape or not torch.equal(e.transform(free), free.exp()):
            continue
        for i in sorted(set(range(e.start, e.stop)) - limited):
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
