"""`fit`: the one door to the drivers, and `Fit`: an estimate with its density and the questions one can ask of it."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import isfinite, log, nan
from typing import Any

import torch
from torch import Tensor

from symhmm.compiler.density import Density, compile
from symhmm.errors import FitError
from symhmm.graph import FactorGraph
from symhmm.infer import laplace_fit, mle, svi
from symhmm.infer.information import Information, count_observations, information, interval, standard_errors
from symhmm.infer.laplace import laplace
from symhmm.infer.target import Target, target
from symhmm.questions import Questions
from symhmm.tables.results import LOG_LIKELIHOOD, Estimate, Optima, Status, Table, label

METHODS: dict[str, Callable[..., Estimate]] = {
    "mle": partial(mle.run, method="mle"),
    "map": partial(mle.run, method="map"),
    "svi": svi.run,
    "laplace": laplace_fit.run,
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
        method: ``mle`` (maximum likelihood; every free value is a ``pyro.param``), ``map`` (joint maximum of parameters
            and latents), ``laplace`` (maximum likelihood with the random effects integrated out, by Laplace's approximation
            or exactly) or ``svi`` (parameters as points, latents integrated by a variational posterior).
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
    """An estimate with its density."""

    estimate: Estimate
    density: Density

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
        return self._criterion(2.0)

    @property
    def bic(self) -> float:
        """Schwarz's criterion, with the number of observed values as the sample size. Raises like `aic`."""
        return self._criterion(log(max(self.n_observations, 1)))

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

    def fixed_effects(self) -> Table:
        """Parameters and latents outside every plate: estimate, standard error, 95 percent interval, natural scale.

        After a maximum, errors are those of the observed information (differences of the exact gradient; delta
        method); after ``svi``, latents have the mean, standard deviation and quantiles of the posterior, and
        parameters, which are points there, have none.
        """
        errors, draws = self._errors, self._draws
        rows: list[tuple[Any, ...]] = []
        for e in self.density.layout.entries:
            if e.plates:
                continue
            value, names = self.values[e.name].reshape(-1).tolist(), label(e.name, e.shape)
            if e.name in self.estimate.fixed:
                rows += [(n, v, nan, nan, nan, "fixed") for n, v in zip(names, value, strict=True)]
            elif e.name in draws and not e.is_param:
                rows += [(n, *row, e.role) for n, row in zip(names, _describe(draws[e.name]), strict=True)]
            else:
                se = errors[e.name].reshape(-1).tolist() if e.name in errors else [nan] * len(value)
                rows += [
                    (n, v, s, *interval(v, s, e.constraint), e.role) for n, v, s in zip(names, value, se, strict=True)
                ]
        return Table(("name", "estimate", "se", "2.5%", "97.5%", "role"), tuple(rows))

    def random_effects(self, plate: str | None = None) -> Table:
        """Effects of each member of ``plate`` (of all plates if None) with their uncertainty, one row per number.

        After ``svi``: mean, standard deviation and 95 percent interval of the posterior. After ``laplace``: the same of the
        normal distribution around the conditional mode, given the fixed effects. After ``map``: the joint mode.

        Raises:
            FitError: the program has no random effects of that plate.
        """
        entries = [e for e in self.density.layout.entries if e.plates and (plate is None or plate in e.plates)]
        if not entries:
            plates = sorted({p for e in self.density.layout.entries for p in e.plates})
            raise FitError(
                f"there are no random effects{f' of plate {plate!r}' if plate else ''}.",
                details=[f"plates with random effects: {', '.join(plates) or 'none'}"],
                suggestion="a continuous pyro.sample inside a pyro.plate is one",
            )
        rows: list[tuple[Any, ...]] = []
        for e in entries:
            names = label(e.name, e.shape)
            if e.name in self._draws and e.name not in self.estimate.fixed:
                numbers = _describe(self._draws[e.name])
            else:
                numbers = [(v, nan, nan, nan) for v in self.values[e.name].reshape(-1).tolist()]
            rows += [(n, *row, ", ".join(e.plates)) for n, row in zip(names, numbers, strict=True)]
        return Table(("name", "estimate", "sd", "2.5%", "97.5%", "plate"), tuple(rows))

    def variances(self) -> Table:
        """Spread of the random effects between members, one row per effect.

        ``sd of estimates`` is shrunk towards zero; ``total sd`` adds what is left uncertain in each member, and is the
        estimate of the spread in the population.
        """
        rows: list[tuple[Any, ...]] = []
        for e in self.density.layout.entries:
            if not e.plates:
                continue
            event = self.density.graph.latents[e.name].event_dim
            members = [len(e.shape) - event + d for d in e.plates.values()]
            n = torch.Size(e.shape[i] for i in members).numel()
            draws = self._draws[e.name] if e.name in self._draws else self.values[e.name][None]
            mean = draws.mean(0)
            between = mean.var(members, correction=0).reshape(-1)
            total = (between + draws.var(0, correction=0).mean(members).reshape(-1)).sqrt()
            left = [s for i, s in enumerate(e.shape) if i not in members]
            for name, b, t in zip(label(e.name, left), between.sqrt().tolist(), total.tolist(), strict=True):
                rows.append((name, ", ".join(e.plates), n, b, t if self.estimate.posterior else nan))
        return Table(("effect", "plate", "members", "sd of estimates", "total sd"), tuple(rows))

    def summary(self) -> "Summary":
        """Everything above on one page; ``print(fit.summary())``."""
        est, lines = self.estimate, []
        error = f" +- {est.error:.2g}" if est.error else ""
        lines.append(f"method          {est.method}, {est.n_evaluations} gradients, {est.seconds:.2f} s")
        lines.append(f"status          {est.status}")
        lines.append(f"{est.objective_name}: {est.objective:.4f}{error} nats")
        if est.marginal is not None:
            what = "log-likelihood" if est.objective_name.endswith("log-likelihood)") else "log-evidence"
            lines.append(f"{what}, importance-weighted: {est.marginal[0]:.4f} +- {est.marginal[1]:.2g} nats")
        lines += self._criteria()
        lines += ["", repr(self.fixed_effects())]
        found = self.information
        if found is not None:
            lines.append("standard errors: observed information, by central differences of the exact gradient")
            if found.rank < len(found.flat):
                lost = len(found.flat) - found.rank
                lines.append(f"{lost} of {len(found.flat)} directions are flat; '-' marks what they touch")
        if any(e.plates for e in self.density.layout.entries):
            lines += ["", repr(self.variances())]
        if len(est.optima.objectives) > 1:
            lines += ["", repr(est.optima)]
        return Summary("\n".join(lines))

    def _criteria(self) -> list[str]:
        est, n = self.estimate, self.n_observations
        counted = " + ".join(f"{name} {k}" for name, k in est.counts.items())
        lines = [f"free values     {est.n_parameters} = {counted}; {n} observations"]
        if self._evidence is None:
            return lines
        (value, why), k = self._evidence, est.n_parameters
        lines.append(f"AIC {2 * k - 2 * value:.2f}, BIC {k * log(max(n, 1)) - 2 * value:.2f}{why}")
        if self.information is not None and self.information.rank < k:
            k = self.information.rank
            lines.append(f"  with the {k} values that the data determine: AIC {2 * k - 2 * value:.2f}")
        return lines

    @cached_property
    def _evidence(self) -> tuple[float, str] | None:
        """What AIC and BIC may be made of, and a remark on it; None for a joint density, which is no likelihood."""
        est = self.estimate
        prior = any(not e.is_param and not e.plates for e in self.density.layout.entries)
        if not isfinite(est.objective) or prior or est.method == "map":
            return None
        if est.objective_name == LOG_LIKELIHOOD:
            return est.objective, ""
        if est.marginal is not None:
            return est.marginal[0], f" (importance-weighted, +- {2 * est.marginal[1]:.2g})"
        return est.objective, " (of the ELBO: an upper bound of the true one)"

    def _criterion(self, penalty: float) -> float:
        if self._evidence is None:
            raise FitError(
                f"there is no marginal likelihood after method={self.estimate.method!r}, so no AIC or BIC.",
                details=[f"its objective is the {self.estimate.objective_name}"],
                suggestion="method='mle', or 'svi' for a program with random effects and no priors",
            )
        return penalty * self.estimate.n_parameters - 2 * self._evidence[0]

    @cached_property
    def _target(self) -> Target:
        """What was maximised, started at the estimate."""
        gone = self.estimate.integrated
        density: Any = laplace(self.density, over=gone) if gone else self.density
        values = {n: v for n, v in self.values.items() if n not in gone}
        return target(density, {n: values[n] for n in self.estimate.fixed}, self.estimate.method, values)

    @cached_property
    def _errors(self) -> dict[str, Tensor]:
        found = self.information
        return {} if found is None else standard_errors(self._target, self._target.start, found)

    def drawn(self, draws: int) -> list[Mapping[str, Tensor]]:
        """Constrained values drawn from the posterior; the estimate itself where ``draws`` is 0.

        Raises:
            FitError: the fit has no posterior.
        """
        if draws == 0:
            return [self.values]
        if not self._draws:
            raise FitError(f"method={self.estimate.method!r} has no posterior to draw from.", suggestion="draws=0")
        n = min(draws, DRAWS)
        return [{name: x[i] for name, x in self._draws.items()} for i in range(n)]

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

    @cached_property
    def _draws(self) -> dict[str, Tensor]:
        """Posterior draws of the constrained values, shape (draws, *shape) each; empty without a posterior."""
        if self.estimate.posterior is None:
            return {}
        with torch.no_grad():
            drawn = [self.density.unpack(v) for v in self.estimate.posterior.sample(DRAWS)]
        return {n: torch.stack([d[n] for d in drawn]) for n in drawn[0]}

    def __repr__(self) -> str:
        return f"Fit: {self.estimate}"


@dataclass(frozen=True)
class Summary:
    """A page of text."""

    text: str

    def __repr__(self) -> str:
        return self.text


def _describe(draws: Tensor) -> list[tuple[float, ...]]:
    flat = draws.reshape(draws.shape[0], -1)
    low, high = flat.quantile(torch.tensor([0.025, 0.975], dtype=flat.dtype), dim=0)
    return list(zip(*(x.tolist() for x in (flat.mean(0), flat.std(0), low, high)), strict=True))


def _closest(name: str, known: Any) -> str:
    found = difflib.get_close_matches(name, list(known), 1, 0.3)
    return str(found[0] if found else next(iter(known)))
