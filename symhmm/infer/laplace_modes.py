"""Modes of the random effects, their curvature there, and the derivatives of Laplace's approximation, from gradients alone.

All members are searched in one batch. Steps of differences are lengths in standard deviations of the effects. Where a spread
goes to zero, so do they, and u + step would be rounded to u: steps are then as long as the rounding of u asks for. This
changes nothing, since so close to zero the prior alone decides, and its density is quadratic over any length; where it is not,
the effects cannot be resolved, and the value is NaN. What rounding leaves of the way to a mode is added in the value, and
followed in the gradient, to second order. A marginal thus goes to its limit as a spread goes to zero.
"""

from dataclasses import dataclass, replace
from math import log, pi

import torch
from torch import Tensor

from symhmm.infer.laplace_members import Members

SLOPE = 3e-4  # step of a first difference, in standard deviations of the effects
CURVE = 5e-3  # step of a second difference
REACH = 1e-9  # least step of any difference relative to the effects: their rounding is then 1e-7 of it
LONG = 0.1  # step beyond which the density is asked whether it is quadratic
DECREMENT = 1e-17  # nats that a Newton step may still gain at a mode; the log-determinant feels its square root
FAINT = 1e60  # blur beyond which squares of steps are no numbers any more
FLOOR = 0.05  # least curvature relative to the last one, where a member's log-density is not concave
STEEP = 100.0  # curvature relative to the last one beyond which steps were too long, and it is measured again
NEWTON = 60  # curvatures computed in search of a mode before it is given up
HALVINGS = 15  # times that a step is cut to a quarter before it is given up
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Modes:
    """Conditional modes of the effects and their spread.

    Args:
        u: shape (M, D), unconstrained.
        root: shape (M, D, D), L with L L' = inv(H): the conditional covariance.
        value: shape (M,), log-density there, nats; NaN where the effects cannot be resolved.
        decrement: shape (M,), nats that a Newton step would still gain.
        concave: shape (M,), whether H is positive definite.
        blur: shape (M,), standard deviations by which rounding moves the effects.
    """

    u: Tensor
    root: Tensor
    value: Tensor
    decrement: Tensor
    concave: Tensor
    blur: Tensor

    @property
    def proper(self) -> Tensor:
        """Shape (M,), whether a member's mode is one, as far as the numbers can tell."""
        return self.concave & (self.decrement <= (2 * self.blur).square().clamp(min=1e3 * DECREMENT))

    @property
    def found(self) -> bool:
        """Whether every member's mode is one."""
        return bool(self.proper.all())


def find_modes(members: Members, theta: Tensor, start: Modes | None = None) -> Modes:
    """Mode of each member's effects given ``theta``, by Newton steps with backtracking, all members in one batch.

    The curvature of an earlier step is kept while steps with it make good progress, since a gradient costs one point
    and a curvature 2 D. The search ends where no member moves, where a number is not finite, or after `NEWTON` curvatures;
    `Modes.proper` says what was found.
    """
    m, d = members.index.shape
    if start is None:
        u, root = members.start.clone(), torch.eye(d, dtype=theta.dtype).expand(m, d, d).clone()
    else:
        u, root = start.u, start.root
    value, gradient = (x[0] for x in members.slope(theta, u[None]))
    at = Modes(u, root, value, torch.zeros_like(value), torch.ones(m, dtype=torch.bool), _blur(u, root))
    if start is None:
        at, *_ = _curved(members, theta, at)
    kicks, resolved = 0, torch.ones(m, dtype=torch.bool)
    for _ in range(NEWTON):
        at, w = _measured(at, gradient)
        if not bool(at.value.isfinite().all() and at.decrement.isfinite().all()):
            break
        # Step 1: steps with the curvature at hand, as long as each divides what is left to gain by ten or more.
        slow = False
        while not slow and bool((at.decrement > DECREMENT).any()):
            before = at.decrement
            at, gradient, _ = _backtrack(members, theta, at, gradient, w)
            at, w = _measured(at, gradient)
            slow = not bool((at.decrement <= (0.1 * before).clamp(min=DECREMENT)).all())
        # Step 2: the curvature here; done if the gradient is nothing by this measure as well.
        at, direction, steep = _curved(members, theta, at)
        resolved = direction.isfinite().all(-1)
        at, w = _measured(at, gradient)
        if bool((at.decrement <= DECREMENT).all()):
            if bool((steep > STEEP).any()):
                continue
            if bool(at.concave.all()) or kicks == 3:
                break
            # A saddle: half a standard deviation along the direction in which the density rises.
            kicks += 1
            u = torch.where((at.concave | ~resolved)[:, None], at.u, at.u + 0.5 * direction)
            value, gradient = (x[0] for x in members.slope(theta, u[None]))
            at = replace(at, u=u, value=value)
            continue
        done = at.decrement <= (2 * at.blur).square().clamp(min=DECREMENT)
        small, before = at.decrement <= 1e3 * DECREMENT, at.value
        at, gradient, moved = _backtrack(members, theta, at, gradient, w)
        if bool((steep <= STEEP).all() and (done | ~moved | small & (at.value == before)).all()):
            break  # at the precision of the numbers, or no way on
    at, _ = _measured(at, gradient)
    resolved = resolved & (at.blur < FAINT) & at.decrement.isfinite()
    return replace(at, value=torch.where(resolved, at.value, torch.nan))


