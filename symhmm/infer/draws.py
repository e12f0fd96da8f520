"""Draws: what a sampler returns as a posterior, whether its chains agree, and what to do if they do not."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.layout import Entry
from symhmm.errors import GraphError
from symhmm.infer.sampler import Chain
from symhmm.infer.target import Array
from symhmm.posterior.align import aligned, symmetry
from symhmm.tables.results import Normal, Status, Table, label

AGREED = 1.01  # R-hat up to which chains agree (Vehtari et al. 2021)
ENOUGH = 100  # effective draws per chain
SHAKY = 0.01  # share of trajectories that may diverge before the draws are not to be trusted
LOW_ENERGY = 0.3  # Bayesian fraction of missing information (Betancourt 2016)


@dataclass(frozen=True, eq=False)
class Draws:
    """A posterior as draws.

    Args:
        chains: shape (chains, draws, size), unconstrained vectors, states in one order.
        entries: what was sampled.
        diverging: shape (chains,), trajectories that diverged.
        step_size: shape (chains,), of each chain after its warm-up.
        trajectory: mean number of gradients per draw.
    """

    chains: Tensor
    entries: tuple[Entry, ...]
    diverging: tuple[int, ...]
    step_size: tuple[float, ...]
    trajectory: float
    blocks: tuple[Normal, ...] = ()

    @cached_property
    def table(self) -> Table:
        """Of each constrained number its mean, standard deviation, 2.5 and 97.5 percent quantiles, R-hat and effective number
        of draws of its middle and its tails."""
        return diagnose(constrained(self.chains, self.entries), self.entries)

    @property
    def all(self) -> Tensor:
        """All draws, one chain after the other, shape (chains * draws, size)."""
        return self.chains.reshape(-1, self.chains.shape[-1])

    @property
    def vector(self) -> Tensor:
        """Median of each unconstrained coordinate, shape (size,)."""
        return self.all.median(0).values

    @property
    def sd(self) -> Tensor:
        """Standard deviation of each unconstrained coordinate, shape (size,); zero where it was held."""
        return self.all.std(0)

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """``draws`` of the draws, shape (draws, size): without repetition as long as there are enough, evenly spaced."""
        have = self.all.shape[0]
        if draws <= have:
            return self.all[torch.linspace(0, have - 1, draws).round().long()]
        generator = torch.Generator().manual_seed(seed)
        return self.all[torch.randint(have, (draws,), generator=generator)]

    def permuted(self, source: Tensor) -> "Draws":
        """The same draws with coordinate ``source[i]`` as number i."""
        return replace(self, chains=self.chains[..., source])

    def __repr__(self) -> str:
        c, n, size = self.chains.shape
        return f"Draws({c} chains of {n}, {size} coordinates, {sum(self.diverging)} divergences)"


def draws(chains: Tensor, found: Sequence[Chain], entries: Sequence[Entry]) -> Draws:
    """Posterior of chains of unconstrained vectors, shape (chains, draws, size)."""
    steps = [2 ** c.depth.mean() - 1 for c in found]
    return Draws(
        chains,
        tuple(entries),
        tuple(int(c.diverging.sum()) for c in found),
        tuple(float(c.step_size[-1]) for c in found),
        float(np.mean(steps)),
    )


def relabelled(density: Density, chains: Tensor, entries: Sequence[Entry]) -> tuple[Tensor, int]:
    """Chains with the states of all draws in one order, and how many draws had another one.

    Nothing moves where the program tells the states apart by itself, or has several kinds of states.
    """
    try:
        found = symmetry(density)
    except GraphError:
        return chains, 0
    if not set(found.dims) <= {e.name for e in entries}:
        return chains, 0
    flat = chains.reshape(-1, chains.shape[-1])
    moved = aligned(constrained(flat, entries), found)
    if not moved.switched:
        return chains, 0
    out = flat.clone()
    for e in entries:
        if e.name in found.dims:
            out[:, e.start : e.stop] = e.transform.inv(moved.draws[e.name]).reshape(len(flat), -1)
    return out.reshape(chains.shape), moved.switched


def constrained(chains: Tensor, entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Constrained values of all draws by name; dimensions in front of the last of ``chains`` stay."""
    front = chains.shape[:-1]
    return {e.name: e.transform(chains[..., e.start : e.stop].reshape(*front, *e.free_shape)) for e in entries}


