"""`MixedHMM`: hidden Markov models of any streams, with fixed and random effects by formula on every parameter."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from symhmm import fitting
from symhmm.compiler.density import Density, compile
from symhmm.errors import DataError, FitError, SpecError
from symhmm.models.inputs import Bound, bind
from symhmm.models.model_fit import ModelFit
from symhmm.models.spec import Formulas, Spec, specify
from symhmm.models.starts import prior_arguments, starting_values
from symhmm.models.template import program, source
from symhmm.saved import Saved
from symhmm.tables.data import SequenceData
from symhmm.tables.design import closest

BAYESIAN = ("nuts",)


@dataclass(frozen=True, eq=False)
class MixedHMM:
    """A hidden Markov model of one or more streams in K states, with covariates and random effects by formula.

    Args:
        states: K, or the names of the states.
        emissions: family of each stream: ``gaussian``, ``gamma``, ``weibull``, ``lognormal``, ``exponential``, ``beta``,
            ``vonmises``, ``wrapped_cauchy``, ``poisson``, ``negative_binomial``, ``bernoulli``, ``categorical``, and
            ``zero_inflated_`` versions. Streams are independent given the state.
        transitions: formula of the transition logits, relative to staying; a mapping gives single moves their own,
            ``{"0>1": "~ temp"}``, and all others an intercept.
        initial: ``stationary`` (of the transition matrix of the first row), ``free``, ``uniform``, K probabilities, or a
            formula of the logits relative to the first state.
        formulas: of emission parameters, ``{"step.mean": "~ temp + (1 | ID)"}``, linear on the scale of the parameter's
            link (log for positive ones, logit for probabilities); a mapping gives states their own.
        fixed: values to hold, ``{"angle.mean": 0.0}``; the mean direction of angles is held at 0 unless it has a formula,
            ``formulas={"angle.mean": "~ 1"}``.
        timing: ``to``: covariates of row t drive the step into t; ``from``: the step out of t.
        priors: distributions for parameters by name, for Bayesian fits; all others have weakly informative ones, see
            `symhmm.models.starts.prior_arguments`. None leaves parameters without priors except in ``nuts``.
        order_by: parameter or stream whose means put the states in order; the first stream by default.

    Raises:
        SpecError: a family, parameter, state or formula that is not there, with what comes close.

    >>> MixedHMM(2, {"step": "gamma", "angle": "vonmises"}, transitions="~ temp + (1 | ID)")
    2 states: 0, 1
    step ~ gamma(mean, sd)
    angle ~ vonmises(mean, kappa)
    transitions ~ temp + (1 | ID)
    initial: stationary; covariates drive the step into their row
    """

    states: int | Sequence[str]
    emissions: Mapping[str, str]
    transitions: Formulas = None
    initial: str | Sequence[float] = "stationary"
    formulas: Mapping[str, Formulas] | None = None
    fixed: Mapping[str, float | Sequence[float]] | None = None
    timing: str = "to"
    priors: Mapping[str, Any] | None = None
    order_by: str | None = None

    def __post_init__(self) -> None:
        _ = self.spec
        known = [*self.emissions, *(p.name for p in self.spec.parameters)]
        if self.order_by is not None and self.order_by not in known:
            raise SpecError(
                f"order_by={self.order_by!r} is neither a stream nor a parameter.",
                details=[f"known: {', '.join(known)}"],
                suggestion=f"order_by={closest(self.order_by, known)!r}",
            )

    @property
    def spec(self) -> Spec:
        """The model written out and checked."""
        return specify(
            self.states,
            self.emissions,
            self.transitions,
            self.initial,
            self.formulas or {},
            self.fixed or {},
            self.timing,
        )

    def bind(self, data: SequenceData) -> Bound:
        """The model with data: designs, inputs, labels. Raises `SpecError` and `DataError`, see `symhmm.models.inputs.bind`."""
        return bind(self.spec, data.to(torch.float64))

    def program_source(self, data: SequenceData, *, priors: bool = False) -> str:
        """The Pyro program that is run for these data, as text.

        It is the function ``model(data, start)``; ``data`` are `symhmm.models.inputs.Inputs`, ``model.bind(data).inputs``,
        and ``start`` the starting values by parameter. Copy and edit it at will.
        """
        bound = self.bind(data)
        return source(bound, self._prior(bound, self._start(bound, 0, {}), priors))

    def log_density(
        self, data: SequenceData, *, priors: bool | None = None, seed: int = 0, start: Mapping[str, Any] | None = None
    ) -> Density:
        """The compiled log-density of the model's program, started at data-driven values except for those of ``start``."""
        bound = self.bind(data)
        begin = self._start(bound, seed, start or {})
        return self._compiled(
            bound, begin, self._prior(bound, begin, self.priors is not None if priors is None else priors)
        )

    def fit(
        self,
        data: SequenceData,
        method: str | None = None,
        *,
        seed: int = 0,
        priors: bool | None = None,
        start: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> ModelFit:
        """Fit the model.

        Args:
            data: sequences with the model's streams, covariates and groups.
            method: as in `symhmm.fit`; ``laplace`` for models with random effects, ``mle`` for others by default.
            seed: of everything random, clustering for the start included.
            priors: whether parameters have priors; by default where the model names some, and for ``nuts``.
            start: values to start from, by parameter, in place of the data-driven ones.
            options: of the method.

        Raises:
            SpecError, DataError: the data have not got what the model needs, by column and row.
            FitError: as for `symhmm.fit`.
        """
        bound = self.bind(data)
        random = any(b.design is not None and b.design.groups for b in bound.all_blocks)
        method = method or ("laplace" if random else "mle")
        if method not in fitting.METHODS:
            raise FitError(
                f"there is no method {method!r}.",
                details=[f"methods: {', '.join(fitting.METHODS)}"],
                suggestion=f"method={closest(method, list(fitting.METHODS))!r}",
            )
        begin = self._start(bound, seed, start or {})
        prior = self._prior(bound, begin, method in BAYESIAN or self.priors is not None if priors is None else priors)
        density = self._compiled(bound, begin, prior)
        if "start" in inspect.signature(fitting.METHODS[method]).parameters:
            # A density that was compiled before begins where it did then, and latents with a prior at its mean.
            options["start"] = {n: x for n, x in begin.items() if n in density.initial()}
        found = fitting.fit(density, method=method, seed=seed, **options)
        return ModelFit(found.estimate, found.density, self, bound, begin, prior).in_order(self.order_by)

    def restored(self, data: SequenceData, found: Saved) -> ModelFit:
        """A fit that was saved, for the data that it was made of; `symhmm.load` calls this. Raises like `symhmm.load`."""
        bound, kept = self.bind(data), found.extras
        start = kept.get("start", {})
        if {*start} != {*self._start(bound, 0, {})}:
            raise DataError(
                f"the fit in {str(found.folder)!r} is one of another model.",
                details=[f"saved: {', '.join(start) or 'no model for tables'}"],
                suggestion="the model that was fitted",
            )
        prior = self._prior(bound, start, bool(kept["priors"]))
        density = self._compiled(bound, start, prior)
        estimate = found.estimate(density.layout)
        found.check(float(density.log_prob(estimate.values)))
        return ModelFit(estimate, density, self, bound, start, prior)

    def _start(self, bound: Bound, seed: int, given: Mapping[str, Any]) -> dict[str, Tensor]:
        start = starting_values(bound, seed, self.order_by)
        for name, value in given.items():
            if name not in start:
                raise SpecError(
                    f"start names {name!r}, which is no parameter of the model.",
                    details=[f"parameters: {', '.join(start)}"],
                    suggestion=repr(closest(name, list(start))),
                )
            start[name] = torch.as_tensor(value, dtype=start[name].dtype).expand(start[name].shape).clone()
        return start

    def _compiled(self, bound: Bound, start: dict[str, Tensor], prior: dict[str, Any]) -> Density:
        model = program(source(bound, prior))
        return compile(model, bound.inputs, start, *([prior] if prior else []))

    def _prior(self, bound: Bound, start: Mapping[str, Tensor], wanted: bool) -> dict[str, Any]:
        """Arguments of the priors, or distributions where the user gave one; empty if none are wanted."""
        if not wanted:
            return {}
        arguments: dict[str, Any] = dict(prior_arguments(bound, start))
        for name, distribution in (self.priors or {}).items():
            if name not in arguments:
                raise SpecError(
                    f"priors name {name!r}, which is no parameter of the model.",
                    details=[f"parameters: {', '.join(arguments)}"],
                    suggestion=repr(closest(name, list(arguments))),
                )
            if not hasattr(distribution, "log_prob"):
                raise SpecError(f"the prior of {name!r} is no distribution.", details=[f"seen {distribution!r}"])
            arguments[name] = distribution
        return arguments

    def __repr__(self) -> str:
        return repr(self.spec)
