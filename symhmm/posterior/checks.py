"""Posterior predictive checks: a statistic of the data beside the same statistic of data that the model makes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import DataError
from symhmm.posterior.evaluated import Values
from symhmm.posterior.forward import data, observed_sites, run, series
from symhmm.tables.results import Table

Statistic = Callable[[Mapping[str, Tensor]], Tensor | float]


@dataclass(frozen=True, eq=False)
class Check:
    """Statistics of the data and of replicated data.

    Args:
        observed: by name of the statistic, its value for the data: a number, or a tensor of numbers.
        replicated: the same for replicated data, (draws, ...) each.
    """

    observed: Mapping[str, Tensor]
    replicated: Mapping[str, Tensor]

    def tail(self, name: str) -> Tensor:
        """P(replicated >= observed), ties counted by half; near 0 or 1 the model does not make such data.

        NaN where the statistic is not defined for the data; replicates for which it is not are left out.
        """
        x, y = self.replicated[name], self.observed[name]
        known = ~x.isnan()
        count = ((x > y) + 0.5 * (x == y)).where(known, 0).sum(0) / known.sum(0)
        return torch.where(y.isnan(), torch.nan, count)

    def table(self) -> Table:
        """One row for each number: observed, mean, standard deviation and 95 percent range of the replicates, tail."""
        rows: list[tuple[object, ...]] = []
        for name, y in self.observed.items():
            x = self.replicated[name].reshape(self.replicated[name].shape[0], -1)
            low, high = x.nanquantile(torch.tensor([0.025, 0.975], dtype=x.dtype), 0)
            mean = x.nanmean(0)
            sd = (x - mean).square().nanmean(0).sqrt()
            for i, (value, tail) in enumerate(zip(y.reshape(-1), self.tail(name).reshape(-1), strict=True)):
                label = name if y.dim() == 0 else f"{name}[{i}]"
                rows.append((label, *(v.item() for v in (value, mean[i], sd[i], low[i], high[i], tail))))
        return Table(("statistic", "observed", "mean", "sd", "2.5%", "97.5%", "tail"), tuple(rows))

    def __repr__(self) -> str:
        return repr(self.table())


def check(
    density: Density,
    values: Sequence[Values],
    statistic: Statistic | Mapping[str, Statistic],
    draws: int = 1000,
    *,
    seed: int = 0,
    new_members: bool = False,
) -> Check:
    """Compare statistics of the data with those of data replicated at some values (Gelman, Meng and Stern 1996).

    Args:
        values: constrained parameters and continuous latents; several where they are draws from a posterior.
        statistic: a function of one data set, given as a mapping from observed sites to tensors (time, *plates, ...) with
            NaN where the data have none (``nanmean`` and the like), to a number or a tensor; or several by name.
        draws: replicated data sets in all.
        seed: of all that is random.
        new_members: replicate other individuals than those of the data, with effects of their own.

    Raises:
        DataError: a statistic gives different shapes for different data.
        GraphError: the program cannot be simulated, see `symhmm.posterior.forward.run`.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model(y):
    ...     with pyro.plate("n", len(y)):
    ...         pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
    >>> density = symhmm.compile(model, torch.tensor([0.1, -0.3, 40.0]))
    >>> check(density, [{}], lambda data: data["y"].max()).tail("statistic")
    tensor(0.)
    """
    functions = statistic if isinstance(statistic, Mapping) else {"statistic": statistic}
    real = {n: x.values for n, x in data(density, values[0]).items()}
    wanted = {n: _number(f(_DataSet(real))) for n, f in functions.items()}
    hidden = {n: x.isnan() for n, x in real.items()}
    found: dict[str, list[Tensor]] = {n: [] for n in functions}
    each = -(-draws // len(values))
    for i, v in enumerate(values):
        made = run(density, v, each, seed=seed + i, new_members=new_members)
        sets = {n: series(n, made, density).values for n in observed_sites(density)}
        sets = {n: x.to(real[n].dtype).masked_fill(hidden[n], torch.nan) for n, x in sets.items()}
        for k in range(each):
            one = _DataSet({n: x[k] for n, x in sets.items()})
            for name, f in functions.items():
                found[name].append(_number(f(one)))
    for name, rows in found.items():
        other = next((x.shape for x in rows if x.shape != wanted[name].shape), None)
        if other is not None:
            raise DataError(
                f"the statistic {name!r} has shape {tuple(wanted[name].shape)} for the data and {tuple(other)} for a replicate.",
                suggestion="a number, or a tensor whose size does not depend on the data",
            )
    return Check(wanted, {n: torch.stack(rows)[:draws] for n, rows in found.items()})


class _DataSet(dict[str, Tensor]):
    """Observed sites by name, that says what there is when asked for another."""

    def __missing__(self, site: str) -> Tensor:
        raise DataError(f"the data have no observed site {site!r}.", details=[f"there are: {', '.join(self)}"])


def _number(x: Tensor | float) -> Tensor:
    return torch.as_tensor(x).detach().to(torch.float64)
