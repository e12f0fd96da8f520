"""Emission families: the distribution of a stream given its state, with parameters, links, and starting values."""

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from symhmm.errors import SpecError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Parameter:
    """A parameter of a family.

    Args:
        name: as users write it, ``mean`` in ``step.mean``.
        link: scale on which formulas are linear: ``identity``, ``log``, ``logit``; ``softmax`` for a vector of
            probabilities, whose logits are relative to the first level.
        fixed: value where neither a formula nor a number is given; None for a parameter that is fitted.
    """

    name: str
    link: str
    fixed: float | None = None


@dataclass(frozen=True)
class Family:
    """A distribution with what a model needs to know of it.

    Args:
        name: as users write it.
        text: the distribution in a program; each parameter's name in braces stands for its value in a state.
        parameters: in the order of ``text``.
        start: values of all parameters from a sample of one state, in order.
        linked: ``text`` for a parameter on the scale of its link, where the distribution takes that better.
    """

    name: str
    text: str
    parameters: tuple[Parameter, ...]
    start: Callable[[Array], tuple[float, ...]]
    linked: str = ""

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(p.name for p in self.parameters)})"

    def parameter(self, name: str, stream: str) -> Parameter:
        """The parameter of that name. Raises `SpecError`, with the nearest name."""
        for p in self.parameters:
            if p.name == name:
                return p
        known = [f"{stream}.{p.name}" for p in self.parameters]
        raise SpecError(
            f"family {self.name!r} of stream {stream!r} has no parameter {name!r}.",
            details=[f"parameters: {', '.join(known)}"],
            suggestion=repr(_nearest(f"{stream}.{name}", known)),
        )


def family(name: str, stream: str) -> Family:
    """The family of that name.

    Raises:
        SpecError: there is none; the text has the nearest names.

    >>> family("gamma", "step")
    gamma(mean, sd)
    """
    found = FAMILIES.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if found is None:
        near = difflib.get_close_matches(str(name), FAMILIES, 3, 0.4)
        raise SpecError(
            f"there is no emission family {name!r} [stream {stream!r}].",
            details=[f"families: {', '.join(FAMILIES)}"],
            suggestion=" or ".join(map(repr, near)) or "one of these names",
        )
    return found


def _nearest(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, 1, 0.1)
    return found[0] if found else known[0]


def _moments(y: Array) -> tuple[float, float]:
    mean = float(y.mean()) if y.size else 1.0
    sd = float(y.std()) if y.size > 2 else 0.0
    return mean, sd if sd > 0 else max(abs(mean), 1.0) * 0.1


def _gamma(y: Array) -> tuple[float, ...]:
    mean, sd = _moments(y[y > 0])
    return max(mean, 1e-6), sd


def _weibull(y: Array) -> tuple[float, ...]:
    mean, sd = _gamma(y)
    shape = (mean / sd) ** 1.086  # Justus et al. 1978
    return shape, mean / math.gamma(1 + 1 / shape)


def _beta(y: Array) -> tuple[float, ...]:
    mean, sd = _moments(y[(y > 0) & (y < 1)])
    mean = min(max(mean, 0.02), 0.98)
    total = max(mean * (1 - mean) / sd**2 - 1, 0.5)
    return mean * total, (1 - mean) * total


def _angle(y: Array) -> tuple[float, float]:
    """Mean direction and mean resultant length."""
    c, s = (float(np.cos(y).mean()), float(np.sin(y).mean())) if y.size else (0.5, 0.0)
    return math.atan2(s, c), min(max(math.hypot(c, s), 0.05), 0.95)


def _von_mises(y: Array) -> tuple[float, ...]:
    mean, r = _angle(y)
    return mean, r * (2 - r * r) / (1 - r * r)  # Banerjee et al. 2005


def _count(y: Array) -> float:
    return max(float(y.mean()) if y.size else 1.0, 0.05)


