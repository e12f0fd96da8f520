"""Layout: named constrained values on one side, one unconstrained vector on the other."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import StickBreakingTransform, Transform
from torch.nn.functional import pad, softplus

from symhmm.errors import ProgramError, ValuesError
from symhmm.graph import FactorGraph

MOST_SUMS = 64  # states of a simplex whose cumulative sums are made by a matrix product


@dataclass(frozen=True)
class Entry:
    """Where one parameter or continuous latent lives in the vector.

    Args:
        shape: of the constrained value; ``free_shape`` of the unconstrained one (a simplex of K has K - 1 free numbers).
        start, stop: its slice of the vector.
        plates: plates of a random effect and their batch dimensions; empty for fixed effects.
    """

    name: str
    is_param: bool
    shape: tuple[int, ...]
    free_shape: tuple[int, ...]
    start: int
    stop: int
    transform: Transform
    constraint: Constraint
    plates: Mapping[str, int]
    dtype: torch.dtype

    @property
    def role(self) -> str:
        """The role in words, read off the program."""
        if self.is_param:
            return "fixed effect"
        return f"random effect of {', '.join(self.plates)}" if self.plates else "fixed effect with a prior"


@dataclass(frozen=True)
class Layout:
    """Entries in the order of the vector: parameters first, then continuous latents, as the program meets them."""

    entries: tuple[Entry, ...]
    size: int
    dtype: torch.dtype

    def __getitem__(self, name: str) -> Entry:
        for e in self.entries:
            if e.name == name:
                return e
        raise ValuesError(f"there is no value {name!r}.", details=[f"known: {', '.join(e.name for e in self.entries)}"])

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Constrained values, each of its own shape and dtype, differentiable in ``vector`` of shape (size,)."""
        return {e.name: e.transform(free).to(e.dtype) for e, free in self._free(vector)}

    def log_abs_det_jacobian(self, vector: Tensor) -> Tensor:
        """Log volume change of the continuous latents (not of the parameters), nats, shape ().

        Adding it to the log-density gives the density of the unconstrained latents (Stan's change of variables).

        Raises:
            ProgramError: torch does not know the volume of a latent's transformation.
        """
        total = vector.new_zeros(())
        for e, free in self._free(vector):
            if not e.is_param:
                total = total + self._volume(e, free).sum()
        return total

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """One unconstrained vector of shape (size,).

        Raises:
            ValuesError: a name is missing or unknown, a shape is wrong, a value lies outside its support.
        """
        checked = self.check(values)
        free = []
        for e in self.entries:
            value = checked[e.name]
            if not bool(e.constraint.check(value).all()):
                raise ValuesError(
                    f"the value of {e.name!r} is outside its support {e.constraint}.", details=[f"seen {value}"]
                )
            free.append(e.transform.inv(value).reshape(-1).to(self.dtype))
        return torch.cat(free) if free else torch.zeros(0, dtype=self.dtype)

    def check(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values in the order of the entries, as tensors.

        Raises:
            ValuesError: a name is missing or unknown, or a shape is wrong.
        """
        known = [e.name for e in self.entries]
        for wrong, what in ((set(values) - set(known), "unknown"), (set(known) - set(values), "missing")):
            if wrong:
                raise ValuesError(
                    f"{what} value{'s' if len(wrong) > 1 else ''} {', '.join(map(repr, sorted(wrong)))}.",
                    details=[f"wanted {', '.join(known) or 'none'}"],
                    suggestion="start from density.initial() and replace what you need",
                )
        out = {}
        for e in self.entries:
            value = (
                values[e.name] if isinstance(values[e.name], Tensor) else torch.as_tensor(values[e.name], dtype=e.dtype)
            )
            if value.shape != e.shape:
                raise ValuesError(
                    f"the value of {e.name!r} has the wrong shape.",
                    details=[f"seen {tuple(value.shape)}, wanted {e.shape}"],
                )
            out[e.name] = value
        return out

    @staticmethod
    def _volume(e: Entry, free: Tensor) -> Tensor:
        try:
            return e.transform.log_abs_det_jacobian(free, e.transform(free))
        except NotImplementedError as error:
            raise ProgramError(
                f"the density of {e.name!r} on an unconstrained scale is not known: torch has no volume for {e.constraint}.",
                suggestion="dist.LKJCholesky and standard deviations in place of a covariance matrix",
            ) from error

    def _free(self, vector: Tensor) -> Iterator[tuple[Entry, Tensor]]:
        # All at once: the gradient of many slices is a sum of as many vectors.
        parts = vector.split([e.stop - e.start for e in self.entries])
        return ((e, part.reshape(e.free_shape)) for e, part in zip(self.entries, parts, strict=True))


def layout(graph: FactorGraph) -> Layout:
    """The layout of a graph's parameters and continuous latents.

    Raises:
        ProgramError: torch knows no transformation from real numbers to the constraint of a value.
    """
    rows: list[tuple[str, bool, Tensor, Constraint, dict[str, int]]]
    rows = [(n, True, p.value, p.constraint, {}) for n, p in graph.params.items()]
    rows += [(n, False, x.value, x.support, dict(x.plates)) for n, x in graph.latents.items()]
    entries, start = [], 0
    for name, is_param, value, constraint, plates in rows:
        transform = _transform(name, constraint)
        # Shapes of transforms (`inverse_shape`) are worked out in torch by way of sympy, which takes longer to import than this.
        free = tuple(transform.inv(value.detach()).shape)
        stop = start + int(torch.Size(free).numel())
        entries.append(
            Entry(name, is_param, tuple(value.shape), free, start, stop, transform, constraint, plates, value.dtype)
        )
        start = stop
    dtypes = {e.dtype for e in entries} or {torch.get_default_dtype()}
    return Layout(tuple(entries), start, torch.float64 if torch.float64 in dtypes else dtypes.pop())


class Sticks(StickBreakingTransform):
    """Torch's map of K - 1 real numbers to a simplex, by way of logarithms: a quarter of its operations with their derivatives.

    With ``u = log(K - 1, .., 1) - x``, state k gets the share ``sigmoid(-u_k)`` of what the states before it have left, and
    ``-log sigmoid(u) = -log sigmoid(-u) - u``.

    >>> x = torch.tensor([0.3, -2.0, 1.0])
    >>> torch.allclose(Sticks()(x), StickBreakingTransform()(x))
    True
    """

    def _call(self, x: Tensor) -> Tensor:
        free = x.shape[-1]
        u = torch.arange(free, 0, -1, dtype=x.dtype, device=x.device).log() - x
        # -log sigmoid(-u), which torch under that name gives to all its threads however few numbers there are.
        cost = softplus(u, threshold=40)
        if free <= MOST_SUMS:
            # Sums of a few numbers are two small products, whose derivatives are two more.
            ones = torch.ones(free, free + 1, dtype=x.dtype, device=x.device)
            costs = cost @ ones.triu().tril() + (cost - u) @ ones.triu(1)
        else:
            costs = pad(cost, [0, 1]) + pad((cost - u).cumsum(-1), [1, 0])
        # No state is ever impossible, as in torch.
        return (-costs).clamp(min=math.log(torch.finfo(x.dtype).tiny)).exp()


def _transform(name: str, constraint: Constraint) -> Transform:
    if constraint is constraints.simplex:
        return Sticks()
    # Matrices with a triangular factor stand in the second table of torch alone: their maps have an inverse but no volume.
    for table in (biject_to, transform_to):
        try:
            return table(constraint)
        except NotImplementedError:  # how a table says that it has no row for a constraint
            continue
    raise ProgramError(
        f"{name!r} has no unconstrained scale: torch maps no real numbers to {constraint}.",
        suggestion="another constraint, or sum it out as a discrete site",
    )
