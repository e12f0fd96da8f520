"""Hidden Markov models of vectors: a multivariate normal distribution per state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from symhmm.errors import SpecError
from symhmm.models.base import Initial, Model, Program, Start, as_data, assembled, first_state, sticky, whole_number
from symhmm.models.streams import Streams
from symhmm.tables.data import SequenceData

COVARIANCES = ("full", "diagonal", "shared")


@dataclass(frozen=True)
class GaussianHMM(Model):
    """Hidden Markov model of D streams that are jointly normal given the state.

    Args:
        states: K.
        streams: names of the D streams, or of one.
        covariance: ``full`` (a matrix per state), ``diagonal`` (streams independent given the state), or ``shared`` (one
            full matrix for all states).
        initial: ``stationary``, ``uniform``, ``free``, or K probabilities.

    Raises:
        SpecError: no such number of states, covariance or initial state.

    Missing values: each stream has its own mask under ``diagonal``. Under ``full`` and ``shared`` a step of which a part is
    missing counts with the marginal density of the rest.

    >>> print(GaussianHMM(2, ["x", "y"]).program_source().splitlines()[-1].strip())
    pyro.sample(f"y_{t}", PartlyObservedNormal(mean[z], scale_tril[z], seen[t]), obs=y[t])
    """

    states: int
    streams: str | Sequence[str]
    covariance: Literal["full", "diagonal", "shared"] = "full"
    initial: Initial = "stationary"

    def __post_init__(self) -> None:
        whole_number("states", self.states, 1)
        first_state(self.initial, self.states)
        if self.covariance not in COVARIANCES:
            raise SpecError(
                f"there is no covariance {self.covariance!r}.", suggestion=" or ".join(map(repr, COVARIANCES))
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The D streams."""
        return (self.streams,) if isinstance(self.streams, str) else tuple(self.streams)

    @property
    def correlated(self) -> bool:
        """Whether streams may be correlated given the state."""
        return self.covariance != "diagonal" and len(self.names) > 1

    @property
    def program(self) -> Program:
        """``mean`` and ``sd`` (K, D), ``corr`` (K, D, D), Cholesky factors of correlations; ``transition`` [from, to].

        Under ``shared`` the latter two have no dimension for states; without correlations there is no ``corr``.
        """
        shared = self.covariance == "shared"
        head = ['sd = pyro.param("sd", start["sd"], constraints.positive)']
        if self.correlated:
            head += [
                'corr = pyro.param("corr", start["corr"], constraints.corr_cholesky)  # of correlations',
                "scale_tril = sd[..., None] * corr  # covariance: scale_tril @ scale_tril.mT",
                "y = torch.stack([{}], -1)".format(", ".join(f'data["{n}"]' for n in self.names)),
                "seen = torch.stack([{}], -1)".format(", ".join(f'data.observed["{n}"]' for n in self.names)),
            ]
            tril = "scale_tril" if shared else "scale_tril[z]"
            emission = [f'pyro.sample(f"y_{{t}}", PartlyObservedNormal(mean[z], {tril}, seen[t]), obs=y[t])']
        else:
            emission = []
            for d, name in enumerate(self.names):
                sd = f"sd[{d}]" if shared else f"sd[z, {d}]"
                emission += [
                    f'with pyro.poutine.mask(mask=data.observed["{name}"][t]):',
                    f'    pyro.sample(f"{name}_{{t}}", dist.Normal(mean[z, {d}], {sd}), obs=data["{name}"][t])',
                ]
        return assembled(
            [
                'mean = pyro.param("mean", start["mean"])  # [state, stream]',
                *head,
                'transition = pyro.param("transition", start["transition"], constraints.simplex)  # [from, to]',
                first_state(self.initial, self.states),
                "with sequence_plates(data):",
                "    z = None",
                "    for t in pyro.markov(range(data.num_steps)):",
                '        z = pyro.sample(f"z_{t}", dist.Categorical(first if z is None else transition[z]))',
                *("        " + line for line in emission),
            ]
        )

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Moments of clusters of steps; states that stay with probability 0.8."""
        streams = Streams.of(dict.fromkeys(self.names, "gaussian"))
        label = streams.clustered(as_data(data), self.states, seed)
        y = torch.stack([data[n] for n in self.names], -1)
        seen = torch.stack([data.observed[n] for n in self.names], -1)
        middle = torch.stack([data[n][data.observed[n]].mean() for n in self.names])
        rows = torch.where(seen, y, middle)[label >= 0]
        groups = [rows[label[label >= 0] == k] for k in range(self.states)]
        d = len(self.names)
        groups = [g if len(g) > d + 1 else rows for g in groups]
        # A tenth of the overall variance keeps a cluster that lies in a plane from starting at a density without bound.
        floor = 0.1 * rows.var(0).clamp_min(1e-12)
        covariances = torch.stack([g.T.cov().reshape(d, d) + floor.diag() for g in groups])
        out = {"mean": torch.stack([g.mean(0) for g in groups]), "transition": sticky(self.states, data.dtype)}
        if self.covariance == "shared":
            covariances = covariances.mean(0)
        out["sd"] = covariances.diagonal(dim1=-2, dim2=-1).sqrt()
        if self.correlated:
            out["corr"] = torch.linalg.cholesky(covariances) / out["sd"].unsqueeze(-1)
        if self.initial == "free":
            out["initial"] = torch.full((self.states,), 1 / self.states, dtype=data.dtype)
        return out
