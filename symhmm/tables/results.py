"""What drivers return: plain frozen containers that print themselves. Failures are values here, never tracebacks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

LOG_LIKELIHOOD = "log-likelihood"
LOG_POSTERIOR = "log-posterior density"
ELBO = "ELBO (lower bound of the log-likelihood)"
ELBO_EVIDENCE = "ELBO (lower bound of the log-evidence)"
MEAN_LOG_POSTERIOR = "log-posterior density, mean of the draws"
LAPLACE = "log-likelihood (Laplace)"
LAPLACE_POSTERIOR = "log-posterior density (effects by Laplace)"
AVERAGED = 500  # draws over which variances are averaged where no formula gives them


@dataclass(frozen=True)
class Status:
    """How a fit ended.

    Args:
        ok: the numbers can be used as what they claim to be.
        reason: one sentence.
        causes: likely causes, or remarks when ``ok``; sites and parameters by name.
        try_: the next thing to do, empty when there is nothing to do.

    >>> Status(False, "not converged", ("500 evaluations used",), "max_evaluations=2000")
    failed: not converged (500 evaluations used). Try: max_evaluations=2000
    """

    ok: bool
    reason: str
    causes: tuple[str, ...] = ()
    try_: str = ""

    def __repr__(self) -> str:
        causes = f" ({'; '.join(self.causes)})" if self.causes else ""
        return f"{'ok' if self.ok else 'failed'}: {self.reason}{causes}" + (f". Try: {self.try_}" if self.try_ else "")


@dataclass(frozen=True)
class Table:
    """Rows under named columns; prints aligned, ``table["column"]`` is one column as a tuple.

    >>> Table(("name", "estimate"), (("mu", 1.5),))
    name  estimate
    mu         1.5
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def __getitem__(self, column: str) -> tuple[Any, ...]:
        return tuple(row[self.columns.index(column)] for row in self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        body = [[_cell(x) for x in row] for row in self.rows]
        widths = [max(len(r[i]) for r in [list(self.columns), *body]) for i in range(len(self.columns))]
        right = [any(isinstance(row[i], (int, float)) for row in self.rows) for i in range(len(self.columns))]
        lines = [
            "  ".join(x.rjust(w) if r else x.ljust(w) for x, w, r in zip(row, widths, right, strict=True)).rstrip()
            for row in [list(self.columns), *body]
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class Optima:
    """What each start led to.

    Args:
        objectives: nats, one per start in the order they were run; ``-inf`` where the start was not finite.
        converged: whether that start met the driver's criterion.
        tolerance: nats; starts that end closer than this found the same optimum.
        of: what was maximised, if it is not the objective of the fit itself.

    >>> Optima((-3.0, -5.0, -3.0), (True, True, True))
    optimum  found  starts
         -3      2  0, 2
         -5      1  1
    """

    objectives: tuple[float, ...] = ()
    converged: tuple[bool, ...] = ()
    tolerance: float = 1e-2
    of: str = ""

    @property
    def table(self) -> Table:
        """One row per distinct optimum, best first: its objective, how often it was found, by which starts."""
        groups: list[list[int]] = []
        for i in sorted(range(len(self.objectives)), key=lambda i: -self.objectives[i]):
            value = self.objectives[i]
            near = groups and (value == (top := self.objectives[groups[-1][0]]) or abs(value - top) <= self.tolerance)
            if near:
                groups[-1].append(i)
            else:
                groups.append([i])
        star = {i: "" if self.converged[i] else "*" for i in range(len(self.objectives))}
        rows = [(self.objectives[g[0]], len(g), ", ".join(f"{i}{star[i]}" for i in sorted(g))) for g in groups]
        return Table(("optimum", "found", "starts"), tuple(rows))

    def __repr__(self) -> str:
        title = f"{self.of}\n" if self.of else ""
        return title + repr(self.table) + ("" if all(self.converged) else "\n* not converged")


@dataclass(frozen=True)
class Normal:
    """Independent normal distributions of the members of a plate, over coordinates of the unconstrained vector.

    Args:
        plates: the plates whose members they are; empty for fixed effects with a prior (one member).
        index: shape (members, D), positions in the density's vector.
        loc: shape (members, D).
        scale_tril: shape (members, D, D), Cholesky factor of each member's covariance.
    """

    plates: tuple[str, ...]
    index: Tensor
    loc: Tensor
    scale_tril: Tensor

    def draw(self, vectors: Tensor, noise: Tensor) -> Tensor:
        """Values from standard normal ``noise`` of shape (draws, members, D); they depend on nothing in ``vectors``."""
        return self.loc + (self.scale_tril @ noise[..., None])[..., 0]

    def variance(self, vectors: Tensor) -> Tensor:
        """Of each value, shape (members, D), whatever is in ``vectors``."""
        return self.scale_tril.square().sum(-1)

    def moved(self, target: Tensor) -> "Normal":
        """The same at other positions: what was at i is at ``target[i]``."""
        return replace(self, index=target[self.index])


class Drawable(Protocol):
    """A posterior of any kind; ``blocks`` are empty where it is none of normal distributions."""

    @property
    def vector(self) -> Tensor:
        """Points, and the middles of what has a distribution, shape (size,)."""

    @property
    def blocks(self) -> tuple[Normal, ...]:
        """Independent normal distributions of which it is made."""

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each unconstrained coordinate, shape (size,); zero for points."""

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Unconstrained vectors, shape (draws, size); the same for the same seed."""

    def permuted(self, source: Tensor) -> "Drawable":
        """The same posterior with coordinate ``source[i]`` as number i; ``source`` has shape (size,)."""


@dataclass(frozen=True)
class Posterior:
    """Approximate posterior of the continuous latents: normal blocks in the unconstrained space; parameters are points.

    Args:
        vector: shape (size,), the points and the means of all blocks.
        blocks: independent of each other, but for those that depend on the population's values, which stand before them.
    """

    vector: Tensor
    blocks: tuple[Normal, ...]

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Unconstrained vectors, shape (draws, size); the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        out = self.vector.expand(draws, -1).clone()
        for b in self.blocks:
            noise = torch.randn(draws, *b.loc.shape, generator=generator, dtype=b.loc.dtype)
            out[:, b.index.reshape(-1)] = b.draw(out, noise).reshape(draws, -1)
        return out

    def permuted(self, source: Tensor) -> "Posterior":
        """The same posterior with coordinate ``source[i]`` as number i."""
        target = torch.argsort(source)
        return Posterior(self.vector[source], tuple(b.moved(target) for b in self.blocks))

    @cached_property
    def sd(self) -> Tensor:
        """Standard deviation of each unconstrained coordinate, shape (size,); zero for points.

        That of effects which depend on the population's values is a mean over draws of these.
        """
        out, vectors = torch.zeros_like(self.vector), self.vector[None]
        if len({type(b) for b in self.blocks}) > 1:
            vectors = self.sample(AVERAGED)
        for b in self.blocks:
            out[b.index.reshape(-1)] = b.variance(vectors).sqrt().reshape(-1)
        return out


@dataclass(frozen=True)
class Estimate:
    """What a driver returns.

    Args:
        method: the driver's name.
        values: constrained values by name; medians for latents with a posterior.
        vector: shape (size,), the same point unconstrained.
        objective: nats.
        objective_name: what the objective is.
        error: Monte Carlo standard error of the objective, nats; zero where it is exact.
        trace: shape (evaluations or steps,), objective along the run that was kept, nats.
        status: how it ended.
        n_evaluations: gradients of the density, all starts together.
        seconds: wall time.
        counts: number of free values per fixed effect, those that were fixed left out.
        optima: what the starts led to.
        posterior: of the latents, if the driver makes one.
        marginal: importance-weighted estimate of the log-likelihood (all latents integrated out) and its Monte Carlo
            standard error, nats, if the driver makes one.
        fixed: names that were held at given values.
        tie: groups of values that were held equal, by name or element.
        order: names of values that were held increasing, and along which axis.
        integrated: latents that were integrated out of the objective; ``values`` has their conditional modes.
    """

    method: str
    values: Mapping[str, Tensor]
    vector: Tensor
    objective: float
    objective_name: str
    trace: Tensor
    status: Status
    n_evaluations: int
    seconds: float
    counts: Mapping[str, int]
    optima: Optima = Optima()
    error: float = 0.0
    posterior: Drawable | None = None
    marginal: tuple[float, float] | None = None
    fixed: tuple[str, ...] = ()
    tie: tuple[tuple[str, ...], ...] = ()
    order: tuple[tuple[str, int], ...] = ()
    integrated: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        """Sum of ``counts``."""
        return sum(self.counts.values())

    def __repr__(self) -> str:
        error = f" +- {self.error:.2g}" if self.error else ""
        return (
            f"Estimate by {self.method}: {self.objective_name} {self.objective:.4f}{error}, "
            f"{self.n_evaluations} gradients in {self.seconds:.2f} s, {self.status}"
        )


def label(name: str, shape: Sequence[int]) -> list[str]:
    """Names of the elements of a tensor in row-major order.

    >>> label("mu", (2, 1))
    ['mu[0, 0]', 'mu[1, 0]']
    """
    if not shape:
        return [name]
    grid = torch.cartesian_prod(*(torch.arange(s) for s in shape)).reshape(-1, len(shape))
    return [f"{name}[{', '.join(map(str, i))}]" for i in grid.tolist()]


def _cell(x: Any) -> str:
    if isinstance(x, float):
        return "-" if math.isnan(x) else (f"{x:.4f}" if 1e2 <= abs(x) < 1e9 else f"{x:.4g}")
    return str(x)