def marginal_terms(modes: Modes) -> Tensor:
    """Laplace's approximation of each member's integral, shape (M,), nats."""
    d = modes.u.shape[1]
    top = modes.value + torch.where(modes.proper, modes.decrement, 0.0)
    return top + 0.5 * d * log(2 * pi) + torch.linalg.slogdet(modes.root).logabsdet


def marginal_gradient(members: Members, theta: Tensor, modes: Modes) -> Tensor:
    """Gradient of the sum of `marginal_terms` in theta, shape (P,)."""
    d = modes.u.shape[1]
    length = _length(modes, CURVE)
    columns = modes.root.permute(2, 0, 1) * length[:, None]
    points = torch.cat([modes.u + columns, modes.u - columns, modes.u[None]])
    weight = (0.5 / length.square()).expand(2 * d + 1, -1).clone()
    weight[-1] = 1.0 - d / length.square()
    direct, pull = members.weighted(theta, points, weight)
    # The mode's response: du* = inv(H) f_u_theta dtheta, met by the pull of log det H on the effects, and by what is left
    # of their own gradient.
    w = (modes.root.mT @ pull.sum(0)[..., None])[..., 0]
    size, length = w.norm(dim=-1), _length(modes, SLOPE)
    move = (modes.root @ (w / size.clamp(min=1e-300)[:, None])[..., None])[..., 0] * length[:, None]
    each = 0.5 * size / length
    through, _ = members.weighted(theta, torch.stack([modes.u + move, modes.u - move]), torch.stack([each, -each]))
    return direct + through


def _measured(at: Modes, gradient: Tensor) -> tuple[Modes, Tensor]:
    """The same with its decrement, and the gradient in standard deviations, shape (M, D)."""
    w = (at.root.mT @ gradient[..., None])[..., 0]
    return replace(at, decrement=0.5 * w.square().sum(-1)), w


def _blur(u: Tensor, root: Tensor) -> Tensor:
    inverse = torch.linalg.inv_ex(root).inverse
    return EPS * (u.abs() * inverse.norm(dim=-2)).amax(-1)


def _length(at: Modes, usual: float) -> Tensor:
    """Length of a difference in standard deviations, shape (M,): the usual one where rounding allows it."""
    return (at.blur * (REACH / EPS)).clamp(min=usual)


def _backtrack(members: Members, theta: Tensor, at: Modes, gradient: Tensor, w: Tensor) -> tuple[Modes, Tensor, Tensor]:
    """A Newton step, cut for each member until its density has not fallen: where it ends, the gradient there, who moved."""
    step = (at.root @ w[..., None])[..., 0]
    scale = torch.ones_like(at.value)
    rounding = 1e-13 * at.value.abs().clamp(min=1.0) + at.blur * (w.norm(dim=-1) + at.blur)
    for _ in range(HALVINGS):
        u = at.u + scale[:, None] * step
        value, slope = (x[0] for x in members.slope(theta, u[None]))
        worse = ~(value >= at.value - rounding) | ~slope.isfinite().all(-1)
        if not bool(worse.any()):
            break
        scale = torch.where(worse, scale / 4, scale)
    # No rise at any scale: these members stay where they are.
    u, slope = torch.where(worse[:, None], at.u, u), torch.where(worse[:, None], gradient, slope)
    return replace(at, u=u, value=torch.where(worse, at.value, value)), slope, (u != at.u).any(-1)


def _curved(members: Members, theta: Tensor, at: Modes) -> tuple[Modes, Tensor, Tensor]:
    """The same with a root of the inverse Hessian there, the direction of lowest curvature, NaN where it is unknown, shape
    (M, D), and the highest one relative to the last root, shape (M,).

    Differences go along the columns of the last root, which makes them one standard deviation long, whatever the units
    of the effects. Curvatures are made positive for the sake of the next step.
    """
    d, length = at.u.shape[1], _length(at, SLOPE)
    columns = at.root.permute(2, 0, 1) * length[:, None]
    values, gradient = members.slope(theta, torch.cat([at.u + columns, at.u - columns]))
    product = (gradient[d:] - gradient[:d]).permute(1, 2, 0) / (
        2 * length[:, None, None]
    )  # (M, D, D): H times the root
    inner = at.root.mT @ product
    inner = (inner + inner.mT) / 2
    if not bool(inner.isfinite().all()):
        unknown = torch.full_like(at.u, torch.nan)
        return replace(at, concave=torch.zeros_like(at.concave)), unknown, torch.zeros_like(at.value)
    found, vectors = torch.linalg.eigh(inner)
    lowest = (at.root @ vectors[..., :1])[..., 0]
    positive = torch.where(found > 0, found, found.abs().clamp(min=FLOOR))
    root = at.root @ vectors / positive[:, None, :].sqrt()
    # Over a long step, values and gradients agree on the curvature where the density is quadratic.
    fall = (at.value - (values[:d] + values[d:]) / 2).T
    wanted = 0.5 * length[:, None].square() * inner.diagonal(dim1=-2, dim2=-1)
    unlike = ((fall - wanted).abs() > 0.01 * wanted.abs()).any(-1) & (length > LONG)
    return (
        replace(at, root=root, concave=found[:, 0] > 0, blur=_blur(at.u, root)),
        torch.where(unlike[:, None], torch.nan, lowest),
        found[:, -1],
    )
