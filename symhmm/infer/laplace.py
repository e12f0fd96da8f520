"""Laplace: a density with its random effects integrated out, as another density with an exact gradient.

For each member of a plate, with effects u of dimension D and mode u* of the joint log-density f(theta, u),

    log integral of exp f  ~  f(theta, u*) + D / 2 log(2 pi) - 1/2 log det H,    H = -f_uu(theta, u*)

(Tierney and Kadane 1986; Skaug and Fournier 2006). The chain kernel has first derivatives only, and these suffice. With
L L' = inv(H), H comes from differences of the gradient along the columns of L, all members and columns in one batch. The
derivative of log det H is tr(inv(H) dH), a sum of second differences of f along the same columns, so that the gradient
of a weighted sum of f at 2 D + 1 points holds it exactly, and the response of the mode, du* = inv(H) f_u_theta dtheta,
enters by one directional derivative.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from symhmm.compiler.density import Compiled, Density
from symhmm.compiler.free import FreeValues
from symhmm.compiler.layout import Layout
from symhmm.compiler.steps import Plan
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.infer.laplace_members import Members, members
from symhmm.infer.laplace_modes import Modes, find_modes, marginal_gradient, marginal_terms


@dataclass
class _Warm:
    """Where the last search for modes ended; the next one starts there."""

    modes: Modes | None = None
    theta: Tensor | None = None
    searches: int = 0


@dataclass(frozen=True, eq=False)
class Laplace(FreeValues):
    """A density whose random effects have been integrated out; drivers treat it as the `Density` it came from.

    ``log_prob``, ``per``, ``value_and_grad``, ``pack`` and ``unpack`` are those of the remaining values; ``modes`` gives
    the effects.
    """

    density: Density
    members: Members
    _warm: _Warm = field(default_factory=_Warm, repr=False)

    @property
    def graph(self) -> FactorGraph:
        """The factor graph of parameters and effects together."""
        return self.density.graph

    @property
    def plan(self) -> Plan:
        """How the graph is contracted at given effects."""
        return self.density.plan

    @property
    def compiled(self) -> Compiled:
        """Says that modes are found anew at each evaluation, so that it cannot be captured."""
        why = "the modes of the effects are found at each evaluation"
        return replace(self.density.compiled, layout=self.layout, mode="eager", reason=why, steps={})

    @property
    def layout(self) -> Layout:
        """Names, shapes and places of the values that remain."""
        return self.members.kept

    def log_prob(self, values: Mapping[str, Tensor]) -> Tensor:
        """Marginal log-density at constrained values, nats, shape (); differentiable once. `ValuesError` as `Density`."""
        theta = self.members.flat(self.layout.check(values))
        out: Tensor = _Marginal.apply(theta, self)
        return out

    def per(self, plate: str, values: Mapping[str, Tensor]) -> Tensor:
        """Marginal log-density of each member of the plate, nats, shape (members,); no gradient.

        Raises:
            GraphError: it is not the plate whose effects are integrated.
        """
        if plate != self.members.plate:
            raise GraphError(
                f"the marginal has no terms for each member of {plate!r}.",
                details=[f"effects are integrated for each member of {self.members.plate!r}"],
            )
        theta = self.members.flat(self.layout.check(values)).detach()
        return marginal_terms(self.modes_at(theta))

    def value_and_grad(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Marginal log-density at an unconstrained vector and its gradient, shapes () and (size,)."""
        with torch.enable_grad():
            free = vector.detach().requires_grad_()
            value = self.log_prob(self.unpack(free))
            (gradient,) = torch.autograd.grad(value, free)
        return value.detach(), gradient

    def graph_at(self, values: Mapping[str, Tensor]) -> FactorGraph:
        """The factor graph at ``values`` and the modes last found."""
        return self.density.graph_at(self._with_effects(values))

    def factors_at(self, values: Mapping[str, Tensor]) -> FactorGraph:
        """As `graph_at`, without running the program."""
        return self.density.factors_at(self._with_effects(values))

    def nonfinite_sites(self, values: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Sites whose factor is not finite at ``values``."""
        return self.density.nonfinite_sites(self._with_effects(values))

    def modes(self, values: Mapping[str, Tensor]) -> Modes:
        """Conditional modes and covariances of the effects at constrained ``values``."""
        return self.modes_at(self.members.flat(self.layout.check(values)).detach())

    def modes_at(self, theta: Tensor) -> Modes:
        """The same at flat constrained values; starts from the modes of the last call."""
        warm = self._warm
        if warm.theta is not None and torch.equal(theta, warm.theta):
            assert warm.modes is not None
            return warm.modes
        warm.searches += 1
        found = find_modes(self.members, theta, warm.modes)
        if not found.value.isfinite().all() or not found.found:
            again = find_modes(self.members, theta, None)
            if again.found or not found.value.isfinite().all():
                found = again
        if found.value.isfinite().all():
            warm.modes, warm.theta = found, theta.clone()
        return found

    def bind(self, *args: Any, **kwargs: Any) -> "Laplace":
        """The same integral for other data."""
        return laplace(self.density.bind(*args, **kwargs), over=self.members.names)

    def __repr__(self) -> str:
        m, d = self.members.index.shape
        where = f"for each of {m} members of {self.members.plate}" if self.members.plate else "together"
        return f"Laplace marginal density of {self.size} free values; {d} effects integrated {where}"

    def _with_effects(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        u = self.members.start if self._warm.modes is None else self._warm.modes.u
        return {**values, **self.members.effects(u)}


def laplace(density: Density, over: str | Iterable[str] | None = None) -> Laplace:
    """Integrate random effects out of a density by Laplace's approximation, exact where they are jointly normal.

    Args:
        density: of parameters and effects.
        over: a plate or names of continuous latents; all latents inside plates by default.

    Returns:
        a density of the other values, for every driver; of O(M D^2) gradients of one member at each evaluation. Effects
        that are coupled across members (crossed plates) are integrated together, at the square of their number.

    Raises:
        FitError: there is nothing to integrate, a plate is subsampled, or the numbers are float32.

    >>> import pyro, pyro.distributions as dist, symhmm
    >>> def model(y):
    ...     with pyro.plate("group", len(y)):
    ...         d = pyro.sample("d", dist.Normal(torch.zeros(2).double(), 1.0))
    ...         pyro.sample("y", dist.Normal(d, 1.0), obs=y)
    >>> y = torch.tensor([0.5, 1.0], dtype=torch.float64)
    >>> marginal = laplace(symhmm.compile(model, y))
    >>> bool((marginal.log_prob({}) - dist.Normal(0 * y, 2**0.5).log_prob(y).sum()).abs() < 1e-8)
    True
    """
    return Laplace(density, members(density, over))


class _Marginal(torch.autograd.Function):
    """Value and gradient of the marginal as one differentiable operation."""

    @staticmethod
    def forward(ctx: Any, theta: Tensor, owner: Laplace) -> Tensor:
        theta = theta.detach()
        modes = owner.modes_at(theta)
        rest, slope = owner.members.rest_and_gradient(theta, modes.u)
        ctx.owner, ctx.modes = owner, modes
        ctx.save_for_backward(theta, slope)
        return marginal_terms(modes).sum() + rest

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        theta, slope = ctx.saved_tensors
        return weight * (marginal_gradient(ctx.owner.members, theta, ctx.modes) + slope), None
