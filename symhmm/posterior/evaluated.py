"""What every query starts from: a density's factor graph at values, and results put back into loops and plates."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from symhmm.compiler.density import Compiled, Density
from symhmm.compiler.lower import Named
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.ends import Ends, ends
from symhmm.posterior.series import Loop, Series, loops
from symhmm.tables.states import STATE, Answers, Labelled

Values = Mapping[str, Tensor]


@dataclass(frozen=True)
class Evaluated:
    """A factor graph at values, with its loops and where their sequences end."""

    graph: FactorGraph
    loops: tuple[Loop, ...]
    ends: Ends
    compiled: Compiled

    @property
    def strategy(self) -> str:
        """How chains are contracted."""
        return self.compiled.plan.strategy

    @property
    def variables(self) -> list[str]:
        """Names of the discrete latents, each once: not as seen from later steps."""
        earlier = {n for c in self.graph.chains.values() for v in c.variables for n in v.previous}
        return [n for n in self.graph.variables if n not in earlier]

    @property
    def sites(self) -> dict[str, tuple[Loop, Series] | None]:
        """What answers are given for: a series of a loop, or a variable outside of loops."""
        inside = {n for loop in self.loops for s in loop.series for n in s.names}
        out: dict[str, tuple[Loop, Series] | None] = {s.template: (loop, s) for loop in self.loops for s in loop.series}
        return {**{n: None for n in self.variables if n not in inside}, **out}

    def chosen(self, sites: Iterable[str] | None) -> list[str]:
        """The sites asked for, or all of them.

        Raises:
            GraphError: there is no such discrete latent, or none at all.
        """
        known = self.sites
        if not known:
            raise GraphError(
                "the program has no discrete latents to ask about.",
                suggestion="density.roles() shows what it has; discrete sites with obs= are data",
            )
        wanted = list(known) if sites is None else [sites] if isinstance(sites, str) else list(sites)
        for n in wanted:
            if n not in known:
                raise GraphError(f"there is no discrete latent {n!r}.", details=[f"known: {', '.join(known)}"])
        return wanted

    def names(self, site: str) -> tuple[str, ...]:
        """Variables of the graph that a site stands for, in the order of time."""
        found = self.sites[site]
        return (site,) if found is None else found[1].names

    def plates(self, name: str) -> list[str]:
        """Plates of a variable in the order of Pyro's dimensions, leftmost first."""
        return self.ordered([p for p in self.graph.variables[name].frames if p in self.graph.plates])

    def ordered(self, plates: list[str]) -> list[str]:
        """Plates in the order of Pyro's dimensions, leftmost first."""
        return sorted(plates, key=lambda p: (self.graph.plates[p].dim or 0, plates.index(p)))

    def size(self, frame: str) -> int:
        """Members of a plate or steps of a time axis."""
        return self.graph.plates[frame].size if frame in self.graph.plates else self.graph.chains[frame].length

    def joined(
        self, site: str, parts: Mapping[str, Named], last: tuple[str, ...], first: tuple[str, ...] = ()
    ) -> Labelled:
        """Results of each variable of a site as one, a copy: (*first, time, *plates, *last).

        Args:
            parts: by name of the variable, named by ``first``, its plates, its time axis and ``last``.
        """
        found = self.sites[site]
        if found is None:
            axes = [a for a in self.graph.variables[site].frames if a in self.graph.chains]
            dims = (*first, *axes, *self.plates(site), *last)
            labels = {x.axis: x.labels[x.first :] for x in self.loops if x.axis in axes}
            return Labelled(site, parts[site].aligned(dims).clone(), dims, labels)
        loop, series = found
        plates = self.plates(series.names[-1])
        axis = loop.axis
        rows = [parts[name].aligned([*first, axis, *plates, *last]) for name in series.names if name in parts]
        values = torch.cat(rows, len(first))
        start = len(loop.labels) - values.shape[len(first)]
        mask = self.ends.steps(loop, frozenset(plates))
        valid = None
        if mask is not None:
            valid = mask.aligned([axis, *plates])[start:].expand([-1, *(self.size(p) for p in plates)])
        return Labelled(series.template, values, (*first, axis, *plates, *last), {axis: loop.labels[start:]}, valid)

    def answers(self, what: str, sites: Iterable[str], make: Callable[[str], Labelled]) -> Answers:
        """One answer per site, states labelled by the values they stand for."""
        out = {}
        for site in sites:
            answer = make(site)
            support = self.graph.variables[self.names(site)[-1]].support
            if STATE in answer.dims and support is not None and support.dim() == 1:
                answer = answer.relabelled({STATE: support.tolist()})
            out[site] = answer
        return Answers(what, out)


def evaluated(density: Density, values: Values) -> Evaluated:
    """The graph of a density at constrained values, without derivatives.

    Raises:
        ValuesError: values are missing, unknown or of the wrong shape, as those of a fit to other data are.
    """
    with torch.no_grad():
        graph = density.factors_at(values)
    found = density.compiled.once("loops", lambda: tuple(loops(graph)))
    return Evaluated(graph, found, ends(graph, found), density.compiled)
