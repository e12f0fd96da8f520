"""Pointwise log-likelihoods, with the discrete latents summed out: by member of a plate, by step of a loop, or both."""

from dataclasses import replace

from symhmm.compiler.density import Density
from symhmm.compiler.lower import lower
from symhmm.compiler.plan import plan
from symhmm.errors import GraphError
from symhmm.posterior.evaluated import Values, evaluated
from symhmm.posterior.prefix import step_log_likelihood
from symhmm.tables.states import Labelled


def log_likelihood_by(density: Density, values: Values, *frames: str) -> Labelled:
    """Log-likelihood of each member of some plates, of each step of the time loop, or of each member at each step, nats.

    What a member's data say, given the values; priors of continuous latents are left out. A time axis gives one-step-ahead
    terms log p(y_t | y_1..y_{t-1}); those of a member add up to its log-likelihood. Use the outer plates as well for a
    plate inside another: ``("animal", "session")``.

    Raises:
        GraphError: there is no such plate or time axis.
        IntractableError: members are coupled by a discrete latent outside the plate.

    >>> import symhmm, torch, pyro, pyro.distributions as dist
    >>> def model(y):
    ...     with pyro.plate("animal", len(y)):
    ...         z = pyro.sample("z", dist.Bernoulli(0.5))
    ...         pyro.sample("y", dist.Normal(z, 1.0), obs=y)
    >>> log_likelihood_by(symhmm.compile(model, torch.tensor([0.5, 1.0])), {}, "animal").values
    tensor([-1.0439, -1.1380])
    """
    at = evaluated(density, values)
    plates = [f for f in frames if f in at.graph.plates]
    axes = [f for f in frames if any(f == loop.axis for loop in at.loops)]
    for f in frames:
        if f not in plates and f not in axes:
            known = [*at.graph.plates, *(loop.axis for loop in at.loops)]
            raise GraphError(f"there is no plate or time axis {f!r}.", details=[f"known: {', '.join(known) or 'none'}"])
    if axes:
        found = step_log_likelihood(density, values, plates)
    else:
        data = tuple(f for f in at.graph.factors if f.role != "continuous latent")
        graph = replace(at.graph, factors=data)
        key = ("members", tuple(sorted(plates)))
        total = lower(graph, at.compiled.once(key, lambda: plan(graph, keep=plates, strategy=at.strategy)))
        order = sorted(plates)
        found = Labelled("log-likelihood", total.permute([order.index(p) for p in plates]), tuple(plates))
    return found
