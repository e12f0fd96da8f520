"""Mixtures: what a forecast of an observation is, one distribution for each state with the state's probability."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent

from symhmm.distributions import VonMises, WrappedCauchy

QUANTITY = "quantity"
DRAWS = 4000  # where a quantile has no formula
LARGEST = 20_000  # counts that are listed one by one
REST = 1e-10  # probability of the counts that are not
DOUBLINGS, HALVINGS = 60, 110


@dataclass(frozen=True)
class Mixture:
    """Distributions with weights, one mixture per member.

    Args:
        weights: shape (*members, S), probabilities of the components, which sum to one.
        components: distribution with batch shape (*members, S).
    """

    weights: Tensor
    components: Any

    def summary(self, probabilities: Sequence[float], seed: int = 0) -> tuple[Tensor, tuple[str, ...]]:
        """Mean, standard deviation and quantiles, shape (*members, *event, 2 + quantiles), and their names.

        Moments are exact. Quantiles are those of the mixture's distribution function, and those of draws where a family has
        none or is of several dimensions. Angles have their mean direction, circular standard deviation, and quantiles
        counted from the point opposite the mean direction.

        >>> two = Mixture(torch.tensor([0.5, 0.5]), torch.distributions.Normal(torch.tensor([0.0, 2.0]), 1.0))
        >>> two.summary([0.5])[0].round(decimals=4)
        tensor([1.0000, 1.4142, 1.0000])
        """
        names = ("mean", "sd", *(f"{100 * p:g}%" for p in probabilities))
        weights, fn = self.weights, self.components
        while isinstance(fn, Independent):
            for _ in range(fn.reinterpreted_batch_ndims):
                weights = weights.unsqueeze(-1)
            fn = fn.base_dist
        # Components last: elements of an event are members of their own.
        place = self.weights.dim() - 1
        if isinstance(fn, (VonMises, WrappedCauchy, torch.distributions.VonMises)):
            rows = _circular(weights, fn, place, probabilities, seed)
        elif fn.support.is_discrete and not fn.event_shape:
            rows = _counted(weights, fn, place, probabilities, seed)
        else:
            mean = (weights_like(weights, fn) * fn.mean).sum(place)
            spread = fn.variance + (fn.mean - mean.unsqueeze(place)).square()
            sd = (weights_like(weights, fn) * spread).sum(place).sqrt()
            rows = [mean, sd, *_quantiles(weights, fn, place, probabilities, seed)]
        return torch.stack(rows, -1), names

    def sample(self, draws: int, seed: int) -> Tensor:
        """Draws, shape (draws, *members, *event)."""
        fn, place = self.components, self.weights.dim() - 1
        return _draws(self.weights, fn, place, draws, seed)


def weights_like(weights: Tensor, fn: Distribution) -> Tensor:
    """Weights with dimensions for the event of a distribution."""
    return weights.reshape([*weights.shape, *(1 for _ in fn.event_shape)])


def _draws(weights: Tensor, fn: Any, place: int, draws: int, seed: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        full = weights.expand(fn.batch_shape).movedim(place, -1)
        chosen = torch.multinomial(full.reshape(-1, full.shape[-1]), draws, replacement=True)
        chosen = chosen.T.reshape([draws, *full.shape[:-1]]).unsqueeze(place + 1)
        x = fn.sample((draws,))
    index = chosen.reshape([*chosen.shape, *(1 for _ in fn.event_shape)])
    size = [*x.shape[: place + 1], 1, *x.shape[place + 2 :]]
    return x.gather(place + 1, index.expand(size)).squeeze(place + 1)


def _quantiles(weights: Tensor, fn: Any, place: int, probabilities: Sequence[float], seed: int) -> list[Tensor]:
    if not probabilities:
        return []
    lower, upper = (getattr(fn.support, f"{side}_bound", None) for side in ("lower", "upper"))
    known = not fn.event_shape and not any(isinstance(x, Tensor) and x.dim() for x in (lower, upper))
    if not known or not _has_cdf(fn):
        x = _draws(weights, fn, place, DRAWS, seed)
        return [x.quantile(p, 0) for p in probabilities]
    least = -math.inf if lower is None else float(lower)
    most = math.inf if upper is None else float(upper)

    def below(x: Tensor) -> Tensor:
        inside = x.clamp(least, most)
        return (weights * fn.cdf(inside.unsqueeze(place))).sum(place)

    shape = (weights * torch.ones(fn.batch_shape, dtype=weights.dtype)).sum(place)
    out = []
    for p in probabilities:
        low, high = (torch.full_like(shape, s) for s in (-1.0, 1.0))
        for _ in range(DOUBLINGS):
            low = torch.where(below(low) > p, 2 * low, low).clamp(min=least)
            high = torch.where(below(high) < p, 2 * high, high).clamp(max=most)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            right = below(middle) < p
            low, high = torch.where(right, middle, low), torch.where(right, high, middle)
        out.append(high)
    return out


def _has_cdf(fn: Any) -> bool:
    """Whether a distribution has a distribution function: wrappers have the method whatever is inside them."""
    x = fn.sample()
    try:
        fn.cdf(x)
    except NotImplementedError:  # how torch's distributions say that they have none
        return False
    return True


def _counted(weights: Tensor, fn: Any, place: int, probabilities: Sequence[float], seed: int) -> list[Tensor]:
    """Moments and quantiles of counts and categories from their probabilities, listed until hardly any is left."""
    upper = getattr(fn.support, "upper_bound", None)
    most = LARGEST if upper is None else int(torch.as_tensor(upper).max())
    size, masses = 16, torch.zeros(())
    while True:
        size = min(size, most + 1)
        y = torch.arange(size, dtype=weights.dtype).reshape([-1, *(1 for _ in fn.batch_shape)])
        inside = y <= (most if upper is None else upper)
        masses = torch.where(inside, fn.log_prob(torch.where(inside, y, 0.0)).exp(), 0.0)
        masses = (weights * masses).sum(place + 1)
        if size == most + 1 or bool((masses.sum(0) > 1 - REST).all()):
            break
        size *= 4
    counts = torch.arange(size, dtype=weights.dtype).reshape([-1, *(1 for _ in masses.shape[1:])])
    if bool((masses.sum(0) < 1 - 1e-6).any()):
        x = _draws(weights, fn, place, DRAWS, seed).to(weights.dtype)
        mean = (weights * fn.mean).sum(place)
        spread = fn.variance + (fn.mean - mean.unsqueeze(place)).square()
        return [mean, (weights * spread).sum(place).sqrt(), *(x.quantile(p, 0).round() for p in probabilities)]
    mean = (masses * counts).sum(0)
    sd = (masses * (counts - mean).square()).sum(0).sqrt()
    total = masses.cumsum(0)
    return [mean, sd, *((total < p - 1e-12).sum(0).to(weights.dtype) for p in probabilities)]


def _circular(weights: Tensor, fn: Any, place: int, probabilities: Sequence[float], seed: int) -> list[Tensor]:
    # Mardia and Jupp (2000), section 3.4: a mean resultant is a mean of complex numbers.
    length = 1 - fn.variance
    x, y = ((weights * length * f(fn.mean)).sum(place) for f in (torch.cos, torch.sin))
    mean, short = torch.atan2(y, x), torch.hypot(x, y).clamp(max=1.0)
    rows = [mean, (-2 * short.log()).sqrt()]
    if probabilities:
        turned = torch.remainder(_draws(weights, fn, place, DRAWS, seed) - mean + math.pi, 2 * math.pi) - math.pi
        rows += [mean + turned.quantile(p, 0) for p in probabilities]
    return rows
