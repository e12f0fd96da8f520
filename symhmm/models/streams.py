"""Streams of any family, state by state: their lines in a program, and starting values from clustered observations."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import DataError, SpecError
from symhmm.models.base import Start
from symhmm.models.clusters import CIRCULAR, kmeans, means, numbered, ranks
from symhmm.models.emissions import Family, Parameter, family
from symhmm.tables.data import SequenceData

CONSTRAINTS = {
    "identity": "",
    "log": ", constraints.positive",
    "logit": ", constraints.unit_interval",
    "softmax": ", constraints.simplex",
}


@dataclass(frozen=True)
class Streams:
    """Families of streams whose parameters have one value per state; angles have their mean direction held at 0.

    Args:
        families: stream and family.
    """

    families: tuple[tuple[str, Family], ...]

    @classmethod
    def of(cls, emissions: Mapping[str, str]) -> "Streams":
        """From names of families. Raises `SpecError` for an unknown one, or none at all."""
        if not isinstance(emissions, Mapping) or not emissions:
            raise SpecError("there are no emissions.", suggestion='emissions={"step": "gamma"}')
        return cls(tuple((s, family(name, s)) for s, name in emissions.items()))

    @property
    def names(self) -> tuple[str, ...]:
        """The streams."""
        return tuple(s for s, _ in self.families)

    def parameters(self) -> list[str]:
        """Lines that declare the parameters, one value per state each."""
        return [
            f'{variable(s, p.name)} = pyro.param("{s}.{p.name}", start["{s}.{p.name}"]{CONSTRAINTS[p.link]})'
            for s, f in self.families
            for p in free(f)
        ]

    def observations(self, state: str = "z", step: bool = True) -> list[str]:
        """Lines that observe all streams: those of step t, or all steps at once where ``step`` is False."""
        at, suffix, mark = ("[t]", "_{t}", "f") if step else ("", "", "")
        lines = []
        for s, f in self.families:
            values = {p.name: "0.0" for p in f.parameters} | {
                p.name: f"{variable(s, p.name)}[{state}]" for p in free(f)
            }
            lines += [
                f'with pyro.poutine.mask(mask=data.observed["{s}"]{at}):',
                f'    pyro.sample({mark}"{s}{suffix}", {f.text.format(**values)}, obs=data["{s}"]{at})',
            ]
        return lines

    def check(self, data: SequenceData) -> None:
        """Raise `DataError` if a stream is not there, has no observation, or is of vectors."""
        for s in self.names:
            if s not in data.streams:
                raise DataError(
                    f"the data have no stream {s!r}.",
                    details=[f"streams: {', '.join(data.streams)}"],
                    suggestion="name it in streams= when the table is read",
                )
            if not bool(data.observed[s].any()):
                raise DataError(f"stream {s!r} is missing everywhere.", suggestion="leave it out of the model")
            if data[s].dim() != data.mask.dim():
                raise DataError(f"stream {s!r} is of vectors.", suggestion="one stream for each of its numbers")

    def clustered(self, data: SequenceData, number: int, seed: int = 0) -> Tensor:
        """Labels of cells by k-means on ranks of the streams, shape of the mask; -1 where nothing was observed.

        A missing value counts as a middling one; angles count by their cosine. Clusters are numbered by the first stream.
        """
        self.check(data)
        where = torch.stack([data.observed[s] for s in self.names]).any(0)
        columns = []
        for s, f in self.families:
            y = data[s][where].double().numpy().copy()
            y[~data.observed[s][where].numpy()] = np.nan
            columns.append(ranks(y, f.name))
        x = np.stack(columns, 1)
        label = kmeans(x, number, seed)
        label = numbered(label, means(x[:, 0], label, number))
        out = torch.full(where.shape, -1)
        out[where] = torch.as_tensor(label, dtype=torch.long)
        return out

    def start(self, data: SequenceData, label: Tensor, number: int) -> Start:
        """Each family's starting values within each cluster; ``label`` is as from `clustered`."""
        out: Start = {}
        for s, f in self.families:
            seen = data.observed[s]
            everywhere = data[s][seen].double().numpy()
            groups = [data[s][seen & (label == k)].double().numpy() for k in range(number)]
            groups = [g if len(g) > 2 else everywhere for g in groups]
            if any(p.link == "softmax" for p in f.parameters):
                levels = int(everywhere.max()) + 1
                counts = torch.tensor([[float((g == v).sum()) + 0.5 for v in range(levels)] for g in groups])
                out[f"{s}.{f.parameters[0].name}"] = (counts / counts.sum(-1, keepdim=True)).to(data.dtype)
                continue
            values = [f.start(g) for g in groups]
            for i, p in enumerate(f.parameters):
                if p in free(f):
                    out[f"{s}.{p.name}"] = torch.tensor([v[i] for v in values], dtype=data.dtype)
        return out


def free(f: Family) -> tuple[Parameter, ...]:
    """The parameters of a family that are fitted."""
    return tuple(p for p in f.parameters if f.name not in CIRCULAR or p.name != "mean")


def variable(stream: str, parameter: str) -> str:
    """A name for Python: ``step_mean``.

    >>> variable("dive.dur", "shape")
    'dive_dur_shape'
    """
    name = re.sub(r"\W", "_", f"{stream}_{parameter}")
    return f"_{name}" if name[0].isdigit() else name