def diagnose(values: Mapping[str, Tensor], entries: Sequence[Entry]) -> Table:
    """Mean, spread and agreement of the chains for each number in ``values``; R-hat and sizes are rank-normalised."""
    names: list[str] = []
    columns: list[Array] = []
    for e in entries:
        names += label(e.name, e.shape)
        columns.append(values[e.name].reshape(*values[e.name].shape[:2], -1).double().numpy())
    x = np.concatenate(columns, axis=-1)
    flat = x.reshape(-1, x.shape[-1])
    low, high = np.quantile(flat, [0.025, 0.975], axis=0)
    numbers = [flat.mean(0), flat.std(0, ddof=1), low, high, *agreement(x)]
    rows = [(n, *(float(c[i]) for c in numbers)) for i, n in enumerate(names)]
    return Table(("name", "mean", "sd", "2.5%", "97.5%", "r_hat", "ess", "ess tail"), tuple(rows))


def agreement(x: Array) -> tuple[Array, Array, Array]:
    """R-hat, bulk and tail effective sizes (Vehtari et al. 2021) of draws of shape (chains, draws, numbers); NaN below 8."""
    if x.shape[0] * x.shape[1] < 8 or x.shape[1] < 4:
        nothing = np.full(x.shape[2], np.nan)
        return nothing, nothing, nothing
    if x.shape[0] == 1:  # halves of a single chain are compared with each other
        half = x.shape[1] // 2
        x = np.concatenate([x[:, :half], x[:, half : 2 * half]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ announces its next version
        import arviz

        data = arviz.convert_to_dataset({"x": x})
        found: list[Array] = []
        measures: list[Any] = [arviz.rhat(data), arviz.ess(data, method="bulk"), arviz.ess(data, method="tail")]
        for measure in measures:
            found.append(np.asarray(measure["x"].values, dtype=np.float64))
    return found[0], found[1], found[2]


def verdict(posterior: Draws, found: Sequence[Chain], remarks: tuple[str, ...], deepest: int) -> Status:
    """Whether the draws may be used, and if not, why and what to try."""
    table, n = posterior.table, posterior.all.shape[0]
    names, r_hat, ess = table["name"], np.array(table["r_hat"]), np.array(table["ess"])
    wanted = ENOUGH * len(found)
    worst, least = int(np.argmax(np.nan_to_num(r_hat, nan=np.inf))), int(np.argmin(np.nan_to_num(ess, nan=0.0)))
    measured = (
        f"R-hat at most {r_hat[worst]:.3f} ({names[worst]}), at least {ess[least]:.0f} effective draws ({names[least]})"
    )
    diverged = sum(posterior.diverging)
    causes, tries = [], []
    if diverged:
        causes.append(f"{diverged} of {n} trajectories diverged")
        if diverged > SHAKY * n:
            tries.append("target_accept=0.95")
    limit = sum(int((c.depth >= deepest).sum()) for c in found)
    if limit > SHAKY * n:
        causes.append(f"{limit} trajectories reached the greatest depth, {deepest}")
        tries.append(f"max_depth={deepest + 2}")
    slow = [i for i, c in enumerate(found) if _energy(c) < LOW_ENERGY]
    if slow:
        causes.append(
            f"the energy of chain{'s' if len(slow) > 1 else ''} {', '.join(map(str, slow))} hardly moves: heavy tails"
        )
    disagree = not r_hat[worst] <= AGREED
    if disagree:
        causes.append("chains disagree: " + ", ".join(f"{names[i]} {r_hat[i]:.2f}" for i in np.argsort(-r_hat)[:3]))
    if disagree or not ess[least] >= wanted:
        tries.append(f"draws={4 * posterior.chains.shape[1]}")
    ok = not tries
    reason = f"converged: {measured}" if ok else f"not to be relied on: {measured}"
    return Status(ok, reason, (*causes, *remarks), ", ".join(tries))


def _energy(chain: Chain) -> float:
    """Bayesian fraction of missing information."""
    spread = chain.energy.var()
    return float(np.square(np.diff(chain.energy)).mean() / spread) if len(chain.energy) > 10 and spread > 0 else 1.0
