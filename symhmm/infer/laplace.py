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
from math import log, pi
from typing import Any

import torch
from torch import Tensor

from symhmm.compiler.density import Compiled, Density
from symhmm.compiler.layout import Layout
from symhmm.compiler.roles import Roles, roles
from symhmm.compiler.steps import Plan
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.infer.laplace_members import Members, members

SLOPE = 3e-4  # step of a first difference, in standard deviations of the effects
CURVE = 5e-3  # step of a second difference
DECREMENT = 1e-17  # nats that a Newton step may still gain at a mode; the log-determinant feels its square root
FLOOR = 0.05  # least curvature relative to the last one, where a member's log-density is not concave
NEWTON = 60  # curvatures computed in search of a mode before it is given up


@dataclass(frozen=True, eq=False)
class Modes:
    """Conditional modes of the effects and their spread.

    Args:
        u: shape (M, D), unconstrained.
        root: shape (M, D, D), L with L L' = inv(H): the conditional covariance.
        value: shape (M,), log-density there, nats.
        decrement: shape (M,), nats that a Newton step would still gain.
        concave: shape (M,), whether H is positive definite.
    """

    u: Tensor
    root: Tensor
    value: Tensor
    decrement: Tensor
    concave: Tensor

    @property
    def found(self) -> bool:
        """Whether every member's mode is one."""
        return bool((self.decrement <= 1e3 * DECREMENT).all() and self.concave.all())


@dataclass
class _Warm:
    """Where the last search for modes ended; the next one starts there."""

    modes: Modes | None = None
    theta: Tensor | None = None
    searches: int = 0


@dataclass(frozen=True, eq=False)
class Laplace:
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

    @property
    def size(self) -> int:
        """Length of the unconstrained vector."""
        return self.layout.size

    def roles(self) -> Roles:
        """What is fitted, what is summed out, what is observed."""
        return roles(self.graph, self.layout)

    def initial(self) -> dict[str, Tensor]:
        """Constrained starting values of what remains."""
        start = self.density.initial()
        return {e.name: start[e.name] for e in self.layout.entries}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained vector, shape (size,)."""
        return self.layout.pack(values)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Constrained values of an unconstrained vector; differentiable."""
        return self.layout.unpack(vector)

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


def marginal_terms(modes: Modes) -> Tensor:
    """Laplace's approximation of each member's integral, shape (M,), nats."""
    d = modes.u.shape[1]
    return modes.value + 0.5 * d * log(2 * pi) + torch.linalg.slogdet(modes.root).logabsdet


def find_modes(members: Members, theta: Tensor, start: Modes | None = None) -> Modes:
    """Mode of each member's effects given ``theta``, by Newton steps with backtracking, all members in one batch.

    The curvature of an earlier step is kept while steps with it make good progress, since a gradient costs one point
    and a curvature 2 D.
    """
    m, d = members.index.shape
    if start is None:
        u, root = members.start.clone(), torch.eye(d, dtype=theta.dtype).expand(m, d, d).clone()
        root = _curvature(members, theta, u, root)[0]
    else:
        u, root = start.u, start.root
    value, gradient = (x[0] for x in members.slope(theta, u[None]))
    concave = torch.ones(m, dtype=torch.bool)
    slow, kicks = False, 0
    for _ in range(NEWTON):
        if not bool(value.isfinite().all() and gradient.isfinite().all()):
            break
        w = (root.mT @ gradient[..., None])[..., 0]
        decrement = 0.5 * w.square().sum(-1)
        # Step 1: steps with the curvature at hand, as long as each divides what is left to gain by ten or more.
        while not slow and bool((decrement > DECREMENT).any()):
            u, value, gradient = _backtrack(members, theta, u, value, gradient, (root @ w[..., None])[..., 0])
            w = (root.mT @ gradient[..., None])[..., 0]
            before, decrement = decrement, 0.5 * w.square().sum(-1)
            slow = bool((decrement > torch.maximum(0.1 * before, torch.full_like(before, DECREMENT))).any())
        # Step 2: the curvature here; done if the gradient is nothing by this measure as well.
        root, lowest, direction = _curvature(members, theta, u, root)
        concave = lowest > 0
        w = (root.mT @ gradient[..., None])[..., 0]
        decrement = 0.5 * w.square().sum(-1)
        slow = False
        if bool((decrement <= DECREMENT).all()):
            if bool(concave.all()) or kicks == 3:
                break
            # A saddle: half a standard deviation along the direction in which the density rises.
            kicks += 1
            u = torch.where(concave[:, None], u, u + 0.5 * direction)
            value, gradient = (x[0] for x in members.slope(theta, u[None]))
            continue
        before_value = value
        u, value, gradient = _backtrack(members, theta, u, value, gradient, (root @ w[..., None])[..., 0])
        if bool((value - before_value).abs().max() == 0) and bool((decrement <= 1e3 * DECREMENT).all()):
            break  # at the precision of the numbers
    w = (root.mT @ gradient[..., None])[..., 0]
    return Modes(u, root, value, 0.5 * w.square().sum(-1), concave)


