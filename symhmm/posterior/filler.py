"""Filler: what stands in the data where nobody has observed anything, and whether an answer depends on it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.compiler.lower import Named
from symhmm.posterior.emissions import observed_values
from symhmm.posterior.evaluated import Evaluated, Values
from symhmm.posterior.series import Loop


@dataclass(frozen=True)
class OtherFiller:
    """A density whose data are others after the last observation of each member, and the arguments in which they are."""

    density: Density
    arguments: tuple[str, ...]


def other_filler(density: Density, values: Values, at: Evaluated, loop: Loop) -> list[OtherFiller]:
    """Densities that differ in what stands for observations after the last one of each member.

    Nothing that is known of a member may depend on it, so that answers under all of these are the same, unless the program
    computes with it, as ``y[t - 1]`` does behind the end. The filler becomes the least, then the greatest of the values
    observed in the same tensor. Which elements of an argument are observations is read off the derivatives of the
    observed values, so that tensors of whole numbers are left as they are.

    Returns:
        none where there is no filler.

    Raises:
        GraphError: the density was made of a factor graph.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> from symhmm.posterior.evaluated import evaluated
    >>> def model(y, mask):
    ...     for t in pyro.markov(range(4)):
    ...         z = pyro.sample(f"z_{t}", dist.Bernoulli(0.5))
    ...         with pyro.poutine.mask(mask=mask[t]):
    ...             pyro.sample(f"y_{t}", dist.Normal(z, 1.0), obs=y[t])
    >>> density = symhmm.compile(model, torch.tensor([1.0, 2.0, 3.0, 0.0]), torch.tensor([True, True, True, False]))
    >>> at = evaluated(density, {})
    >>> [x.density.data[0] for x in other_filler(density, {}, at, at.loops[0])]
    [tensor([1., 2., 3., 2.]), tensor([1., 2., 3., 3.])]
    """
    tensors = density.data
    places = [i for i, x in enumerate(tensors[: len(density.arguments.tensors)]) if x.is_floating_point()]
    given = list(tensors)
    with torch.enable_grad():
        for i in places:
            given[i] = tensors[i].detach().nan_to_num().requires_grad_()
        # The program itself runs here: a compiled step has no derivatives with respect to data.
        graph = observed_values(replace(density, data=tuple(given), _constants={})).graph_at(values)
        before, behind = torch.zeros(()), torch.zeros(())
        for f in graph.factors:
            running = at.ends.running(loop.axis, frozenset(f.frames)) if loop.axis in f.frames else None
            if f.role != "observed" or running is None:
                continue
            names = [*f.term.inputs, *(n for n in running.names if n not in f.term.inputs)]
            value, inside = Named.from_funsor(f.term, f.name).aligned(names), running.aligned(names)
            before, behind = before + (value * inside).sum(), behind + (value * ~inside).sum()
    if not behind.requires_grad:
        return []
    leaves = [given[i] for i in places]
    known = torch.autograd.grad(before, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)
    unknown = torch.autograd.grad(behind, leaves, allow_unused=True, materialize_grads=True)
    out = []
    for choose in (torch.amin, torch.amax):
        other: list[Tensor] = list(tensors)
        changed = []
        for i, seen, filler in zip(places, known, unknown, strict=True):
            if bool((filler != 0).any()) and bool((seen != 0).any()):
                other[i] = torch.where(filler != 0, choose(tensors[i][seen != 0].nan_to_num()), tensors[i])
                changed.append(density.arguments.names[i])
        if changed:
            out.append(OtherFiller(replace(density, data=tuple(other), _constants={}), tuple(changed)))
    return out
