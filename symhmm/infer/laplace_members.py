"""Members: the random effects that are integrated out, as one block per member of a plate, and many points in one batch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry, Layout
from symhmm.compiler.step import Constants, Step, trace
from symhmm.compiler.taped import quick
from symhmm.errors import FitError, IntractableError

Terms = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Members:
    """What is integrated, and what stays.

    ``theta`` is everywhere the flat vector of the constrained values that stay, shape (P,); ``u`` the unconstrained
    effects, shape (M, D). Given ``theta`` the M members are independent of each other.

    Args:
        density: of parameters and effects together.
        names: the sites that are integrated.
        plate: whose members they are; None where they are coupled and form one block.
        index: shape (M, D), positions in the density's vector.
        kept: layout of what stays.
        outside: whether terms outside the plate have to be added.
    """

    density: Density
    names: tuple[str, ...]
    plate: str | None
    index: Tensor
    kept: Layout
    outside: bool
    _steps: dict[tuple[str, int], tuple[Step, Constants]] = field(default_factory=dict, repr=False)

    @property
    def start(self) -> Tensor:
        """Unconstrained effects at the program's own start, shape (M, D)."""
        return self.density.pack(self.density.initial()).detach()[self.index]

    def values(self, theta: Tensor, u: Tensor) -> dict[str, Tensor]:
        """All constrained values; differentiable in both."""
        out, used = self.effects(u), 0
        for e in self.kept.entries:
            n = prod(e.shape)
            out[e.name] = theta[used : used + n].reshape(e.shape).to(e.dtype)
            used += n
        return out

    def effects(self, u: Tensor) -> dict[str, Tensor]:
        """The constrained effects alone."""
        out, free = {}, self._free(u)
        for e in self._entries:
            out[e.name] = e.transform(free[e.name]).to(e.dtype)
        return out

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """``theta`` of named constrained values, shape (P,); differentiable."""
        parts = [values[e.name].reshape(-1).to(self.kept.dtype) for e in self.kept.entries]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.kept.dtype)

    def terms(self, theta: Tensor, u: Tensor) -> Tensor:
        """Log-density of each member's data and unconstrained effects, shape (M,), nats."""
        values = self.values(theta, u)
        if self.plate is None:
            total = self.density.log_prob(values).reshape(1)
        else:
            total = self.density.per(self.plate, values)
        for e in self._entries:
            free = self._free(u)[e.name]
            change = e.transform.log_abs_det_jacobian(free, e.transform(free))
            if self.plate is None:
                total = total + change.sum()
            else:
                front = len(e.shape) - self.density.graph.latents[e.name].event_dim + e.plates[self.plate]
                total = total + change.movedim(front, 0).reshape(total.shape[0], -1).sum(-1)
        return total

    def rest(self, theta: Tensor, u: Tensor) -> Tensor:
        """Terms outside the plate, shape (), nats; they do not depend on the effects."""
        values = self.values(theta, u)
        assert self.plate is not None
        return self.density.log_prob(values) - self.density.per(self.plate, values).sum()

    def value(self, theta: Tensor, points: Tensor) -> Tensor:
        """``terms`` at points of shape (S, M, D); shape (S, M)."""
        out: Tensor = self._captured("value", points.shape[0], self._batched, (theta, points))
        return out

    def slope(self, theta: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """``terms`` at points of shape (S, M, D), shape (S, M), and their gradient in the effects, shape (S, M, D)."""

        def f(theta: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                free = points.detach().requires_grad_()
                value = self._batched(theta, free)
                (gradient,) = torch.autograd.grad(value.sum(), free)
            return value.detach(), gradient

        out: tuple[Tensor, Tensor] = self._captured("slope", points.shape[0], f, (theta, points))
        return out

    def weighted(self, theta: Tensor, points: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of ``sum(weight * terms)`` over points (S, M, D): in theta, shape (P,), and in the points."""

        def f(theta: Tensor, points: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                inputs = theta.detach().requires_grad_(), points.detach().requires_grad_()
                total = (self._batched(*inputs) * weight).sum()
                gradients = torch.autograd.grad(total, inputs, allow_unused=True, materialize_grads=True)
            return gradients[0], gradients[1]

        out: tuple[Tensor, Tensor] = self._captured("weighted", points.shape[0], f, (theta, points, weight))
        return out

    def rest_and_gradient(self, theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Terms outside the plate and their gradient in theta, shapes () and (P,)."""
        if not self.outside:
            return theta.new_zeros(()), torch.zeros_like(theta)

        def f(theta: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                free = theta.detach().requires_grad_()
                value = self.rest(free, u)
                (gradient,) = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)
            return value.detach(), gradient

        out: tuple[Tensor, Tensor] = self._captured("rest", 1, f, (theta, u))
        return out

    @property
    def _entries(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.density.layout.entries if e.name in self.names)

    def _free(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained effects by name, in the shapes of the program."""
        order = torch.argsort(self.index.reshape(-1))
        flat, out, used = u.reshape(-1)[order], {}, 0
        for e in self._entries:
            out[e.name] = flat[used : used + e.stop - e.start].reshape(e.free_shape)
            used += e.stop - e.start
        return out

    def _batched(self, theta: Tensor, points: Tensor) -> Tensor:
        if (
            self.density.compiled.mode == "eager"
        ):  # the program itself runs, which is not for every tensor to be batched
            return torch.stack([self.terms(theta, u) for u in points])
        out: Tensor = torch.func.vmap(self.terms, in_dims=(None, 0))(theta, points)
        return out

    def _captured(self, what: str, size: int, f: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Any:
        if self.density.compiled.mode == "eager":
            return f(*inputs)
        key = (what, size)
        if key not in self._steps:
            examples = tuple(x.detach().clone() for x in inputs)
            step = quick(trace(f, examples, (), gradients=what != "value"), len(examples))
            self._steps[key] = step, step.constants(())
        step, constants = self._steps[key]
        return step.numbers(inputs, constants)


def members(density: Density, over: str | Iterable[str] | None = None) -> Members:
    """The effects to integrate: those of a plate, some sites by name, or all random effects.

    Raises:
        FitError: there is nothing to integrate, a name is unknown, a plate is subsampled, or the numbers are float32.
    """
    names = _chosen(density, over)
    layout = density.layout
    if layout.dtype != torch.float64:
        raise FitError(
            "a Laplace approximation needs float64.",
            details=[f"the program's values are {layout.dtype}"],
            suggestion="torch.set_default_dtype(torch.float64) before the program and its data are made",
        )
    entries = [e for e in layout.entries if e.name in names]
    for p in sorted({p for e in entries for p in e.plates}):
        if density.graph.plates[p].scale != 1:
            raise FitError(
                f"the random effects of a subsampled plate {p!r} cannot be integrated.",
                details=["each evaluation needs every member's mode"],
                suggestion="the whole plate, or method='svi'",
            )
    kept, start = [], 0
    for e in layout.entries:
        if e.name not in names:
            kept.append(replace(e, start=start, stop=start + e.stop - e.start))
            start += e.stop - e.start
    rest = Layout(tuple(kept), start, layout.dtype)
    common = set.intersection(*(set(e.plates) for e in entries))
    # The plate with most members gives the smallest blocks.
    for p in sorted(common, key=lambda p: -density.graph.plates[p].size):
        index = torch.cat([_by_member(e, p, density.graph.latents[e.name].event_dim) for e in entries], dim=1)
        outside = any(p not in f.frames for f in density.graph.factors)
        made = Members(density, names, p, index, rest, outside)
        if _independent(made):
            return made
    index = torch.cat([torch.arange(e.start, e.stop) for e in entries])[None]
    return Members(density, names, None, index, rest, False)


def _chosen(density: Density, over: str | Iterable[str] | None) -> tuple[str, ...]:
    latents = [e for e in density.layout.entries if not e.is_param]
    wanted = {over} if isinstance(over, str) else None if over is None else set(over)
    known = {e.name for e in latents} | {p for e in latents for p in e.plates}
    if wanted is not None and (unknown := sorted(wanted - known)):
        raise FitError(
            f"there is nothing called {unknown[0]!r} to integrate.",
            details=[f"continuous latents and their plates: {', '.join(sorted(known)) or 'none'}"],
        )
    chosen = [e for e in latents if (bool(e.plates) if wanted is None else wanted & {e.name, *e.plates})]
    if not chosen:
        raise FitError(
            "there are no random effects to integrate.",
            details=["a continuous pyro.sample inside a pyro.plate is one"],
            suggestion="method='mle'" if not latents else "over= with the names of latents",
        )
    return tuple(e.name for e in chosen)


def _by_member(e: Entry, plate: str, event_dim: int) -> Tensor:
    """Positions of an entry's numbers, shape (members, numbers each)."""
    positions = torch.arange(e.start, e.stop).reshape(e.free_shape)
    front = len(e.shape) - event_dim + e.plates[plate]
    return positions.movedim(front, 0).reshape(e.shape[front], -1)


def _independent(made: Members) -> bool:
    """Whether each member's term depends on its own effects alone, and the terms outside on none.

    Weighting the members' terms must weight their gradients alike; a program that centres its effects, or that looks at
    its neighbours', does not pass.
    """
    theta = made.flat(made.density.initial()).detach()
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        u = (made.start + 0.1 * torch.randn(made.index.shape, generator=generator, dtype=theta.dtype)).requires_grad_()
        try:
            terms = made.terms(theta, u)
        except IntractableError:
            return False
        if terms.shape != (made.index.shape[0],):
            return False
        weight = torch.rand(terms.shape, generator=generator, dtype=theta.dtype)
        (plain,) = torch.autograd.grad(terms.sum(), u, retain_graph=True)
        (weighted,) = torch.autograd.grad((weight * terms).sum(), u)
        if not torch.allclose(weighted, weight[:, None] * plain, rtol=1e-8, atol=1e-10 * float(plain.abs().max())):
            return False
        if not made.outside:
            return True
        outer = made.rest(theta, u)
        if not outer.requires_grad:
            return True
        (leak,) = torch.autograd.grad(outer, u, allow_unused=True, materialize_grads=True)
    return bool(leak.abs().max() <= 1e-8 * plain.abs().max())
