"""`fit`: the one door to the drivers, and `Fit`: an estimate with its density and the questions one can ask of it."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import log
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from symhmm import components, effects, saved
from symhmm.compiler.density import Density, compile
from symhmm.errors import FitError
from symhmm.graph import FactorGraph
from symhmm.infer import em, laplace_fit, mle, nuts, svi
from symhmm.infer.information import Information, count_observations, delta, information, standard_errors
from symhmm.infer.laplace import Laplace, laplace
from symhmm.infer.laplace_errors import effect_errors
from symhmm.infer.profile import Profile, profile
from symhmm.infer.target import Target, target
from symhmm.questions import Questions
from symhmm.reorder import called, ordered
from symhmm.summary import Summary, criterion, summary
from symhmm.tables.results import Estimate, Optima, Status, Table

METHODS: dict[str, Callable[..., Estimate]] = {
    "mle": partial(mle.run, method="mle"),
    "map": partial(mle.run, method="map"),
    "em": em.run,
    "svi": svi.run,
    "laplace": laplace_fit.run,
    "nuts": nuts.run,
}
AFFORDABLE = 400  # free coordinates up to which standard errors are computed
DRAWS = 1000  # of the posterior, for means and intervals on the natural scale


def fit(
    program: Callable[..., Any] | FactorGraph | Density,
    *args: Any,
    method: str = "mle",
    seed: int = 0,
    fix: Mapping[str, Any] | None = None,
    **options: Any,
) -> "Fit":
    """Fit the free values of a program to its data.

    Args:
        program: a Pyro program or factor graph with its ``args``, or a `Density` that `compile` made of them.
        method: ``mle`` (maximum likelihood; every free value is a ``pyro.param``), ``em`` (the same by expected complete
            data), ``map`` (joint maximum of parameters and latents), ``laplace`` (maximum likelihood with the random effects
            integrated out, by Laplace's approximation or exactly), ``svi`` (parameters as points, latents integrated by a
            variational posterior) or ``nuts`` (draws from the posterior).
        seed: of everything random; the same seed on the same machine gives the same numbers.
        fix: constrained values to hold, by name.
        options: of the driver, among them ``restarts``, ``progress`` and ``checkpoint``; see `symhmm.infer.mle.run`,
            `symhmm.infer.laplace_fit.run` and `symhmm.infer.svi.run`.

    Raises:
        FitError: before any work, for an unknown method or option, nothing to fit, or a method that does not suit the
            program. Numerical trouble is no error: it is reported by ``Fit.status``.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     loc = pyro.param("loc", torch.tensor(0.0, dtype=torch.float64))
    ...     with pyro.plate("n", len(y)):
    ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    >>> round(fit(model, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)).values["loc"].item(), 6)
    2.0
    """
    if method not in METHODS:
        raise FitError(
            f"there is no method {method!r}.",
            details=[f"methods: {', '.join(METHODS)}"],
            suggestion=f"method={_closest(method, METHODS)!r}",
        )
    driver = METHODS[method]
    known = [n for n in inspect.signature(driver).parameters if n not in ("density", "method")]
    for name in options:
        if name not in known:
            raise FitError(
                f"method={method!r} has no option {name!r}.",
                details=[f"options: {', '.join(known)}"],
                suggestion=f"{_closest(name, known)}=",
            )
    density = program if isinstance(program, Density) else compile(program, *args)
    return Fit(driver(density, seed=seed, fix=fix, **options), density)


@dataclass(frozen=True, eq=False)
class Fit(Questions):
    """An estimate with its density.

    Args:
        state_names: of the states of discrete latents, by site; see `with_states`.
    """

    estimate: Estimate
    density: Density
    state_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict, kw_only=True)

    @property
    def values(self) -> Mapping[str, Tensor]:
        """Constrained values by name; medians for latents with a posterior."""
        return self.estimate.values

    @property
    def objective(self) -> float:
        """What was maximised, nats; ``estimate.objective_name`` says what it is."""
        return self.estimate.objective

    @property
    def aic(self) -> float:
        """Akaike's criterion from the marginal likelihood (an upper bound where only an ELBO is known; see summary).

        Raises:
            FitError: the objective is a joint density.
        """
        return criterion(self, 2.0)

    @property
    def bic(self) -> float:
        """Schwarz's criterion, with the number of observed values as the sample size. Raises like `aic`."""
        return criterion(self, log(max(self.n_observations, 1)))

    @property
    def status(self) -> Status:
        """How the fit ended, with causes and the next thing to try."""
        return self.estimate.status

    @property
    def optima(self) -> Optima:
        """What each start led to."""
        return self.estimate.optima

    @cached_property
    def n_observations(self) -> int:
        """Observed values, masked ones left out."""
        return count_observations(self.density)

    @cached_property
    def information(self) -> Information | None:
        """Observed information of the free values at a maximum; None after ``svi`` or where it costs too much.

        After ``laplace`` it is that of the marginal likelihood.
        """
        free, integrated = self._target, bool(self.estimate.integrated)
        points = self.estimate.posterior is None or integrated
        if not points or free.size > AFFORDABLE or self.estimate.objective == -torch.inf:
            return None
        return information(free, free.start)

    @cached_property
    def standard_errors(self) -> Mapping[str, Tensor]:
        """Of the points by name, natural scale, from `information` by the delta method; empty without one."""
        found = self.information
        return {} if found is None else standard_errors(self._target, self._target.start, found)

    @cached_property
    def effect_errors(self) -> Tensor | None:
        """Standard errors of integrated effects with the uncertainty of all other values, unconstrained, at their places in
        the density's vector, shape (size,), zero elsewhere; None after other methods and without `information`."""
        found, goal = self.information, self._target
        if found is None or not isinstance(goal.density, Laplace):
            return None
        out = torch.zeros(self.density.size, dtype=self.density.layout.dtype)
        out[goal.density.members.index] = effect_errors(goal.density, goal, found)
        return out

    @cached_property
    def posterior_draws(self) -> Mapping[str, Tensor]:
        """Constrained values drawn from the posterior by name, shape (draws, *shape); empty without one."""
        if self.estimate.posterior is None:
            return {}
        return self._unpacked(self.estimate.posterior.sample(DRAWS))

    def drawn_chains(self, draws: int) -> dict[str, Tensor]:
        """Constrained posterior draws by name, shape (chains, draws, *shape): all of a sampler's, else one chain.

        Raises:
            FitError: the fit has no posterior.
        """
        chains = getattr(self.estimate.posterior, "chains", None)
        if chains is None:
            each = self.drawn(max(draws, 1))
            return {n: torch.stack([v[n] for v in each]).unsqueeze(0) for n in each[0]}
        return {n: x.unflatten(0, chains.shape[:2]) for n, x in self._unpacked(chains.flatten(0, 1)).items()}

    def _unpacked(self, vectors: Tensor) -> dict[str, Tensor]:
        """Constrained values of draws, those of a sampler with their states in one order; shape (draws, *shape)."""
        with torch.no_grad():
            drawn = [self.density.unpack(v) for v in vectors]
        stacked = {n: torch.stack([d[n] for d in drawn]) for n in drawn[0]}
        # A normal posterior stays at one of the orders that the states could have; a sampler may visit several.
        return self.in_one_order(stacked) if hasattr(self.estimate.posterior, "chains") else stacked

    def fixed_effects(self) -> Table:
        """Parameters and latents outside every plate: estimate, standard error, 95 percent interval, natural scale.

        After a maximum, errors are those of the observed information (differences of the exact gradient; delta
        method); after ``svi``, latents have the mean, standard deviation and quantiles of the posterior, and
        parameters, which are points there, have none.
        """
        return effects.fixed_effects(self)

    def random_effects(self, plate: str | None = None) -> Table:
        """Effects of each member of ``plate`` (of all plates if None) with their uncertainty, one row per number.

        After ``svi``: mean, standard deviation and 95 percent interval of the posterior. After ``laplace``: conditional mode,
        with the standard error of `effect_errors`, which knows that the fixed effects are estimates; positive and other
        bounded effects have the standard deviation given the fixed effects. After ``map``: the joint mode.

        Raises:
            FitError: the program has no random effects of that plate.
        """
        return effects.random_effects(self, plate)

    def variance_components(self) -> Table:
        """Standard deviations and correlations of the random effects in the population, with their uncertainty.

        After a maximum of the likelihood, errors come from the observed information; where the components have priors,
        from the posterior. See `symhmm.components.variance_components`.
        """
        return components.variance_components(self)

    def shrinkage(self, plate: str | None = None) -> Table:
        """How strongly each member is pooled, against its number of observations, see `symhmm.components.shrinkage`.

        Raises:
            FitError: there are no random effects of that plate, or the fit does not know how uncertain they are.
        """
        return components.shrinkage(self, plate)

    def delta(self, f: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """Standard errors of a function of the constrained values by the delta method; NaN without `information`.

        Args:
            f: from values by name to a tensor; differentiable.
        """
        found = self.information
        if found is None:
            with torch.no_grad():
                return torch.full_like(f(self.values), torch.nan)
        others = {n: self.values[n] for n in self.estimate.integrated}
        return delta(self._target, self._target.start, found, lambda v: f({**v, **others}))

    def profile(self, name: str, *, level: float = 0.95) -> Profile:
        """Profile likelihood of one value, ``"tau"`` or ``"loc[0]"``, with its interval; see `symhmm.infer.profile.profile`.

        Raises:
            FitError: no such value, or no maximum to move away from (after ``svi`` or ``nuts``).
        """
        if self.estimate.posterior is not None and not self.estimate.integrated:
            raise FitError(
                f"method={self.estimate.method!r} has no maximum, and so no profile likelihood.",
                suggestion="fit.fixed_effects() has intervals; method='mle' or 'laplace' has a maximum",
            )
        return profile(self._target, name, level=level)

    def summary(self) -> Summary:
        """Everything above on one page; ``print(fit.summary())``."""
        return summary(self)

    @cached_property
    def _target(self) -> Target:
        """What was maximised, started at the estimate."""
        gone = self.estimate.integrated
        density: Any = laplace(self.density, over=gone) if gone else self.density
        values = {n: v for n, v in self.values.items() if n not in gone}
        fixed, tie, order = {n: values[n] for n in self.estimate.fixed}, self.estimate.tie, dict(self.estimate.order)
        return target(density, fixed, self.estimate.method, values, tie=tie, order=order)

    def drawn(self, draws: int) -> list[Mapping[str, Tensor]]:
        """Constrained values drawn from the posterior; the estimate itself where ``draws`` is 0.

        Raises:
            FitError: the fit has no posterior.
        """
        if draws == 0:
            return [self.values]
        if not self.posterior_draws:
            raise FitError(f"method={self.estimate.method!r} has no posterior to draw from.", suggestion="draws=0")
        n = min(draws, DRAWS)
        return [{name: x[i] for name, x in self.posterior_draws.items()} for i in range(n)]

    def uncertain(self, draws: int, seed: int = 0) -> list[Mapping[str, Tensor]]:
        """Constrained values that might be true: normal around a maximum with the inverse of `information`, or posterior draws.

        After ``laplace`` the random effects stay at their modes.

        Raises:
            FitError: there is neither.
        """
        found = self.information
        if found is None:
            return self.drawn(draws)
        roots, directions = torch.linalg.eigh(found.covariance)
        half = directions * roots.clamp(min=0).sqrt()
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(draws, len(roots), generator=generator, dtype=half.dtype) @ half.T
        goal, gone = self._target, {n: self.values[n] for n in self.estimate.integrated}
        vectors = goal.start.expand(draws, -1).clone()
        vectors[:, goal.free] += noise.to(vectors.dtype)
        with torch.no_grad():
            return [{**goal.values(v), **gone} for v in vectors]

    def on(self, *args: Any, **kwargs: Any) -> "Fit":
        """The same estimate with other data, given as the program's arguments: states of a sequence it has not seen.

        Raises:
            FitError: the estimate holds effects of the individuals it was fitted to, which other data do not have.
            ValuesError: the program has other free values with these data.
        """
        local = [e.name for e in self.density.layout.entries if e.plates]
        if local:
            raise FitError(
                f"{local[0]!r} belongs to the members of {', '.join(self.density.layout[local[0]].plates)!r} in the data of "
                "the fit, and says nothing about others.",
                suggestion="fit the new data, with the fixed effects held: fit(..., fix=...)",
            )
        density = self.density.bind(*args, **kwargs)
        density.layout.check(self.values)
        return replace(self, density=density)

    def ordered(self, by: str, site: str | None = None) -> "Fit":
        """The same fit with its states numbered by increasing values of ``by``; everything asked of it afterwards follows.

        Estimate, posterior and names move, see `symhmm.reorder.ordered`, which says what it raises.
        """
        found = self.symmetry(site)
        order = found.by(self.values, by).argsort(stable=True)
        names = {n: tuple(x[k] for k in order.tolist()) if n == found.site else x for n, x in self.state_names.items()}
        return replace(self, estimate=ordered(self.estimate, self.density, found, order), state_names=names)

    def with_states(self, *names: str, site: str | None = None) -> "Fit":
        """The same fit whose answers call states by name, in the order of their numbers: ``with_states("rest", "travel")``.

        Args:
            site: the discrete latent, ``"z_{time}"``; the one with a time loop, or the only one, if None.

        Raises:
            GraphError: there is no such latent, or there are several.
            FitError: not as many different names as states.
        """
        return replace(self, state_names={**self.state_names, **called(self.density, names, site)})

    @property
    def states(self) -> tuple[Any, ...]:
        """Names of the states of the one discrete latent that has names; empty where none or several have."""
        return next(iter(self.state_names.values())) if len(self.state_names) == 1 else ()

    def states_of(self, site: str) -> tuple[Any, ...]:
        """Names of the states of a discrete latent, empty where it has none."""
        return self.state_names.get(site, ()) if self.state_names else self.states

    def save(self, folder: str | Path) -> None:
        """Write the fit into a folder, for `load`; see `symhmm.saved`. Programs and data are not part of it."""
        value = float(self.density.log_prob(self.values))
        saved.write(folder, self.estimate, self.density.layout, value, self.kept())

    def kept(self) -> Mapping[str, Any]:
        """What is saved beside the estimate: what a model needs to make its program again."""
        return {}

    def __repr__(self) -> str:
        return f"Fit: {self.estimate}"


def load(folder: str | Path, program: Any, *args: Any) -> Fit:
    """A fit that was saved, with the program or model and the data that it was made of.

    Args:
        folder: that `Fit.save` was given.
        program: a Pyro program or factor graph with its ``args``, or a model with its data.

    Raises:
        DataError: the folder is not whole, was changed, or belongs to another program or other data.
    """
    found = saved.read(folder)
    if hasattr(program, "restored"):
        return cast(Fit, program.restored(*args, found))
    density = program.log_density(*args) if hasattr(program, "log_density") else compile(program, *args)
    estimate = found.estimate(density.layout)
    found.check(float(density.log_prob(estimate.values)))
    return Fit(estimate, density)


def _closest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.3)
    return str(found[0] if found else next(iter(known)))
