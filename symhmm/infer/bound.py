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
    # One row per draw; one column per member of the plate, or a single one for everything.
    rows, outside = [], None
    with torch.no_grad():
        for _ in range(draws):
            noise = torch.randn(made.noise_size, generator=generator, dtype=phi.dtype)
            vector, log_q = made.draw(phi, noise)
            values = goal.values(vector)
            if plate is None:
                rows.append((goal.density.log_prob(values) + goal.log_abs_det_jacobian(vector) - log_q).double()[None])
                continue
            terms = goal.density.per(plate, values)
            if outside is None:
                # What stands outside the plate reads no latent, and is therefore the same for every draw.
                outside = float(goal.density.log_prob(values) - terms.sum())
            own = terms + goal.member_jacobian(vector, made.blocks[0].index)
            rows.append((own - made.member_log_density(phi, noise)[0]).double())
    weights = torch.stack(rows)
    total = weights.sum(1) + (outside or 0.0)
    if not bool(total.isfinite().all()):
        return Bound(float(total.mean()), float("nan"), None)
    error = float(total.std() / sqrt(draws)) if draws > 1 else float("nan")
    value, spread = _log_mean(weights)
    return Bound(float(total.mean()), error, (value + (outside or 0.0), spread))


def _log_mean(weights: Tensor) -> tuple[float, float]:
    """Sum over columns of the log of the mean weight, and its standard error by the delta method."""
    draws = weights.shape[0]
    top = weights.amax(0)
    scaled = (weights - top).exp()
    mean = scaled.mean(0)
    variance = scaled.var(0) / mean.square() / draws if draws > 1 else torch.full_like(mean, torch.nan)
    return float((top + mean.log()).sum()), float(variance.sum().sqrt())