def _negative_binomial(y: Array) -> tuple[float, ...]:
    mean = _count(y)
    variance = float(y.var()) if y.size > 2 else 2 * mean
    return mean, min(max((variance - mean) / mean**2, 0.05), 10.0)


def _inside(p: float) -> float:
    return min(max(float(p), 0.02), 0.98)


def _share(y: Array) -> tuple[float, ...]:
    return (_inside(y.mean() if y.size else 0.5),)


def _log_moments(y: Array) -> tuple[float, ...]:
    return _moments(np.log(y[y > 0]))


def _with_zeros(base: Family) -> Family:
    """The family with a probability of exact zeros beside it."""
    counts = base.name in ("poisson", "negative_binomial")
    text = f"{'ZeroInflated' if counts else 'Hurdle'}({base.text}, {{zero}})"

    def start(y: Array) -> tuple[float, ...]:
        # Half of the zeros of a count are taken for its own.
        return _inside((y == 0).mean() * (0.5 if counts else 1.0) if y.size else 0.1), *base.start(y)

    return Family(f"zero_inflated_{base.name}", text, (Parameter("zero", "logit"), *base.parameters), start)


_MEAN, _SD, _LEVEL = Parameter("mean", "log"), Parameter("sd", "log"), Parameter("mean", "identity")
_DIRECTION = Parameter("mean", "identity", fixed=0.0)
_SHAPES = (Parameter("alpha", "log"), Parameter("beta", "log"))
_GAMMA = Family("gamma", "GammaMeanSd({mean}, {sd})", (_MEAN, _SD), _gamma)
_WEIBULL = Family(
    "weibull", "dist.Weibull({scale}, {shape})", (Parameter("shape", "log"), Parameter("scale", "log")), _weibull
)
_LOGNORMAL = Family("lognormal", "dist.LogNormal({mean}, {sd})", (_LEVEL, _SD), _log_moments)
_BETA = Family("beta", "Beta({alpha}, {beta})", _SHAPES, _beta)
_POISSON = Family("poisson", "dist.Poisson({rate})", (Parameter("rate", "log"),), lambda y: (_count(y),))
_NEGATIVE_BINOMIAL = Family(
    "negative_binomial",
    "NegativeBinomialMean({mean}, {dispersion})",
    (_MEAN, Parameter("dispersion", "log")),
    _negative_binomial,
)

FAMILIES: dict[str, Family] = {
    f.name: f
    for f in (
        Family("gaussian", "dist.Normal({mean}, {sd})", (_LEVEL, _SD), _moments),
        _GAMMA,
        _with_zeros(_GAMMA),
        _WEIBULL,
        _with_zeros(_WEIBULL),
        _LOGNORMAL,
        _with_zeros(_LOGNORMAL),
        Family("exponential", "dist.Exponential(1 / {mean})", (_MEAN,), lambda y: (_count(y),)),
        _BETA,
        _with_zeros(_BETA),
        Family("vonmises", "VonMises({mean}, {kappa})", (_DIRECTION, Parameter("kappa", "log")), _von_mises),
        Family("wrapped_cauchy", "WrappedCauchy({mean}, {rho})", (_DIRECTION, Parameter("rho", "logit")), _angle),
        _POISSON,
        _with_zeros(_POISSON),
        _NEGATIVE_BINOMIAL,
        _with_zeros(_NEGATIVE_BINOMIAL),
        Family(
            "bernoulli",
            "dist.Bernoulli({prob})",
            (Parameter("prob", "logit"),),
            _share,
            "dist.Bernoulli(logits={prob})",
        ),
        Family(
            "categorical",
            "dist.Categorical({prob})",
            (Parameter("prob", "softmax"),),
            _share,
            "dist.Categorical(logits={prob})",
        ),
    )
}
_ALIASES = {"normal": "gaussian", "von_mises": "vonmises", "hurdle_gamma": "zero_inflated_gamma"}
