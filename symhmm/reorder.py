"""Reordered: the states of an estimate moved, in its values and in its posterior, without fitting again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry
from symhmm.errors import FitError
from symhmm.infer.draws import Draws
from symhmm.posterior.align import Symmetry, site_of
from symhmm.tables.results import Drawable, Estimate, Posterior

Move = Callable[[Tensor], Tensor]
MANY = 1000  # draws that tell the spread of what has no formula


@dataclass(frozen=True, eq=False)
class Moved:
    """A posterior whose states have moved in coordinates that do not move by themselves, as those of a simplex.

    Args:
        of: the posterior before; draws are its draws, moved.
        vector: points and middles after the move, shape (size,).
        move: from unconstrained vectors (draws, size) to moved ones.
    """

    of: Drawable
    vector: Tensor
    move: Move
    blocks: tuple[()] = ()

    @cached_property
    def sd(self) -> Tensor:
        """Standard deviation of each unconstrained coordinate over many draws, shape (size,); zero for points."""
        return self.sample(MANY).std(0)

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Unconstrained vectors, shape (draws, size); the same for the same seed."""
        return self.move(self.of.sample(draws, seed))

    def permuted(self, source: Tensor) -> "Moved":
        """The same posterior with coordinate ``source[i]`` as number i."""
        return Moved(self.of, self.vector[source], lambda x: self.move(x)[..., source])

    def __repr__(self) -> str:
        return f"Moved({type(self.of).__name__}, {len(self.vector)} coordinates)"


def ordered(estimate: Estimate, density: Density, found: Symmetry, order: Tensor) -> Estimate:
    """The estimate with state ``order[k]`` as number k; the density does not tell one order from another.

    Args:
        found: which values number the states (`symhmm.posterior.align.symmetry`). It raises GraphError where states cannot be
            moved without changing the density.

    Raises:
        FitError: one of the values that would move was fitted with ``tie=`` or ``order=``.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model(y):
    ...     mean = pyro.param("mean", torch.tensor([5.0, 1.0]))
    ...     with pyro.plate("n", len(y)):
    ...         pyro.sample("y", dist.Normal(mean[pyro.sample("z", dist.Categorical(torch.ones(2)))], 1.0), obs=y)
    >>> symhmm.fit(model, torch.tensor([0.0, 1.0, 5.0, 6.0])).ordered(by="mean").values["mean"].round()
    tensor([1., 5.])
    """
    if order.tolist() == list(range(found.size)):
        return estimate
    return reordered(estimate, density, {n: partial(_along, dims, order) for n, dims in found.dims.items()})


def called(density: Density, names: Sequence[str], site: str | None = None) -> dict[str, tuple[str, ...]]:
    """Names of the states of a discrete latent, by its site.

    Raises:
        GraphError: there is no such latent, or there are several.
        FitError: not as many different names as states.
    """
    at, size = site_of(density, site)
    if len(names) != size or len(set(names)) != size:
        raise FitError(
            f"{at!r} has {size} states, and needs a name of its own for each.",
            details=[f"seen: {', '.join(names) or 'none'}"],
            suggestion=f"with_states({', '.join(repr(f'state {k}') for k in range(size))})",
        )
    return {at: tuple(names)}


def reordered(estimate: Estimate, density: Density, moves: Mapping[str, Move]) -> Estimate:
    """The estimate with states moved.

    Args:
        moves: by name of each value that numbers states, from the constrained value to the moved one.

    Raises:
        FitError: one of these was held equal to another or increasing, and would be no more.
    """
    held = {t.partition("[")[0] for group in estimate.tie for t in group} | {n for n, _ in estimate.order}
    for name in moves:
        if name in held:
            raise FitError(
                f"{name!r} was fitted with tie= or order=, which says what its numbers mean; its states cannot be moved.",
                suggestion="fit without tie= and order= for this value, then ordered(by=...)",
            )
    values = {n: moves[n](x) if n in moves else x for n, x in estimate.values.items()}
    vector = density.pack(values)
    posterior = estimate.posterior
    if posterior is not None:
        posterior = _posterior(posterior, vector, [e for e in density.layout.entries if e.name in moves], moves)
    return replace(estimate, values=values, vector=vector, posterior=posterior)


def _posterior(posterior: Drawable, vector: Tensor, entries: list[Entry], moves: Mapping[str, Move]) -> Drawable:
    def move(x: Tensor) -> Tensor:
        out = x.clone()
        for e in entries:
            value = e.transform(x[:, e.start : e.stop].reshape(-1, *e.free_shape))
            new = e.transform.inv(torch.vmap(moves[e.name])(value))
            out[:, e.start : e.stop] = new.reshape(len(x), -1)
        return out

    if isinstance(posterior, Draws):
        return replace(posterior, chains=move(posterior.all).reshape(posterior.chains.shape))
    if isinstance(posterior, Posterior):
        # Normal blocks stay normal if their coordinates are only exchanged; points are whatever the values say.
        source, points = torch.arange(len(vector)), posterior.sd == 0
        found = {e.name: _exchange(e, moves[e.name]) for e in entries}
        if all(found[e.name] is not None or bool(points[e.start : e.stop].all()) for e in entries):
            for e in entries:
                own = found[e.name]
                if own is not None:
                    source[e.start : e.stop] = e.start + own
            new = posterior.permuted(source)
            at = torch.cat([torch.arange(e.start, e.stop) for e in entries if found[e.name] is None] or [source[:0]])
            return replace(new, vector=new.vector.index_copy(0, at, vector[at].to(new.vector.dtype)))
    return Moved(posterior, vector, move)


def _along(dims: Sequence[int], order: Tensor, x: Tensor) -> Tensor:
    for d in dims:
        x = x.index_select(d, order)
    return x


def _exchange(e: Entry, move: Move) -> Tensor | None:
    """Which unconstrained coordinate of an entry becomes each one; None if a move does not just exchange them."""
    size = e.stop - e.start
    marks = torch.linspace(-1.0, 1.0, size, dtype=torch.float64)
    found = e.transform.inv(move(e.transform(marks.reshape(e.free_shape)))).reshape(-1)
    source = ((found + 1) * (max(size - 1, 1) / 2)).round().long().clamp(0, size - 1)
    apart = 0.01 * 2 / max(size, 2)
    return source if bool(((marks[source] - found).abs() < apart).all()) else None
