"""The bound of a finished guide by many fixed draws, and what importance weighting makes of the same draws."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import sqrt

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.infer.guide import Guide
from symhmm.infer.importance import Importance, importance
from symhmm.infer.information import count_observations
from symhmm.infer.minibatch import Minibatches, with_members
from symhmm.infer.objective import AnyGuide, log_weights
from symhmm.infer.pyro_guide import PyroGuide
from symhmm.infer.target import Target
from symhmm.tables.results import Drawable, Posterior
from symhmm.tables.reweighted import Reweighted

AT_ONCE = 50  # draws in one batch, if the data are not large
ELEMENTS = 2e6  # observed values times draws in one batch
ENOUGH = 1000  # draws of the posterior that weighted ones are to be worth
MORE = 8  # times as many draws as were asked for, at most
WIDER = 2.5  # times as far out
WIDE = 5  # one of so many draws has a number from there
EXACT = 0.01  # variance of log-weights, nats squared, below which the guide is as good as the posterior
FEWEST = 100  # draws that weighted ones must be worth
KEPT = 1e7  # numbers in the draws that are kept


@dataclass(frozen=True)
class Bound:
    """Monte Carlo evaluation of a guide.

    Args:
        bound: mean of ``log p - log q``, nats; ``error`` is its standard error.
        marginal: importance-weighted estimate of the log-likelihood and its standard error, nats (Burda, Grosse and
            Salakhutdinov 2016). Its expectation is below the truth and approaches it with the number of draws.
        importance: weights of the draws as draws of the posterior; of the worst member where they are averaged member by member.
        member: which that is.
        vectors: the draws, shape (draws, size), where they are few enough to be kept.
    """

    bound: float
    error: float
    marginal: tuple[float, float] | None
    importance: Importance | None = None
    vectors: Tensor | None = None
    member: int | None = None


def evaluate_bound(
    goal: Target, made: AnyGuide, phi: Tensor, draws: int, seed: int, batches: Minibatches | None = None
) -> Bound:
    """Evaluate the guide at ``phi`` with ``draws`` draws from ``seed``, over all members of subsampled plates.

    Where all latents are random effects of one plate, its members are independent given the parameters, and the weights
    are averaged member by member: their error then does not grow with the number of members' dimensions together.
    Elsewhere the draws have one weight each. A fifth of them have one value of the population drawn from wider tails, so that
    a tail that the guide lacks does not decide about all weights (Owen and Zhou 2000). Until they are worth `ENOUGH` draws
    of the posterior, there are up to eight times as many, unless weights say little however many there are.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(1, min(AT_ONCE, draws, int(ELEMENTS // max(count_observations(goal.density), 1))))

    def more() -> list[Tensor]:
        return [
            torch.randn(size, made.noise_size, generator=generator, dtype=phi.dtype) for _ in range(-(-draws // size))
        ]

    noise = more()
    if isinstance(made, PyroGuide):
        weights = _by_pyro(goal, made, phi, noise)[:draws]
        return replace(_summarised(weights, 0.0), importance=_finite(weights[:, 0]))
    plates = made.blocks[0].plates
    if len(made.blocks) == 1 and len(plates) == 1 and (batches is None or plates == (batches.plate,)):
        weights, outside = _rows(goal, made, phi, noise, batches)
        weights = weights[:draws]
        worst = int(weights.var(0).argmax())
        return replace(_summarised(weights, outside), importance=_finite(weights[:, worst]), member=worst)
    evaluate = _totals(goal, made, phi, noise[0], batches)
    with torch.no_grad():
        own, wide, used = torch.zeros(0).to(phi), torch.zeros(0).to(phi), list[Tensor]()
        while True:
            wider = [_widened(made, e, generator) for e in noise[:: WIDE - 1]]
            own, wide = torch.cat([own, *map(evaluate, noise)]), torch.cat([wide, *map(evaluate, wider)])
            used = [torch.cat([*used[:1], *noise]), torch.cat([*used[1:], *wider])]
            if not bool(own.isfinite().all() and wide.isfinite().all()) or float(own.var()) < EXACT:
                return _summarised(own[:, None], 0.0)
            drawn = torch.cat(used)
            weights = torch.cat([own, wide]) - _widening(made, drawn, wide.numel() / drawn.shape[0])
            found = importance(weights)
            if own.numel() >= MORE * draws or found.effective >= ENOUGH or found.k >= 1:
                break
            noise = more()
        vectors = None
        if weights.numel() * made.origin.numel() <= KEPT:
            vectors = torch.cat([torch.func.vmap(made.draw, in_dims=(None, 0))(phi, e) for e in drawn.split(size)])
    value, spread = _log_mean(weights[:, None].double())
    return replace(_summarised(own[:, None], 0.0), marginal=(value, spread), importance=found, vectors=vectors)


def _widened(made: Guide, noise: Tensor, generator: torch.Generator) -> Tensor:
    """The same noise with one number in each row, of those that the first block is drawn from, `WIDER` times as large."""
    rows = torch.arange(len(noise))
    columns = torch.randint(made.blocks[0].noise_size, (len(noise),), generator=generator)
    return noise.index_put((rows, columns), WIDER * noise[rows, columns])


def _widening(made: Guide, noise: Tensor, share: float) -> Tensor:
    """Log-density of noise of which a ``share`` is widened, relative to a standard normal one, shape (draws,)."""
    first = noise[:, : made.blocks[0].noise_size]
    ratio = (0.5 * first.square() * (1 - WIDER**-2)).exp() / WIDER
    return (1 - share + share * ratio.mean(1)).log()


def corrected(posterior: Drawable, found: Bound) -> Drawable:
    """The guide's draws with their weights where these can be relied on, else the guide as it is."""
    weights = found.importance
    if not isinstance(posterior, Posterior) or weights is None or found.vectors is None or not weights.reliable:
        return posterior
    if weights.effective < FEWEST:
        return posterior
    return Reweighted(posterior, found.vectors, weights.weights.to(found.vectors))


def _finite(weights: Tensor) -> Importance | None:
    return importance(weights) if bool(weights.isfinite().all()) else None


def _summarised(weights: Tensor, outside: float) -> Bound:
    draws, weights = weights.shape[0], weights.double()
    total = weights.sum(1) + outside
    if not bool(total.isfinite().all()):
        return Bound(float(total.mean()), float("nan"), None)
    error = float(total.std() / sqrt(draws)) if draws > 1 else float("nan")
    value, spread = _log_mean(weights)
    return Bound(float(total.mean()), error, (value + outside, spread))


def _by_pyro(goal: Target, made: PyroGuide, phi: Tensor, noise: list[Tensor]) -> Tensor:
    """One weight for everything from a guide that Pyro runs, shape (draws, 1)."""

    def f(phi: Tensor, e: Tensor) -> Tensor:
        vector, log_q = made.draw_with_density(phi, e)
        return goal.density.log_prob(goal.values(vector)) - log_q

    with torch.no_grad():
        replay = goal.captured(f"bound {len(goal._steps)}", f, (phi, noise[0][0]))
        return torch.stack([replay(phi, e) for e in torch.cat(noise)])[:, None]


def _totals(
    goal: Target, made: Guide, phi: Tensor, noise: Tensor, batches: Minibatches | None
) -> Callable[[Tensor], Tensor]:
    """One weight for everything from noise like ``noise``, of shape (draws, noise size): a function to shape (draws,)."""

    def f(phi: Tensor, noise: Tensor, *chosen: Tensor) -> Tensor:
        drawn = torch.func.vmap(made.draw, in_dims=(None, 0))(phi, noise)
        return log_weights(goal, made, batches, phi, drawn, chosen)

    key = f"bound {len(goal._steps)}"
    if batches is None:
        whole = goal.captured(key, f, (phi, noise))
        return lambda e: whole(phi, e)
    every = batches.partition()
    part = goal.captured(key, f, (phi, noise, every[0]))
    # The mean over a partition stands for everybody; a member that is in two batches counts a little more.
    return lambda e: torch.stack([part(phi, e, chosen) for chosen in every]).mean(0)


def _rows(
    goal: Target, made: Guide, phi: Tensor, noise: list[Tensor], batches: Minibatches | None
) -> tuple[Tensor, float]:
    """Weights of each member of the only block's plate, shape (draws, M), and what stands outside the plate, nats."""
    block = made.blocks[0]

    def bound_to(chosen: Tensor) -> Density:
        return goal.density if batches is None else with_members(goal.density, batches.plate, chosen)

    def f(phi: Tensor, noise: Tensor, chosen: Tensor) -> Tensor:
        density = bound_to(chosen)

        def one(e: Tensor) -> Tensor:
            vector = made.draw(phi, e)
            own = goal.member_jacobian(vector, block.index) - made.log_densities(phi, vector)[0]
            return density.per(block.plates[0], goal.values(vector)) + own[chosen]

        out: Tensor = torch.func.vmap(one)(noise)
        return out

    every = [torch.arange(block.index.shape[0])] if batches is None else batches.partition()
    with torch.no_grad():
        # What stands outside the plate reads no latent, and is therefore the same for every draw.
        values, first = goal.values(made.draw(phi, noise[0][0])), bound_to(every[0])
        scale = 1.0 if batches is None else batches.full / batches.size
        outside = float(first.log_prob(values) - scale * first.per(block.plates[0], values).sum())
        replay = goal.captured(f"bound {len(goal._steps)}", f, (phi, noise[0], every[0]))
        columns = [torch.cat([replay(phi, e, chosen) for e in noise]) for chosen in every]
    return torch.cat(columns, 1)[:, : block.index.shape[0]], outside


def _log_mean(weights: Tensor) -> tuple[float, float]:
    """Sum over columns of the log of the mean weight, and its standard error by the delta method."""
    draws = weights.shape[0]
    top = weights.amax(0)
    scaled = (weights - top).exp()
    mean = scaled.mean(0)
    variance = scaled.var(0) / mean.square() / draws if draws > 1 else torch.full_like(mean, torch.nan)
    return float((top + mean.log()).sum()), float(variance.sum().sqrt())
