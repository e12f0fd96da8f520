"""Values that occur exactly: extra zeros, and proportions of exactly 0 or 1, around any family of numbers."""

from typing import Any, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from symhmm.errors import ShapeError

Self = TypeVar("Self", bound="_Atoms")


class _Atoms(TorchDistribution):
    """A base family with probabilities of single values beside it; what the three wrappers share."""

    _probabilities: tuple[str, ...] = ()

    def __init__(self, base: Any, probabilities: tuple[Tensor | float, ...], validate_args: bool | None) -> None:
        if base.event_dim:
            raise ShapeError(
                f"{type(self).__name__} is for single numbers, and its base {type(base).__name__} is of vectors.",
                details=[f"event shape {tuple(base.event_shape)}"],
                suggestion="the wrapper first, and .to_event() around it",
            )
        dtype = base.mean.dtype
        given = [p if isinstance(p, Tensor) else torch.as_tensor(p, dtype=dtype) for p in probabilities]
        shape = torch.broadcast_shapes(base.batch_shape, *(p.shape for p in given))
        self.base_dist = base if base.batch_shape == shape else base.expand(shape)
        for name, p in zip(self._probabilities, given, strict=True):
            setattr(self, name, p.expand(shape))
        super().__init__(shape, validate_args=validate_args)

    def expand(self: Self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution with a larger batch shape, without copying."""
        new = self._get_checked_instance(type(self), _instance)
        batch_shape = torch.Size(batch_shape)
        new.base_dist = self.base_dist.expand(batch_shape)
        for name in self._probabilities:
            setattr(new, name, getattr(self, name).expand(batch_shape))
        TorchDistribution.__init__(new, batch_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def discrete(self) -> bool:
        """Whether the base counts."""
        return bool(self.base_dist.support.is_discrete)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """That of the base, with the single values."""
        if self.discrete:
            return self.base_dist.support
        return constraints.half_open_interval(0.0, 1.0) if self._proportion else constraints.nonnegative

    @property
    def _proportion(self) -> bool:
        """Whether the base lives between 0 and 1."""
        return getattr(self.base_dist.support, "upper_bound", None) == 1.0 and not self.discrete

    @property
    def _inner(self) -> float:
        """A value that is none of the single ones, where the base has a finite density."""
        return 0.5 if self._proportion else 1.0


class _Zeros(_Atoms):
    """A base family with zeros of probability ``zero`` beside it."""

    arg_constraints = {"zero": constraints.unit_interval}
    _probabilities = ("zero",)
    zero: Tensor

    def __init__(self, base: Any, zero: Tensor | float, validate_args: bool | None = None) -> None:
        super().__init__(base, (zero,), validate_args)

    def cdf_below(self, value: Tensor) -> Tensor:
        """Probability of less than ``value``: smaller than `cdf` where a single value has a probability of its own."""
        if self.discrete:
            return self.cdf(value - 1)
        return torch.where(value <= 0, 0.0, self.cdf(value))


class ZeroInflated(_Zeros):
    """Zeros beside a family: a value is 0 with probability ``zero``, and else drawn from the base.

    A base of counts has zeros of its own, which are added (Lambert 1992); a continuous base has none, so that `Hurdle` is
    the same there.

    Args:
        base: distribution of positive numbers, proportions or counts, with an empty event shape.
        zero: probability of an extra zero, in [0, 1]; broadcasts with the base.

    Raises:
        ShapeError: the base is of vectors.

    >>> import pyro.distributions as dist
    >>> d = ZeroInflated(dist.Exponential(torch.tensor(1.0)), 0.25)
    >>> d.log_prob(torch.tensor([0.0, 1.0])).exp()          # 1/4, and 3/4 exp(-1)
    tensor([0.2500, 0.2759])
    >>> ZeroInflated(dist.Poisson(torch.tensor(1.0)), 0.25).log_prob(torch.tensor(0.0)).exp()    # 1/4 + 3/4 exp(-1)
    tensor(0.5259)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the probability of 0, and elsewhere of the density (probability, for counts), nats."""
        if self._validate_args:
            self._validate_sample(value)
        here = value == 0
        # Each branch sees only values that are its own: where() would turn an infinite gradient of the other into NaN.
        away = torch.where(here, torch.full_like(value, self._inner), value)
        elsewhere = _log_rest(self.zero, here) + self.base_dist.log_prob(away)
        zero = torch.where(here, self.zero, 1.0)
        if self.discrete:
            zero = zero + (1 - zero) * self.base_dist.log_prob(torch.zeros_like(value)).exp()
        return torch.where(here, zero.log(), elsewhere)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, where the base has a distribution function."""
        below = (1 - self.zero) * _base_cdf(self.base_dist, value)
        return torch.where(value < 0, 0.0, self.zero + below)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, without gradient."""
        with torch.no_grad():
            drawn = self.base_dist.sample(torch.Size(sample_shape))
            return torch.where(torch.bernoulli(self.zero.expand(drawn.shape)) > 0, torch.zeros_like(drawn), drawn)

    @property
    def mean(self) -> Tensor:
        """Expected value, zeros included."""
        return (1 - self.zero) * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance, zeros included."""
        m = self.base_dist.mean
        return (1 - self.zero) * (self.base_dist.variance + self.zero * m * m)


class Hurdle(_Zeros):
    """All zeros by themselves: a value is 0 with probability ``zero``, and else drawn from the base given that it is not 0.

    For counts the base is cut at zero (Mullahy 1986); for a continuous base there is nothing to cut.

    Args:
        base: distribution of positive numbers, proportions or counts, with an empty event shape.
        zero: probability of a zero, in [0, 1]; broadcasts with the base.

    Raises:
        ShapeError: the base is of vectors.

    >>> import pyro.distributions as dist
    >>> Hurdle(dist.Poisson(torch.tensor(1.0)), 0.25).log_prob(torch.tensor([0.0, 1.0])).exp()    # 1/4, 3/4 / (e - 1)
    tensor([0.2500, 0.4365])
    """

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the probability of 0, and elsewhere of the density (probability, for counts), nats."""
        if self._validate_args:
            self._validate_sample(value)
        here = value == 0
        away = torch.where(here, torch.full_like(value, self._inner), value)
        elsewhere = _log_rest(self.zero, here) + self.base_dist.log_prob(away) - self._log_positive(value)
        return torch.where(here, torch.where(here, self.zero, 1.0).log(), elsewhere)

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, where the base has a distribution function."""
        p, positive = _base_cdf(self.base_dist, value), self._log_positive(value).exp()
        return torch.where(value < 0, 0.0, self.zero + (1 - self.zero) * (p - (1 - positive)) / positive)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, without gradient."""
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            drawn = (
                _positive_counts(self.base_dist, shape)
                if self.discrete
                else self.base_dist.sample(torch.Size(sample_shape))
            )
            return torch.where(torch.bernoulli(self.zero.expand(shape)) > 0, torch.zeros_like(drawn), drawn)

    @property
    def mean(self) -> Tensor:
        """Expected value, zeros included."""
        return (1 - self.zero) * self.base_dist.mean / self._positive

    @property
    def variance(self) -> Tensor:
        """Variance, zeros included."""
        m = self.base_dist.mean
        square = (1 - self.zero) * (self.base_dist.variance + m * m) / self._positive
        return square - self.mean * self.mean

    @property
    def _positive(self) -> Tensor:
        return self._log_positive(torch.zeros_like(self.zero)).exp()

    def _log_positive(self, value: Tensor) -> Tensor:
        """Logarithm of the base's probability of anything but 0, nats."""
        if not self.discrete:
            return torch.zeros_like(value)
        return torch.log(-torch.expm1(self.base_dist.log_prob(torch.zeros_like(value))))


class ZeroOneInflated(_Atoms):
    """Proportions with exact zeros and ones: one of them with probability ``edge``, and else drawn from the base.

    The parameters are the ``zoi`` and ``coi`` of Ospina and Ferrari (2010): both range freely over the unit interval.

    Args:
        base: distribution between 0 and 1, such as a beta, with an empty event shape.
        edge: probability of 0 or 1, in [0, 1]; broadcasts with the base.
        one: probability of 1, given that the value is 0 or 1.

    Raises:
        ShapeError: the base is of vectors.

    >>> import pyro.distributions as dist
    >>> d = ZeroOneInflated(dist.Beta(torch.tensor(2.0), torch.tensor(2.0)), 0.5, 0.2)
    >>> d.log_prob(torch.tensor([0.0, 0.5, 1.0])).exp()
    tensor([0.4000, 0.7500, 0.1000])
    """

    arg_constraints = {"edge": constraints.unit_interval, "one": constraints.unit_interval}
    _probabilities = ("edge", "one")
    edge: Tensor
    one: Tensor

    def __init__(self, base: Any, edge: Tensor | float, one: Tensor | float, validate_args: bool | None = None) -> None:
        super().__init__(base, (edge, one), validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        """From 0 to 1, both included."""
        return constraints.unit_interval

    def log_prob(self, value: Tensor) -> Tensor:
        """Logarithm of the probability of 0 and of 1, and between them of the density, nats."""
        if self._validate_args:
            self._validate_sample(value)
        low, high = value == 0, value == 1
        away = torch.where(low | high, torch.full_like(value, 0.5), value)
        inside = _log_rest(self.edge, low | high) + self.base_dist.log_prob(away)
        edge = torch.where(low | high, self.edge, 1.0).log()
        at_one = torch.where(high, self.one, 1.0).log()
        return torch.where(low, edge + _log_rest(self.one, ~low), torch.where(high, edge + at_one, inside))

    def cdf(self, value: Tensor) -> Tensor:
        """Probability of at most ``value``, where the base has a distribution function."""
        below = self.edge * (1 - self.one) + (1 - self.edge) * _base_cdf(self.base_dist, value)
        return torch.where(value < 0, 0.0, torch.where(value < 1, below, 1.0))

    def cdf_below(self, value: Tensor) -> Tensor:
        """Probability of less than ``value``: smaller than `cdf` at 0 and at 1."""
        return torch.where(value <= 0, 0.0, self.cdf(value) - torch.where(value == 1, self.edge * self.one, 0.0))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draws, without gradient."""
        with torch.no_grad():
            drawn = self.base_dist.sample(torch.Size(sample_shape))
            edge, one = (torch.bernoulli(p.expand(drawn.shape)) for p in (self.edge, self.one))
            return torch.where(edge > 0, one, drawn)

    @property
    def mean(self) -> Tensor:
        """Expected value, zeros and ones included."""
        return self.edge * self.one + (1 - self.edge) * self.base_dist.mean

    @property
    def variance(self) -> Tensor:
        """Variance, zeros and ones included."""
        m = self.base_dist.mean
        square = self.edge * self.one + (1 - self.edge) * (self.base_dist.variance + m * m)
        return square - self.mean * self.mean


def _log_rest(p: Tensor, elsewhere: Tensor) -> Tensor:
    """log(1 - p), with a harmless value where it is not used."""
    return torch.log1p(-torch.where(elsewhere, 0.0, p))


def _base_cdf(base: Any, value: Tensor) -> Tensor:
    if type(base).__name__ == "Poisson":
        p = torch.special.gammaincc(torch.clamp(value, min=0.0).floor() + 1, base.rate)
        return torch.where(value < 0, 0.0, p)
    return base.cdf(value)


def _positive_counts(base: Any, shape: torch.Size) -> Tensor:
    """Counts of at least one from ``base``, by the inverse distribution function, 64 counts at a time."""
    p0 = base.log_prob(torch.zeros_like(base.mean)).exp().double()
    u = torch.rand(shape, dtype=torch.double) * (1 - p0)
    mass, out, first = torch.zeros_like(u), torch.zeros_like(u), 1
    while True:
        counts = torch.arange(first, first + 64, dtype=base.mean.dtype).reshape(-1, *(1,) * len(shape))
        block = base.log_prob(counts).exp().double().expand(-1, *shape)
        reached = mass + block.cumsum(0)
        out = torch.where(u >= mass, first + (reached <= u).sum(0), out)
        mass = reached[-1]
        first += 64
        # The last digits of a sum may stay below u for ever: past the mode nothing more is to come.
        if bool(((u < mass) | ((block[-1] < 1e-12) & (base.mean < first))).all()):
            return out.to(base.mean.dtype)