def _backtrack(
    members: Members, theta: Tensor, u: Tensor, value: Tensor, gradient: Tensor, step: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Go along ``step``, halved for each member until its density has not fallen; value and gradient there."""
    scale = torch.ones(u.shape[0], dtype=u.dtype)
    rounding = 1e-13 * value.abs().clamp(min=1.0)
    for _ in range(30):
        new = u + scale[:, None] * step
        new_value, new_gradient = (x[0] for x in members.slope(theta, new[None]))
        worse = ~(new_value >= value - rounding) | ~new_gradient.isfinite().all(-1)
        if not bool(worse.any()):
            return new, new_value, new_gradient
        scale = torch.where(worse, scale / 4, scale)
    # No rise at any scale: these members stay where they are.
    stay = worse[:, None]
    return (
        torch.where(stay, u, new),
        torch.where(worse, value, new_value),
        torch.where(stay, gradient, new_gradient),
    )


def _curvature(members: Members, theta: Tensor, u: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A root of the inverse Hessian at ``u``, the lowest curvature relative to the last, and its direction.

    Differences go along the columns of the last root, which makes them one standard deviation long, whatever the units
    of the effects. Curvatures are made positive for the sake of the next step.
    """
    d = u.shape[1]
    columns = root.permute(2, 0, 1) * SLOPE
    _, gradient = members.slope(theta, torch.cat([u + columns, u - columns]))
    product = (gradient[d:] - gradient[:d]).permute(1, 2, 0) / (2 * SLOPE)  # (M, D, D): H times the root
    inner = root.mT @ product
    inner = (inner + inner.mT) / 2
    if not bool(inner.isfinite().all()):
        return root, torch.full((u.shape[0],), -1.0, dtype=u.dtype), torch.zeros_like(u)
    values, vectors = torch.linalg.eigh(inner)
    lowest = (root @ vectors[..., :1])[..., 0]
    positive = torch.where(values > 0, values, values.abs().clamp(min=FLOOR))
    return root @ vectors / positive[:, None, :].sqrt(), values[:, 0], lowest


def marginal_gradient(members: Members, theta: Tensor, modes: Modes) -> Tensor:
    """Gradient of the sum of `marginal_terms` in theta, shape (P,)."""
    m, d = modes.u.shape
    columns = modes.root.permute(2, 0, 1) * CURVE
    points = torch.cat([modes.u + columns, modes.u - columns, modes.u[None]])
    weight = modes.u.new_full((2 * d + 1, m), 0.5 / CURVE**2)
    weight[-1] = 1.0 - d / CURVE**2
    direct, pull = members.weighted(theta, points, weight)
    # The mode's response: du* = inv(H) f_u_theta dtheta, met by the pull of log det H on the effects.
    w = (modes.root.mT @ pull.sum(0)[..., None])[..., 0]
    move = (modes.root @ w[..., None])[..., 0]
    step = SLOPE / w.norm(dim=-1).clamp(min=1e-8)
    ends = torch.stack([modes.u + step[:, None] * move, modes.u - step[:, None] * move])
    through, _ = members.weighted(theta, ends, torch.stack([0.5 / step, -0.5 / step]))
    return direct + through


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
