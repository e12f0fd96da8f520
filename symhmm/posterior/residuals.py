"""Residuals: each observation's place in its one-step-ahead forecast, normal if the model is right."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from pyro.distributions import Bernoulli, Categorical, Geometric, MaskedDistribution, Poisson, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor

from symhmm.compiler.density import Density, compile
from symhmm.compiler.lower import Named
from symhmm.distributions import Hurdle, NegativeBinomialMean, ZeroInflated, ZeroOneInflated
from symhmm.errors import GraphError, ProgramError
from symhmm.graph import FactorGraph
from symhmm.posterior.by_draws import simulated
from symhmm.posterior.evaluated import Evaluated, Values, evaluated
from symhmm.posterior.prefix import up_to, vectorised, without_data
from symhmm.posterior.series import Loop, at_label
from symhmm.tables.results import Table
from symhmm.tables.states import Labelled

SUMMARY = ("n", "mean", "sd", "p (normal)", "autocorrelation")


def residuals(density: Density, values: Values, site: str, *, seed: int = 0) -> Labelled:
    """Quantile (pseudo-)residuals of an observed site of a time loop, given the data of all steps before.

    z_t = Phi^-1(P(Y_t <= y_t | y_1..y_{t-1})), independent standard normal if the model is right (Zucchini, MacDonald and
    Langrock 2016, section 6.2). For counts, categories and exact zeros or ones a uniform number is drawn
    between P(Y_t < y_t) and P(Y_t <= y_t) (Dunn and Smyth 1996). Where an emission has no distribution function,
    draws take its place (`symhmm.posterior.by_draws`). Other streams of the same step are left out.

    Args:
        values: constrained parameters and continuous latents.
        site: ``y_{time}``.
        seed: of the randomised residuals.

    Returns:
        (time, *plates); NaN where nothing was observed.

    Raises:
        GraphError: there is no such observed site in a vectorised loop, or its plate is subsampled.
        ProgramError: its observations are of several dimensions.
        IntractableError: members are coupled by a discrete latent outside of their plate.
    """
    at = evaluated(density, values)
    loop = _loop_of(at, site)
    try:
        upper = _forecast(at, _distribution(density, values, site, strict=False), loop, site)
    except _NoFunction:
        upper = _forecast(at, simulated(density, values, at, loop, site, seed), loop, site)
    if at.graph.observed[site].family in _WITH_ATOMS:
        lower = _forecast(at, _distribution(density, values, site, strict=True), loop, site)
        generator = torch.Generator().manual_seed(seed)
        share = torch.rand(upper.values.shape, generator=generator, dtype=upper.values.dtype)
        u = lower.values + (upper.values - lower.values) * share
    else:
        u = upper.values
    tiny = torch.finfo(u.dtype).tiny
    z = torch.special.ndtri(u.clamp(tiny, 1 - torch.finfo(u.dtype).eps / 2))
    seen = _observed(at, loop, site, upper.dims)
    return replace(upper, name=f"residuals of {site}", values=torch.where(seen, z, torch.nan))


def describe(found: Labelled) -> Table:
    """Mean, standard deviation, normality (Kolmogorov-Smirnov) and autocorrelation of residuals, one row.

    >>> x = Labelled("y", torch.randn(500, 1, generator=torch.Generator().manual_seed(0)), ("time", "animal"))
    >>> describe(x)["n"]
    (500,)
    """
    return Table(SUMMARY, (_described(found.values),))


def describe_members(found: Labelled) -> Table:
    """As `describe`, one row for each member, labelled by its plates.

    >>> x = Labelled("y", torch.randn(50, 2), ("time", "animal"), {"animal": ("ann", "bo")})
    >>> describe_members(x)["animal"]
    ('ann', 'bo')
    """
    plates = found.dims[1:]
    rows = []
    for index in torch.cartesian_prod(*(torch.arange(n) for n in found.values.shape[1:])).reshape(-1, len(plates)):
        labels = tuple(found.labels[d][int(i)] for d, i in zip(plates, index, strict=True))
        rows.append((*labels, *_described(found.values[(slice(None), *index.tolist())])))
    return Table((*plates, *SUMMARY), tuple(rows))


def _described(values: Tensor) -> tuple[float, ...]:
    from scipy import stats

    x = values.double()
    seen = x[~x.isnan()]
    if len(seen) < 2:
        return (len(seen), *(float("nan") for _ in SUMMARY[1:]))
    test = stats.kstest(seen.numpy(), "norm")
    both = x[1:] * x[:-1]
    pairs = both[~both.isnan()]
    lag = float(pairs.mean() / seen.square().mean()) if len(pairs) else float("nan")
    return (len(seen), float(seen.mean()), float(seen.std()), float(test.pvalue), lag)


def _loop_of(at: Evaluated, site: str) -> Loop:
    inside = {n: x for x in at.loops for n in at.graph.observed if isinstance(x.position(n), slice)}
    if site not in inside:
        raise GraphError(
            f"there is no observed site {site!r} in a vectorised time loop.",
            details=[f"there are: {', '.join(inside) or 'none'}"],
        )
    if at.graph.subsamples:
        raise GraphError(
            "residuals of a subsampled plate are those of one subsample.", suggestion="all members at once"
        )
    return vectorised(inside[site])


def _forecast(at: Evaluated, distribution: FactorGraph, loop: Loop, site: str) -> Labelled:
    """P(Y_t <= y_t | y_1..y_{t-1}) at each step: the step's own data replaced by the distribution function."""
    functions = {f.name: f.term for f in distribution.factors}
    empty = without_data(at.graph, loop)
    own = {site, *(at_label(site, loop.axis, x) for x in loop.labels[: loop.first])}
    final = replace(
        empty,
        factors=tuple(replace(f, term=functions[f.name]) if f.name in own else f for f in empty.factors),
    )
    plates = at.ordered([p for p in at.graph.observed[site].frames if p in at.graph.plates])
    names = [loop.axis, *plates]
    shape = [at.size(p) for p in plates]
    rows = []
    for step in [*range(loop.first), slice(loop.first, None)]:
        known = step if isinstance(step, slice) else at_label(site, loop.axis, loop.labels[step])
        if not isinstance(step, slice) and known not in functions:
            rows.append(torch.full([1, *shape], torch.nan))
            continue
        x, y = (up_to(at, loop, graph, step, plates).aligned(names) for graph in (final, empty))
        rows.append((x - y).exp().expand([max(x.shape[0], y.shape[0]), *shape]))
    return Labelled(site, torch.cat(rows), tuple(names), {loop.axis: loop.labels})


