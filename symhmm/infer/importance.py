"""Importance: what draws of a guide are worth as draws of the posterior, and how far that can be told."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from symhmm.infer.target import Array

RELIABLE = 0.7  # shape of the tail of the weights up to which weighted means can be relied on (Vehtari et al. 2024)
FEWEST = 5  # weights of a tail from which its shape can be told


@dataclass(frozen=True, eq=False)
class Importance:
    """Smoothed weights of draws.

    Args:
        weights: shape (S,), sum one.
        k: shape of the Pareto distribution of the largest weights: below 0.5 their variance is finite, above 0.7 they say
            little; NaN where the draws are too few.
    """

    weights: Tensor
    k: float

    @property
    def effective(self) -> float:
        """Number of equally weighted draws that are worth the same."""
        return float(1 / self.weights.square().sum())

    @property
    def reliable(self) -> bool:
        """Whether the weighted draws may stand for the posterior."""
        return self.k < RELIABLE


def importance(log_weights: Tensor) -> Importance:
    """Pareto-smoothed importance weights of Vehtari, Simpson, Gelman, Yao and Gabry (2024).

    The largest ``min(S / 5, 3 sqrt(S))`` weights are replaced by quantiles of a generalised Pareto distribution fitted to
    them, and cut at the largest of them.

    Args:
        log_weights: shape (S,), nats, up to a constant.

    >>> import torch
    >>> found = importance(torch.zeros(100))
    >>> round(found.effective)
    100
    """
    x = log_weights.detach().double().numpy()
    x = x - x.max()
    size, order = len(x), np.argsort(x, kind="stable")
    tail = order[size - int(np.ceil(min(0.2 * size, 3 * np.sqrt(size)))) :]
    out, k = x.copy(), np.nan
    if len(tail) >= FEWEST and size > len(tail):
        cut = np.exp(x[order[size - len(tail) - 1]])
        above = np.exp(x[tail]) - cut
        if above[0] > 0 and above[-1] > above[0] * (1 + 1e-12):
            k, scale = _pareto(above)
            p = (np.arange(len(tail)) + 0.5) / len(tail)
            quantiles = scale * np.expm1(-k * np.log1p(-p)) / k if k != 0 else -scale * np.log1p(-p)
            out[tail] = np.minimum(np.log(quantiles + cut), 0.0)
        else:
            k = -np.inf if above[-1] <= 0 else 0.0
    weights = np.exp(out - np.logaddexp.reduce(out))
    return Importance(torch.from_numpy(weights), float(k))


def _pareto(x: Array) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution of increasing ``x``: Zhang and Stephens (2009), with a weak prior."""
    n, many = len(x), 30 + int(np.sqrt(len(x)))
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - np.sqrt(many / (np.arange(1, many + 1) - 0.5))) / (3 * quartile)
    shape = np.log1p(-b[:, None] * x).mean(1)
    height = n * (np.log(-b / shape) - shape - 1)
    weights = np.exp(height - np.logaddexp.reduce(height))
    best = float((b * weights).sum())
    k = float(np.log1p(-best * x).mean())
    # The prior counts as ten observations of shape one half.
    return (n * k + 5) / (n + 10), -k / best
