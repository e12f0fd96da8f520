"""What one can ask of fitted values: each question is one function of `symhmm.posterior`, at the fit's own values."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import GraphError
from symhmm.posterior import (
    align,
    checks,
    curves,
    decode,
    forecast,
    inference_data,
    marginals,
    pointwise,
    prefix,
    residuals,
    simulate,
)
from symhmm.posterior.align import Symmetry
from symhmm.tables.data import SequenceData
from symhmm.tables.naming import data_among, named, named_all
from symhmm.tables.results import Table
from symhmm.tables.states import Answers, Labelled

Sites = Iterable[str] | None


class Questions(ABC):
    """Questions about the hidden states; `Fit` asks them at its estimate.

    Answers are mappings from sites (``z_{time}`` for all steps of a loop) to labelled tensors. With ``draws`` the values
    are drawn from the posterior of the fit, where it has one, and the answers averaged over them.
    """

    density: Density

    @property
    @abstractmethod
    def values(self) -> Mapping[str, Tensor]:
        """Constrained values at which questions are asked."""

    @abstractmethod
    def drawn_chains(self, draws: int) -> dict[str, Tensor]:
        """Constrained posterior draws by name, shape (chains, draws, *shape)."""

    @abstractmethod
    def drawn(self, draws: int) -> list[Mapping[str, Tensor]]:
        """Constrained values drawn from the posterior; the estimate itself where ``draws`` is 0."""

    @property
    def data(self) -> SequenceData | None:
        """The sequences among the program's arguments, whose ids and times label the answers; None if there are none."""
        arguments = self.density.arguments
        return data_among(arguments.rebuild(arguments.tensors))

    @property
    def states(self) -> tuple[Any, ...]:
        """Names of the states, where they have any."""
        return ()

    def states_of(self, site: str) -> tuple[Any, ...]:
        """Names of the states of a discrete latent, where they have any."""
        return self.states

    def smooth(self, sites: Sites = None, *, draws: int = 0) -> Answers:
        """Probabilities of states given all data, see `symhmm.posterior.marginals.smooth`."""
        return self._averaged(lambda v: marginals.smooth(self.density, v, sites), draws)

    def filter(self, sites: Sites = None, *, ahead: bool = False, draws: int = 0) -> Answers:
        """Probabilities of states given the data up to each step, see `symhmm.posterior.prefix.filtered`."""
        return self._averaged(lambda v: prefix.filtered(self.density, v, sites, ahead=ahead), draws)

    def pairwise(self, sites: Sites = None, *, draws: int = 0) -> Answers:
        """Probabilities of successive states, see `symhmm.posterior.marginals.pairwise`."""
        return self._averaged(lambda v: marginals.pairwise(self.density, v, sites), draws)

    def occupancy(self, sites: Sites = None, *, draws: int = 0) -> Answers:
        """Expected number of steps in each state, see `symhmm.posterior.marginals.occupancy`."""
        return self._averaged(lambda v: marginals.occupancy(self.density, v, sites), draws)

    def transition_counts(self, sites: Sites = None, *, draws: int = 0) -> Answers:
        """Expected number of moves between states, see `symhmm.posterior.marginals.transition_counts`."""
        return self._averaged(lambda v: marginals.transition_counts(self.density, v, sites), draws)

    def viterbi(self, sites: Sites = None, *, k: int = 1) -> Answers:
        """Jointly most probable states at the estimate, or the ``k`` best, see `symhmm.posterior.decode.viterbi`."""
        return self._named(decode.viterbi(self.density, self.values, sites, k=k))

    def posterior_decode(self, sites: Sites = None) -> Answers:
        """Most probable state of each step by itself, see `symhmm.posterior.decode.posterior_decode`."""
        return self._named(decode.posterior_decode(self.density, self.values, sites))

    def sample_states(self, n: int = 1, *, seed: int = 0, sites: Sites = None, draws: int = 0) -> Answers:
        """Exact draws of all states, ``n`` for each of the values, see `symhmm.posterior.decode.sample_states`."""
        found = [
            decode.sample_states(self.density, v, n, seed=seed + i, sites=sites)
            for i, v in enumerate(self.drawn(draws))
        ]
        return self._named(_combined(found, torch.cat))

    def predict(
        self,
        horizon: int,
        *longer: Any,
        sites: Sites = None,
        draws: int = 0,
        quantiles: Sequence[float] = forecast.QUANTILES,
        seed: int = 0,
    ) -> Answers:
        """Future states and observations, see `symhmm.posterior.forecast.predict`.

        Args:
            longer: the program's arguments with ``horizon`` more masked steps, where the future has covariates of its own.
        """
        future = self.density.bind(*longer) if longer else None
        found = forecast.predict(
            self.density, self.drawn(draws), horizon, sites, future=future, quantiles=quantiles, seed=seed
        )  # fmt: skip
        return self._named(found, steps=False)

    @abstractmethod
    def uncertain(self, draws: int, seed: int = 0) -> list[Mapping[str, Tensor]]:
        """Constrained values that might be true: of the posterior, or of the normal approximation around a maximum."""

    def curves(
        self,
        *args: Any,
        along: tuple[str, Tensor] | None = None,
        effects: Mapping[str, Tensor] | None = None,
        draws: int = 200,
        probabilities: Sequence[float] = (0.025, 0.975),
        seed: int = 0,
    ) -> Answers:
        """Moves, stationary distributions and emissions at other covariates, see `symhmm.posterior.curves.curves`.

        Args:
            args: the program's arguments with a grid of covariates as steps.
            along: name and numbers of the covariate, ``("temperature", grid)``.
            effects: values of random effects, such as zeros for a typical member; needed where the members are others.
        """
        density = self.density.bind(*args)
        held = dict(effects or {})
        values = [{**v, **held} for v in self.uncertain(draws, seed)]
        return curves.curves(density, {**self.values, **held}, values, probabilities, along)

    def interval(
        self,
        f: Callable[[Mapping[str, Tensor]], Tensor],
        *,
        draws: int = 1000,
        probabilities: Sequence[float] = (0.025, 0.975),
        seed: int = 0,
    ) -> Labelled:
        """Any function of the named values with its interval, see `symhmm.posterior.curves.interval`."""
        return curves.interval(f, self.values, self.uncertain(draws, seed), probabilities)

    def check(
        self,
        statistic: checks.Statistic | Mapping[str, checks.Statistic],
        n: int = 1000,
        *,
        seed: int = 0,
        new_members: bool = False,
        draws: int = 0,
    ) -> checks.Check:
        """Statistics of the data beside those of ``n`` replicated data sets, see `symhmm.posterior.checks.check`."""
        return checks.check(self.density, self.drawn(draws), statistic, n, seed=seed, new_members=new_members)

    def simulate(self, n: int = 1, *args: Any, seed: int = 0, new_members: bool = False) -> Answers:
        """New data and states from the program at the estimate, see `symhmm.posterior.simulate.simulate`.

        Args:
            args: the program's arguments for other data, whose members, steps, masks and covariates are taken; with
                ``new_members`` there may be any number of them.
        """
        if not args:
            found = simulate.simulate(self.density, self.values, n, seed=seed, new_members=new_members)
            return found if new_members else self._named(found)
        density, values = self.density.bind(*args), dict(self.values)
        if new_members:
            # Effects of members are drawn anew: what stands here is not looked at, but has the right shape.
            values |= {e.name: density.initial()[e.name] for e in density.layout.entries if e.plates}
        return simulate.simulate(density, values, n, seed=seed, new_members=new_members)

    def residuals(self, site: str, *, seed: int = 0) -> Labelled:
        """Quantile residuals of an observed site at the estimate, see `symhmm.posterior.residuals.residuals`."""
        found = residuals.residuals(self.density, self.values, site, seed=seed)
        return named(found, self.data, *self._frames(), self.states)

    def residual_summary(self, site: str, *, seed: int = 0) -> Table:
        """Normality and autocorrelation of the residuals of each member, see `symhmm.posterior.residuals.describe_members`."""
        return residuals.describe_members(self.residuals(site, seed=seed))

    def log_likelihood_by(self, *frames: str) -> Labelled:
        """Log-likelihood by member of plates or step, see `symhmm.posterior.pointwise.log_likelihood_by`."""
        found = pointwise.log_likelihood_by(self.density, self.values, *frames)
        return named(found, self.data, *self._frames(), self.states)

    def symmetry(self, site: str | None = None) -> Symmetry:
        """Which values number the states, see `symhmm.posterior.align.symmetry`."""
        return align.symmetry(self.density, site)

    def in_one_order(self, draws: Mapping[str, Tensor], by: str | None = None) -> dict[str, Tensor]:
        """Draws, shape (draws, *shape) each, with their states matched; as they are where the states are not alike.

        Raises:
            GraphError: ``by`` is given and the states cannot be moved.
        """
        try:
            found = self.symmetry()
        except GraphError:
            if by is not None:
                raise
            return dict(draws)
        return dict(align.aligned(draws, found, by).draws)

    def to_arviz(
        self,
        *,
        by: str | Sequence[str] | None = None,
        order_by: str | None = None,
        draws: int = 500,
        predictive: int = 0,
        seed: int = 0,
    ) -> Any:
        """Posterior draws, pointwise log-likelihoods and data for ArviZ, see `symhmm.posterior.inference_data`.

        Args:
            by: plates whose members ``az.loo`` and ``az.waic`` leave out; the plates of all observed sites if None.
            order_by: a value with one number per state that numbers the states, ``order_by="loc"``.
            draws: of a normal posterior; a sampler's are all taken.
            predictive: data sets to simulate.
            seed: of the simulation.

        Raises:
            FitError: the fit is a point and has no posterior.
            GraphError: ``by`` has a time axis or hidden states, or ``order_by`` does not number states.
        """
        found = self.drawn_chains(draws)
        try:
            order = self.symmetry()
        except GraphError:
            if order_by is not None:
                raise
            order = None
        ids: dict[str, Sequence[Any]] = {}
        for plate, x in self.density.graph.plates.items():
            empty = Labelled(plate, torch.zeros(x.size), (plate,))
            ids |= named(empty, self.data, *self._frames(), self.states).labels
        if self.states:
            ids |= dict.fromkeys(("state", "from_state", "to_state"), self.states)
        return inference_data.inference_data(
            self.density, found, by=by, order=order, order_by=order_by, predictive=predictive, seed=seed, labels=ids
        )

    def _averaged(self, ask: Callable[[Mapping[str, Tensor]], Answers], draws: int, steps: bool = True) -> Answers:
        return self._named(_combined([ask(v) for v in self.drawn(draws)], lambda x: torch.stack(x).mean(0)), steps)

    def _named(self, answers: Answers, steps: bool = True) -> Answers:
        """With the names of the data; ``steps`` of a forecast are after the data, and have no times there."""
        plates, axes = self._frames()
        return named_all(answers, self.data, plates, axes if steps else (), self.states_of)

    def _frames(self) -> tuple[dict[str, int | None], tuple[str, ...]]:
        graph = self.density.graph
        return {n: p.dim for n, p in graph.plates.items()}, tuple({**graph.chains, **graph.loops})


def _combined(found: list[Answers], how: Callable[[list[Tensor]], Tensor]) -> Answers:
    """Several answers to one question as one."""
    if len(found) == 1:
        return found[0]
    items: dict[str, Any] = {}
    for n, x in found[0].items():
        values = how([f[n].values for f in found])
        kept = {d: v for d, v in x.labels.items() if len(v) == values.shape[x.dims.index(d)]}
        items[n] = replace(x, values=values, labels=kept)
    return replace(found[0], items_=items)
