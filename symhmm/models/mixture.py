"""Mixtures without time: individuals of several components, and latent classes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from symhmm import fitting
from symhmm.fitting import Fit
from symhmm.models.base import Model, Program, Start, as_data, assembled, whole_number
from symhmm.models.streams import Streams
from symhmm.tables.data import SequenceData

SCREENED = 20  # k-means seeds tried by their likelihood


@dataclass(frozen=True)
class Mixture(Model):
    """Finite mixture: each individual belongs to one of C components, and all its rows are drawn from that component.

    With one row per individual this is the usual mixture model. Streams are independent given the component, of which the
    sum is exact.

    Args:
        components: C.
        emissions: family of each stream, ``{"length": "gaussian"}``; angles are around 0.

    Raises:
        SpecError: no such number of components, or an unknown family.

    >>> y = torch.tensor([[-2.1, -1.9, -2.0, 1.9, 2.1, 2.0, 2.05, -1.95]], dtype=torch.float64)
    >>> fit = Mixture(2, {"y": "gaussian"}).fit(SequenceData.from_tensors({"y": y}))
    >>> fit.viterbi()["component"].values
    tensor([0, 0, 0, 1, 1, 1, 1, 0])
    """

    components: int
    emissions: Mapping[str, str]

    def __post_init__(self) -> None:
        whole_number("components", self.components, 1)
        Streams.of(self.emissions)

    @property
    def _streams(self) -> Streams:
        return Streams.of(self.emissions)

    @property
    def program(self) -> Program:
        """Parameters ``<stream>.<parameter>`` by component, and ``weights`` (C,)."""
        return assembled(
            [
                *self._streams.parameters(),
                'weights = pyro.param("weights", start["weights"], constraints.simplex)',
                'with pyro.plate("individual", data.num_sequences, dim=-1):',
                '    component = pyro.sample("component", dist.Categorical(weights))',
                'with sequence_plates(data), pyro.plate("row", data.num_steps, dim=-data.mask.dim()):',
                *("    " + line for line in self._streams.observations("component", step=False)),
            ]
        )

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Moments of clusters of rows, all clusters alike in size."""
        label = self._streams.clustered(as_data(data), self.components, seed)
        weights = torch.full((self.components,), 1 / self.components, dtype=data.dtype)
        return self._streams.start(data, label, self.components) | {"weights": weights}

    def fit(self, data: Any, *, method: str = "mle", seed: int = 0, **options: Any) -> Fit:
        """Fit the model from the most likely of several clusterings; see `symhmm.fit` for ``options``."""
        density = self.log_density(data, seed=seed)
        starts = [self.start(data, seed + i) for i in range(SCREENED)]
        with torch.no_grad():
            best = max(starts, key=lambda s: density.log_prob(s).nan_to_num(-torch.inf).item())
        options.setdefault("start", best)
        return fitting.fit(density, method=method, seed=seed, **options)


@dataclass(frozen=True)
class LatentClass(Model):
    """Latent class analysis: individuals of C classes answer several questions, independently given their class.

    Args:
        classes: C.
        streams: names of the questions, with answers 0 and 1, or codes 0, 1, ... of levels; or a mapping to
            ``"bernoulli"`` and ``"categorical"`` (by default 0 and 1).

    Raises:
        SpecError: no such number of classes, or an unknown family.

    >>> LatentClass(2, ["d1", "d2"])
    LatentClass(classes=2, streams=['d1', 'd2'])
    """

    classes: int
    streams: Sequence[str] | Mapping[str, str]

    def __post_init__(self) -> None:
        whole_number("classes", self.classes, 1)
        _ = self._mixture

    @property
    def _mixture(self) -> Mixture:
        named = isinstance(self.streams, Mapping)
        return Mixture(self.classes, dict(self.streams) if named else dict.fromkeys(self.streams, "bernoulli"))  # type: ignore[arg-type]

    @property
    def program(self) -> Program:
        """That of `Mixture`."""
        return self._mixture.program

    def start(self, data: SequenceData, seed: int = 0) -> Start:
        """Answers of clusters of individuals."""
        return self._mixture.start(data, seed)

    def fit(self, data: Any, *, method: str = "mle", seed: int = 0, **options: Any) -> Fit:
        """As `Mixture.fit`."""
        return self._mixture.fit(data, method=method, seed=seed, **options)
