"""Answers about states: tensors whose dimensions have names and whose members have labels."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.errors import DataError

STATE = "state"


@dataclass(frozen=True, eq=False)
class Labelled:
    """A tensor with named dimensions and a label for each member of each.

    Args:
        name: what it is about; a site of the program, ``z_{time}`` for all steps of a loop.
        values: one dimension per name in ``dims``.
        dims: names: time axes, plates, ``state``, ``draw``.
        labels: for each dimension its members' labels.
        valid: broadcasts with ``values`` (without its last dimensions that are states); False after the last observation
            of a member's sequence. None where all are.
        along: further columns of `to_frame` by name, such as times: the dimensions they run over, and an array of these.
        backend: kind of data frame that `to_frame` makes unless asked for another.

    >>> p = Labelled("z", torch.tensor([[0.9, 0.1], [0.2, 0.8]]), ("animal", "state"), {"animal": ("ann", "bo")})
    >>> p.sel(animal="bo").values
    tensor([0.2000, 0.8000])
    """

    name: str
    values: Tensor
    dims: tuple[str, ...]
    labels: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    valid: Tensor | None = None
    along: Mapping[str, tuple[tuple[str, ...], np.ndarray]] = field(default_factory=dict)
    backend: str = "pandas"

    def __post_init__(self) -> None:
        full = {d: tuple(self.labels.get(d, range(n))) for d, n in zip(self.dims, self.values.shape, strict=True)}
        for d, n in zip(self.dims, self.values.shape, strict=True):
            if len(full[d]) != n:
                raise DataError(
                    f"the labels of {d!r} do not fit {self.name!r}.", details=[f"seen {len(full[d])}, wanted {n}"]
                )
        object.__setattr__(self, "labels", full)

    def sel(self, **wanted: Any) -> "Labelled":
        """One member of each given dimension, by its label.

        Raises:
            DataError: there is no such dimension or label.
        """
        out = self
        for dim, label in wanted.items():
            if dim not in out.dims:
                raise DataError(
                    f"{self.name!r} has no dimension {dim!r}.", details=[f"dimensions: {', '.join(out.dims)}"]
                )
            known = out.labels[dim]
            if label not in known:
                shown = ", ".join(map(repr, known[:8])) + (", ..." if len(known) > 8 else "")
                raise DataError(f"there is no {dim} {label!r}.", details=[f"known: {shown}"])
            place, index = out.dims.index(dim), known.index(label)
            valid = out.valid
            if valid is not None and place < valid.dim():
                valid = valid.select(place, index)
            out = replace(
                out,
                values=out.values.select(place, index),
                dims=tuple(d for d in out.dims if d != dim),
                labels={d: x for d, x in out.labels.items() if d != dim},
                valid=valid,
                along={n: _selected(x, dim, index) for n, x in out.along.items()},
            )
        return out

    def relabelled(self, labels: Mapping[str, Sequence[Any]]) -> "Labelled":
        """The same with other labels for the dimensions that it has among ``labels``."""
        mine = {d: tuple(x) for d, x in labels.items() if d in self.dims}
        return replace(self, labels={**self.labels, **mine})

    def reordered(self, order: Tensor) -> "Labelled":
        """The same with the states in another order: entry k of ``order`` is the state that becomes number k."""
        size = len(order)
        if sorted(order.tolist()) != list(range(size)):
            raise DataError(f"{order.tolist()} is no order of the states of {self.name!r}.")
        values = self.values
        over = [i for i, d in enumerate(self.dims) if d in (STATE, "from", "to")]
        for i in over:
            if values.shape[i] != size:
                raise DataError(f"{self.name!r} has {values.shape[i]} states, the order has {size}.")
            values = values.index_select(i, order)
        if not over:
            # Numbers of states; -1, where there is none, stays.
            new = torch.cat([order.argsort(), torch.tensor([-1])]).to(values.dtype)
            values = new[values.long()]
        labels = {d: x for d, x in self.labels.items() if d not in (STATE, "from", "to")}
        return replace(self, values=values, labels=labels)

    def summary(self) -> "Labelled":
        """Mean, standard deviation and quantiles over the dimension ``draw``, which ``statistic`` replaces, in the last place.

        Raises:
            DataError: there are no draws.

        >>> x = Labelled("y", torch.arange(5.0)[:, None], ("draw", "animal"), {"animal": ("bo",)})
        >>> x.summary().sel(animal="bo", statistic="50%").values
        tensor(2.)
        """
        if "draw" not in self.dims:
            raise DataError(
                f"{self.name!r} has no draws to summarise.", details=[f"dimensions: {', '.join(self.dims)}"]
            )
        place = self.dims.index("draw")
        x = self.values if self.values.is_floating_point() else self.values.to(torch.get_default_dtype())
        levels = torch.tensor([0.025, 0.5, 0.975], dtype=x.dtype)
        rows = [x.mean(place), x.std(place), *x.quantile(levels, place)]
        dims = tuple(d for d in self.dims if d != "draw")
        labels = {d: self.labels[d] for d in dims} | {"statistic": ("mean", "sd", "2.5%", "50%", "97.5%")}
        return Labelled(self.name, torch.stack(rows, -1), (*dims, "statistic"), labels)

    def to_frame(self, backend: str | None = None) -> Any:
        """One row per member that is valid: a column per dimension, then ``value``, or one column per state.

        Steps are numbered, and have their times beside the number where the data had times.

        Args:
            backend: ``pandas``, ``polars`` or ``pyarrow``; None takes the kind of the data.
        """
        wide = self.dims[-1:] == (STATE,)
        rows = self.dims[:-1] if wide else self.dims
        shape = self.values.shape[: len(rows)]
        keep = torch.ones(shape, dtype=torch.bool)
        if self.valid is not None:
            keep = keep & self.valid.reshape(self.valid.shape + (1,) * (len(shape) - self.valid.dim()))
        index = keep.nonzero()
        columns: dict[str, Any] = {d: [self.labels[d][i] for i in index[:, k].tolist()] for k, d in enumerate(rows)}
        for name, (dims, array) in self.along.items():
            columns[name] = array[tuple(index[:, rows.index(d)].numpy() for d in dims)]
        picked = self.values[keep]
        if wide:
            columns |= {f"{STATE} {x}": picked[:, k].tolist() for k, x in enumerate(self.labels[STATE])}
        else:
            columns["value"] = picked.tolist()
        return native_frame(columns, backend or self.backend)

    def __repr__(self) -> str:
        shape = ", ".join(f"{d}: {n}" for d, n in zip(self.dims, self.values.shape, strict=True))
        ended = "" if self.valid is None else f", {int((~self.valid).sum())} steps of padding"
        return f"{self.name} ({shape}{ended})\n{self.values}"


@dataclass(frozen=True, eq=False)
class Answers(Mapping[str, Labelled]):
    """One answer per site; a mapping, with the only one at hand as ``only``."""

    what: str
    items_: Mapping[str, Labelled]
    log_prob: Tensor | None = None

    def __getitem__(self, site: str) -> Labelled:
        if site not in self.items_:
            raise DataError(
                f"there is no {self.what} of {site!r}.", details=[f"known: {', '.join(self.items_) or 'none'}"]
            )
        return self.items_[site]

    def __contains__(self, site: object) -> bool:
        return site in self.items_

    def __iter__(self) -> Iterator[str]:
        return iter(self.items_)

    def __len__(self) -> int:
        return len(self.items_)

    @property
    def only(self) -> Labelled:
        """The answer, where there is just one.

        Raises:
            DataError: there are several; name one.
        """
        if len(self.items_) != 1:
            raise DataError(
                f"there are {len(self.items_)} answers.", details=[", ".join(self.items_)], suggestion="answers[site]"
            )
        return next(iter(self.items_.values()))

    def reordered(self, site: str, order: Tensor) -> "Answers":
        """The same with the states of a site in another order.

        Args:
            order: shape (K,), entry k is the state that becomes number k (`symhmm.posterior.align`).

        Raises:
            DataError: ``order`` is no order of the states.
        """
        return replace(self, items_={**self.items_, site: self[site].reordered(order)})

    def relabelled(self, labels: Mapping[str, Sequence[Any]]) -> "Answers":
        """The same with the user's own labels, ``{"animal": ids}``.

        Raises:
            DataError: no answer has such a dimension, or the number of labels is wrong.
        """
        known = {d for x in self.items_.values() for d in x.dims}
        for dim in labels:
            if dim not in known:
                raise DataError(f"no answer has a dimension {dim!r}.", details=[f"known: {', '.join(sorted(known))}"])
        return replace(self, items_={n: x.relabelled(labels) for n, x in self.items_.items()})

    def __repr__(self) -> str:
        rows = [f"  {n}: {', '.join(f'{d} {s}' for d, s in zip(x.dims, x.values.shape, strict=True))}"
                for n, x in self.items_.items()]  # fmt: skip
        score = "" if self.log_prob is None else f", log-density {self.log_prob.max():.4f} nats"
        return "\n".join([f"{self.what}{score}", *rows])


def _selected(column: tuple[tuple[str, ...], np.ndarray], dim: str, index: int) -> tuple[tuple[str, ...], np.ndarray]:
    dims, array = column
    if dim not in dims:
        return column
    place = dims.index(dim)
    return (*dims[:place], *dims[place + 1 :]), np.asarray(array.take(index, place))


def native_frame(columns: Mapping[str, Any], backend: str = "pandas") -> Any:
    """Columns as a data frame of pandas or polars, or a table of Arrow (``pyarrow``).

    Raises:
        DataError: there is no such kind.
    """
    if backend == "pandas":
        import pandas

        return pandas.DataFrame(columns)
    if backend == "polars":
        import polars

        return polars.DataFrame(columns)
    if backend == "pyarrow":
        import pyarrow

        return pyarrow.table(dict(columns))
    raise DataError(f"unknown kind of data frame {backend!r}.", suggestion="'pandas', 'polars' or 'pyarrow'")
