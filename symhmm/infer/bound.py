"""The bound of a finished guide by many fixed draws, and what importance weighting makes of the same draws."""

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from symhmm.infer.guide import Guide
from symhmm.infer.target import Target


@dataclass(frozen=True)
class Bound:
    """Monte Carlo evaluation of a guide.

    Args:
        bound: mean of ``log p - log q``, nats; ``error`` is its standard error.
        marginal: importance-weighted estimate of the log-likelihood and its standard error, nats (Burda, Grosse and
            Salakhutdinov 2016). Its expectation is below the truth and approaches it with the number of draws.
    """

    bound: float
    error: float
    marginal: tuple[float, float] | None


def evaluate_bound(goal: Target, made: Guide, phi: Tensor, draws: int, seed: int) -> Bound:
    """Evaluate the guide at ``phi`` with ``draws`` draws from ``seed``.

    Where all latents are random effects of one plate, its members are independent given the parameters, and the weights
    are averaged member by member: their error then does not grow with the number of members' dimensions together.
    """
    generator = torch.Generator().manual_seed(seed)
    plate = made.blocks[0].plates[0] if len(made.blocks) == 1 and len(made.blocks[0].plates) == 1 else None
    if plate is not None and goal.density.graph.plates[plate].scale != 1:
        plate = None
    totals, members = [], []
    with torch.no_grad():
        for _ in range(draws):
            noise = torch.randn(made.noise_size, generator=generator, dtype=phi.dtype)
            vector, log_q = made.draw(phi, noise)
            values = goal.values(vector)
            jacobian = goal.log_abs_det_jacobian(vector)
            totals.append((goal.density.log_prob(values) + jacobian - log_q).double())
            if plate is not None:
                own = goal.density.per(plate, values) + goal.member_jacobian(vector, made.blocks[0].index)
                members.append((own - made.member_log_density(phi, noise)[0]).double())
    total = torch.stack(totals)
    good = total[total.isfinite()]
    if good.numel() < draws:
        return Bound(float(total.mean()), float("nan"), None)
    error = float(total.std() / sqrt(draws)) if draws > 1 else float("nan")
    if plate is None:
        marginal = _log_mean(total[:, None])
    else:
        weights = torch.stack(members)
        # What stands outside the plate does not depend on the draw: it is added as it is.
        outside = (total - weights.sum(1)).mean()
        value, spread = _log_mean(weights)
        marginal = (value + float(outside), spread)
    return Bound(float(total.mean()), error, marginal)


def _log_mean(weights: Tensor) -> tuple[float, float]:
    """Sum over columns of the log of the mean weight, and its standard error by the delta method."""
    draws = weights.shape[0]
    top = weights.amax(0)
    scaled = (weights - top).exp()
    mean = scaled.mean(0)
    variance = scaled.var(0) / mean.square() / draws if draws > 1 else torch.full_like(mean, torch.nan)
    return float((top + mean.log()).sum()), float(variance.sum().sqrt())
