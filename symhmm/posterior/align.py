"""Alignment: one order of the states, whatever order a fit, a chain or a draw has found them in.

Which dimensions of which values number the states is not declared anywhere in a program. It is found by trying: a choice
of dimensions is right if moving them changes no log-density and moves the probabilities of the states along.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import GraphError
from symhmm.posterior.evaluated import evaluated
from symhmm.posterior.marginals import smooth
from symhmm.tables.states import Answers

TRIES = 300  # choices of dimensions that are tried at most
ROUNDS = 20  # of matching with the mean of all draws


@dataclass(frozen=True)
class Symmetry:
    """Which dimensions of which values number the states of a site.

    Args:
        site: the discrete latent, as in `symhmm.posterior.marginals.smooth`.
        size: K.
        dims: by name of a value, its dimensions that number states, counted from the last (-1).
    """

    site: str
    size: int
    dims: Mapping[str, tuple[int, ...]]

    def moved(self, values: Mapping[str, Tensor], order: Tensor) -> dict[str, Tensor]:
        """The values with state ``order[k]`` as number k; dimensions in front of a value's own (draws) stay."""
        out = dict(values)
        for n, dims in self.dims.items():
            for d in dims:
                out[n] = out[n].index_select(d, order)
        return out

    def features(self, values: Mapping[str, Tensor]) -> Tensor:
        """What describes each state of each draw: shape (draws, K, D).

        Values with one number per state and, of those with a matrix of states, the diagonal.
        """
        columns = []
        for n, dims in self.dims.items():
            x = values[n].detach().to(torch.float64)
            x = x.diagonal(dim1=dims[0], dim2=dims[1]) if len(dims) > 1 else x.movedim(dims[0], -1)
            columns.append(x.reshape(x.shape[0], -1, self.size).transpose(1, 2))
        return torch.cat(columns, -1)

    def by(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        """One number per state: the mean of a value over its other dimensions, shape (K,).

        Raises:
            GraphError: the value does not number the states.
        """
        if name not in self.dims or len(self.dims[name]) != 1:
            known = [n for n, d in self.dims.items() if len(d) == 1]
            raise GraphError(
                f"{name!r} does not have one number per state.", details=[f"these have: {', '.join(known) or 'none'}"]
            )
        x = values[name].detach().to(torch.float64).movedim(self.dims[name][0], -1)
        return x.reshape(-1, self.size).mean(0)


@dataclass(frozen=True)
class Aligned:
    """Draws whose states are in one order.

    Args:
        draws: by name, as given.
        orders: shape (draws, K), int64; entry [i, k] is the state of draw i that became number k.
    """

    draws: Mapping[str, Tensor]
    orders: Tensor

    @property
    def switched(self) -> int:
        """Draws whose order differs from that of most."""
        _, counts = self.orders.unique(dim=0, return_counts=True)
        return int(counts.sum() - counts.max())

    def __repr__(self) -> str:
        return f"Aligned({len(self.orders)} draws of {self.orders.shape[1]} states, {self.switched} in another order than most)"


def symmetry(density: Density, site: str | None = None) -> Symmetry:
    """Find which dimensions of the free values number the states of a discrete latent, by trying.

    A choice is right if at random values, for permutations that generate all others, the log-density and the posterior
    probabilities of all other latents stay what they are, and those of the states move along.

    Args:
        site: ``z_{time}`` or another discrete latent; the one with a time loop, or the only one, if None.

    Raises:
        GraphError: no choice is right, as where a state is a reference category, has a prior or data of its own; then the
            states have their order from the program, and nothing needs to be aligned. Or there are several sites.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model(y):
    ...     mean = pyro.param("mean", torch.tensor([0.0, 1.0]))
    ...     with pyro.plate("n", len(y)):
    ...         z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
    ...         pyro.sample("y", dist.Normal(mean[z], 1.0), obs=y)
    >>> symmetry(symhmm.compile(model, torch.randn(5)))
    Symmetry(site='z', size=2, dims={'mean': (-1,)})
    """
    site, size = site_of(density, site)
    options: dict[str, list[tuple[int, ...]]] = {}
    for e in density.layout.entries:
        event = density.graph.latents[e.name].event_dim if e.name in density.graph.latents else 0
        members = {d - event for d in e.plates.values()}
        dims = [d for d in range(-len(e.shape), 0) if e.shape[d] == size and d not in members]
        subsets = [c for r in range(len(dims), -1, -1) for c in itertools.combinations(dims, r)]
        if len(subsets) > 1:
            options[e.name] = subsets
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(density.size, generator=generator, dtype=density.layout.dtype)
    values = density.unpack(density.pack(density.initial()) + 0.3 * noise)
    # A swap and a cycle generate every permutation.
    swap = torch.tensor([1, 0, *range(2, size)])
    orders = [swap, torch.arange(size).roll(1)] if size > 2 else [swap]
    before = density.log_prob(values), smooth(density, values)
    for choice in itertools.islice(itertools.product(*options.values()), TRIES):
        found = Symmetry(site, size, {n: d for n, d in zip(options, choice, strict=True) if d})
        if found.dims and all(_holds(density, found, values, order, *before) for order in orders):
            return found
    raise GraphError(
        f"the states of {site!r} cannot be moved without changing the density.",
        details=[
            f"values with a dimension of {size}: {', '.join(options) or 'none'}",
            "a state may be a reference category, or have a prior, data or known labels of its own",
        ],
        suggestion="nothing: such states keep the order that the program gives them",
    )


def site_of(density: Density, site: str | None = None) -> tuple[str, int]:
    """A discrete latent and its number of states: the one with a time loop, or the only one, if None.

    Raises:
        GraphError: there is no such latent, or there are several.
    """
    at = evaluated(density, density.initial())
    known = at.chosen(None)
    inside = [n for n in known if at.sites[n] is not None]
    if site is None:
        several = inside or known
        if len(several) > 1:
            raise GraphError(
                f"there are {len(several)} discrete latents whose states could be aligned.",
                details=[", ".join(several)],
                suggestion=f"site={several[0]!r}",
            )
        site = several[0]
    site = at.chosen([site])[0]
    return site, at.graph.variables[at.names(site)[-1]].size


def _holds(
    density: Density, found: Symmetry, values: Mapping[str, Tensor], order: Tensor, total: Tensor, before: Answers
) -> bool:
    """Whether moving leaves the density and all other latents alone, and moves the states."""
    tolerance = 1e-8 if density.layout.dtype == torch.float64 else 1e-4
    moved = found.moved(values, order)
    if not torch.allclose(density.log_prob(moved), total, rtol=tolerance, atol=tolerance):
        return False
    for site, after in smooth(density, moved).items():
        wanted = before[site].values
        wanted = wanted.index_select(-1, order) if site == found.site else wanted
        if not torch.allclose(after.values, wanted, rtol=0.0, atol=100 * tolerance):
            return False
    return True


def aligned(draws: Mapping[str, Tensor], found: Symmetry, by: str | None = None) -> Aligned:
    """Draws, chains or restarts with their states in one order.

    Each draw is matched with the mean of all by the assignment of least squared distance between states, in units of the
    spread of each feature within states, and mean and spread are made again until nothing moves (as Stephens 2000 does
    with normal distributions).

    Args:
        draws: by name, shape (draws, *shape) of the constrained value each; further dimensions in front, as for chains,
            must be flattened before.
        found: of `symmetry`.
        by: a value with one number per state; numbers the states by its mean over draws, smallest first. The order of
            the first draw if None.

    Raises:
        GraphError: ``by`` does not have one number per state.

    >>> draws = {"mean": torch.tensor([[0.0, 5.0], [5.1, 0.1], [0.2, 4.9]])}
    >>> aligned(draws, Symmetry("z", 2, {"mean": (-1,)})).draws["mean"][:, 0]
    tensor([0.0000, 0.1000, 0.2000])
    """
    x = found.features(draws)
    orders = torch.arange(found.size).repeat(len(x), 1)
    # What a feature says about states is its spread between them in units of its spread within; before there is any order,
    # the values of each draw sorted by size tell both.
    reference, within = x[0], _spread(x.sort(1).values)
    for _ in range(ROUNDS):
        new = torch.stack([match(row / within, reference / within) for row in x])
        ordered = x.gather(1, new.unsqueeze(-1).expand_as(x))
        reference, within = ordered.mean(0), _spread(ordered)
        if torch.equal(new, orders):
            break
        orders = new
    if by is not None:
        rank = found.by(_moved_each(draws, found, orders), by).argsort(stable=True)
        orders = orders[:, rank]
    return Aligned(_moved_each(draws, found, orders), orders)


def _spread(x: Tensor) -> Tensor:
    """Standard deviation of each feature within states, shape (D,); a thousandth of the total at least, and never zero."""
    total = (x - x.mean((0, 1))).square().mean((0, 1)).sqrt()
    within = (x - x.mean(0)).square().mean((0, 1)).sqrt().maximum(1e-3 * total)
    return torch.where(within > 0, within, 1.0)


def _moved_each(draws: Mapping[str, Tensor], found: Symmetry, orders: Tensor) -> dict[str, Tensor]:
    """Each draw in its own order."""
    out = dict(draws)
    for n, dims in found.dims.items():
        x = out[n]
        for d in dims:
            index = orders.reshape([len(orders), *(-1 if i == x.dim() + d else 1 for i in range(1, x.dim()))])
            x = x.gather(d, index.expand(x.shape))
        out[n] = x
    return out


def order_by(values: Mapping[str, Tensor], name: str) -> Tensor:
    """States sorted by a parameter that has one number per state, smallest first.

    Returns:
        shape (K,), int64; entry k is the state that becomes number k, as `Answers.reordered` expects.

    Raises:
        GraphError: there is no such value, or it does not have one number per state.

    >>> order_by({"mean": torch.tensor([3.0, 1.0, 2.0])}, "mean")
    tensor([1, 2, 0])
    """
    if name not in values or values[name].dim() != 1:
        known = [n for n, x in values.items() if x.dim() == 1]
        raise GraphError(f"{name!r} does not have one number per state.", details=[f"these have: {', '.join(known)}"])
    return values[name].detach().argsort(stable=True)


def match(found: Tensor, reference: Tensor) -> Tensor:
    """States matched with those of a reference: the assignment of least total squared distance.

    Args:
        found: shape (K, D), what describes each state: means, standard deviations, or columns of state probabilities.
        reference: shape (K, D), the same of the reference.

    Returns:
        shape (K,), int64; entry k is the state of ``found`` that is state k of the reference.

    >>> match(torch.tensor([[5.0], [1.0]]), torch.tensor([[0.9], [4.0]]))
    tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    if found.shape != reference.shape or found.dim() != 2:
        raise GraphError(
            "states and reference cannot be matched.",
            details=[f"seen {tuple(found.shape)} and {tuple(reference.shape)}, wanted (K, D) twice"],
        )
    cost = (reference[:, None] - found[None]).square().sum(-1)
    _, states = linear_sum_assignment(cost.detach().numpy())
    return torch.as_tensor(states, dtype=torch.int64)
