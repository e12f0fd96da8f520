"""Objective: a bound of the log-likelihood from a few draws, with its gradient, captured as one step."""

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

from symhmm.infer.guide import Guide
from symhmm.infer.minibatch import Minibatches, with_members
from symhmm.infer.pyro_guide import PyroGuide
from symhmm.infer.target import Target

Gradient = Callable[..., tuple[Tensor, Tensor]]
AnyGuide = Guide | PyroGuide


def log_weights(
    goal: Target, made: Guide, batches: Minibatches | None, phi: Tensor, vectors: Tensor, chosen: tuple[Tensor, ...]
) -> Tensor:
    """``log p - log q`` of each draw, nats, shape (S,), for the members of a batch and scaled to all."""
    if batches is None:

        def one(v: Tensor) -> Tensor:
            log_q = torch.stack([x.sum() for x in made.log_densities(phi, v)]).sum()
            return goal.density.log_prob(goal.values(v)) + goal.log_abs_det_jacobian(v) - log_q

    else:
        density = with_members(goal.density, batches.plate, chosen[0])
        weights = [batches.weights(b, chosen[0]) for b in made.blocks]

        def one(v: Tensor) -> Tensor:
            total = density.log_prob(goal.values(v))
            for b, w, log_q in zip(made.blocks, weights, made.log_densities(phi, v), strict=True):
                total = total + (w * (goal.member_jacobian(v, b.index) - log_q)).sum()
            return total

    if vectors.shape[0] == 1:
        return one(vectors[0])[None]
    out: Tensor = torch.func.vmap(one)(vectors)
    return out


def objective(goal: Target, made: AnyGuide, draws: int, *, weighted: bool, batches: Minibatches | None) -> Gradient:
    """The captured function ``(phi, noise[, members]) -> (value, gradient in phi)``; noise has shape (draws, noise size).

    The value is the evidence lower bound, or with ``weighted`` the importance-weighted bound
    ``log mean exp(log p - log q)`` (Burda, Grosse and Salakhutdinov 2016). Gradients reach the guide through its draws alone:
    then they have no noise where the guide is the posterior (Roeder, Wu and Duvenaud 2017). For the weighted bound, the
    share of each draw enters squared there, which makes this exact (Tucker et al. 2019); parameters, which are the same
    in all draws, have it once.
    """
    gradient = (
        _whole(goal, made, draws, weighted)
        if isinstance(made, PyroGuide)
        else _held(goal, made, draws, weighted, batches)
    )
    example = torch.zeros(draws, made.noise_size, dtype=made.origin.dtype)
    first = (batches.partition()[0],) if batches is not None else ()
    # A key of its own: the guide's start is a constant of the captured step.
    replay = goal.captured(f"objective {len(goal._steps)}", gradient, (made.initial(), example, *first))

    def evaluate(phi: Tensor, noise: Tensor, *chosen: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            value, out = replay(phi, noise, *chosen)
        return value, out

    return evaluate


def _held(goal: Target, made: Guide, draws: int, weighted: bool, batches: Minibatches | None) -> Gradient:
    """Gradients through the draws alone."""
    latent = torch.zeros(made.origin.numel(), dtype=torch.bool)
    for b in made.blocks:
        latent[b.index.reshape(-1)] = True

    def gradient(phi: Tensor, noise: Tensor, *chosen: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            free = phi.detach().requires_grad_()
            if draws == 1:
                vectors = made.draw(free, noise[0])[None]
            else:
                vectors = torch.func.vmap(made.draw, in_dims=(None, 0))(free, noise)
            leaf = vectors.detach().requires_grad_()
            weights = log_weights(goal, made, batches, phi.detach(), leaf, chosen)
            held = weights.detach()
            share = held.softmax(0) if weighted else torch.full_like(held, 1 / draws)
            (slope,) = torch.autograd.grad((share * weights).sum(), leaf)
            if weighted:
                slope = torch.where(latent, slope * share[:, None], slope)
            (out,) = torch.autograd.grad((vectors * slope.detach()).sum(), free)
        value = held.logsumexp(0) - log(draws) if weighted else held.mean()
        return value, out

    return gradient


def _whole(goal: Target, made: PyroGuide, draws: int, weighted: bool) -> Gradient:
    """Gradients through the draws and through the guide's log-density, which Pyro gives together."""

    def gradient(phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            free = phi.detach().requires_grad_()
            pairs = [made.draw_with_density(free, e) for e in noise]
            log_p = torch.stack([goal.density.log_prob(goal.values(v)) for v, _ in pairs])
            weights = log_p - torch.stack([log_q for _, log_q in pairs])
            value = weights.logsumexp(0) - log(draws) if weighted else weights.mean()
            (out,) = torch.autograd.grad(value, free)
        return value.detach(), out

    return gradient
