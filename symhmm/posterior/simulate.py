"""Simulation: the program run forwards at fitted values, with everything that was observed drawn anew."""

from symhmm.compiler.density import Density
from symhmm.posterior.evaluated import Values
from symhmm.posterior.forward import discrete_sites, observed_sites, run, series
from symhmm.tables.states import Answers


def simulate(density: Density, values: Values, draws: int = 1, *, seed: int = 0, new_members: bool = False) -> Answers:
    """New data and their hidden states, drawn from the program at some values.

    All draws are made in one run of the program, its observed and discrete sites drawn. Masked values are drawn, too.
    What the program computes from its own data (``y[t - 1]`` in an autoregression) is computed from the given data.

    Args:
        values: constrained parameters and continuous latents.
        draws: how many data sets.
        seed: of all that is random.
        new_members: draw the random effects from the population as well, for other individuals than those of the data; each
            draw has as many of them as the data.

    Returns:
        for each observed site and discrete latent (draw, time, *plates, ...).

    Raises:
        GraphError: the density was made of a factor graph, or a continuous latent belongs to single steps of a loop.
        ValuesError: values are missing, unknown or of the wrong shape.

    >>> import symhmm, pyro, pyro.distributions as dist, torch
    >>> def model(y):
    ...     rate = pyro.param("rate", torch.tensor(0.0))
    ...     with pyro.plate("n", len(y)):
    ...         pyro.sample("y", dist.Poisson(rate), obs=y)
    >>> simulate(symhmm.compile(model, torch.ones(3)), {"rate": torch.tensor(1e-9)}, 2)["y"].values
    tensor([[0., 0., 0.],
            [0., 0., 0.]])
    """
    found = run(density, values, draws, seed=seed, new_members=new_members)
    names = [*observed_sites(density), *discrete_sites(density)]
    return Answers("simulated data", {n: series(n, found, density) for n in names})