def _observed(at: Evaluated, loop: Loop, site: str, dims: tuple[str, ...]) -> Tensor:
    """Where a site's observations are not masked: its term says something."""
    terms = {f.name: Named.from_funsor(f.term, f.name) for f in at.graph.factors}
    rows = []
    for name in [*(at_label(site, loop.axis, x) for x in loop.labels[: loop.first]), site]:
        if name not in terms:
            rows.append(torch.zeros([1] * len(dims), dtype=torch.bool))
            continue
        term = terms[name]
        other = [i for i, n in enumerate(term.names) if n not in dims]
        seen = term.data != 0
        seen = seen.sum(other) > 0 if other else seen
        rows.append(Named(seen, [n for n in term.names if n in dims]).aligned(dims))
    shape = [at.size(d) for d in dims[1:]]
    steps = [1] * loop.first + [len(loop.labels) - loop.first]
    return torch.cat([x.expand([n, *shape]) for x, n in zip(rows, steps, strict=True)])


def _distribution(density: Density, values: Values, site: str, *, strict: bool) -> FactorGraph:
    """The graph whose observed sites give log-distribution functions instead of log-densities."""
    if isinstance(density.program, FactorGraph):
        raise GraphError("a factor graph knows no distributions.", suggestion="compile a program")
    program = density.program

    def make() -> Callable[..., None]:
        def transformed(*args: Any, **kwargs: Any) -> None:
            with _Distributions(site, strict):
                program(*args, **kwargs)

        return transformed

    wrapped = density.compiled.once(("distribution", site, strict), make)
    args, kwargs = density.arguments.rebuild(density.data[: len(density.arguments.tensors)])
    with torch.no_grad():
        return compile(wrapped, *args, **kwargs).factors_at(values)


class _NoFunction(ProgramError):
    """A distribution has no distribution function."""


class _Distributions(Messenger):
    """Observed sites of one template answer with the logarithm of their distribution function."""

    def __init__(self, site: str, strict: bool) -> None:
        super().__init__()
        self.before, self.after, self.strict = site.partition("{")[0], site.rpartition("}")[2], strict

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        name = str(msg["name"])
        if msg["is_observed"] and name.startswith(self.before) and name.endswith(self.after):
            msg["fn"] = _wrapped(msg["fn"], self.strict)


def _wrapped(fn: Any, strict: bool) -> Any:
    if isinstance(fn, MaskedDistribution):
        return _wrapped(fn.base_dist, strict).mask(fn._mask)
    return fn if type(fn).__name__ in ("Unit", "Delta") else _LogDistribution(fn, strict)


class _LogDistribution(TorchDistribution):
    """A distribution whose ``log_prob`` is log P(Y <= y), or log P(Y < y) if ``strict``."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Any, strict: bool) -> None:
        self.base, self.strict = base, strict
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.base.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_LogDistribution":
        return _LogDistribution(self.base.expand(batch_shape), self.strict)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        discrete = next((f for kind, f in _FUNCTIONS if isinstance(self.base, kind)), None)
        if discrete is not None:
            p = discrete(self.base, value - 1 if self.strict else value)
        elif self.strict:
            p = self.base.cdf_below(value)
        else:
            try:
                p = self.base.cdf(value)
            except NotImplementedError as error:  # how torch's distributions say that they have none
                raise _NoFunction(
                    f"{type(self.base).__name__} has no distribution function (cdf), which residuals need.",
                    suggestion="residuals of another stream, or give the distribution a cdf method",
                ) from error
        return p.clamp(0.0, 1.0).log()


def _poisson(fn: Any, y: Tensor) -> Tensor:
    return torch.where(y < 0, 0.0, torch.special.gammaincc(y.clamp_min(0).floor() + 1, fn.rate))


def _bernoulli(fn: Any, y: Tensor) -> Tensor:
    return torch.where(y < 0, 0.0, torch.where(y < 1, 1 - fn.probs, 1.0))


def _categorical(fn: Any, y: Tensor) -> Tensor:
    below = torch.arange(fn.probs.shape[-1]) <= y.unsqueeze(-1)
    return (fn.probs * below).sum(-1)


def _geometric(fn: Any, y: Tensor) -> Tensor:
    return torch.where(y < 0, 0.0, 1 - (1 - fn.probs) ** (y + 1))


_FUNCTIONS: list[tuple[type, Callable[[Any, Tensor], Tensor]]] = [
    (Poisson, _poisson),
    (Bernoulli, _bernoulli),
    (Categorical, _categorical),
    (Geometric, _geometric),
]
# Distributions in which single values have a probability of their own: those above, and those with a ``cdf_below``.
_OURS = (Hurdle, NegativeBinomialMean, ZeroInflated, ZeroOneInflated)
_WITH_ATOMS = {kind.__name__ for kind in (*(kind for kind, _ in _FUNCTIONS), *_OURS)}
