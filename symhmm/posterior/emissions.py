"""Emissions: the distribution of every observed site in each state, read off the program and rebuilt from its numbers."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.distributions import MaskedDistribution, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Distribution, Independent, TransformedDistribution, constraints

from symhmm.compiler.density import Density, compile
from symhmm.compiler.lower import Named
from symhmm.errors import GraphError, ProgramError
from symhmm.graph import FactorGraph
from symhmm.posterior.evaluated import Values

# Of several ways to give one quantity a distribution is rebuilt from the first.
_SAME = (("probs", "logits"), ("scale_tril", "covariance_matrix", "precision_matrix"), ("gate", "gate_logits"))


@dataclass(frozen=True)
class Recipe:
    """How to rebuild a distribution: its class, the numbers it was made with, distributions inside it, all by keyword.

    Args:
        shapes: of each tensor, without the dimensions of the site's batch.
    """

    kind: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    statics: Mapping[str, Any] = field(default_factory=dict)
    inside: Mapping[str, "Recipe"] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Numbers per member and state."""
        own = sum(torch.Size(s).numel() for s in self.shapes.values())
        return own + sum(r.size for r in self.inside.values())

    def rebuild(self, numbers: Iterator[Tensor]) -> Any:
        """The distribution from its numbers, each of the batch's shape."""
        tensors = {}
        for name, shape in self.shapes.items():
            x = torch.stack([next(numbers) for _ in range(torch.Size(shape).numel())], -1)
            tensors[name] = x.reshape([*x.shape[:-1], *shape])
        inner = {name: r.rebuild(numbers) for name, r in self.inside.items()}
        checks = {"validate_args": False}
        return self.kind(**tensors, **inner, **self.statics, **checks)


@dataclass(frozen=True)
class Emission:
    """The distributions of an observed site.

    Args:
        site: name in the graph; ``y_{time}`` for all steps on the axis.
        numbers: in the order of the recipe, each named by the states, plates and time axes that it depends on.
        frames: plates and time axes of the site.
    """

    site: str
    recipe: Recipe
    numbers: tuple[Named, ...]
    frames: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """What the distribution depends on."""
        return tuple(dict.fromkeys(n for x in self.numbers for n in x.names))

    def at(self, arrange: Callable[[Named], Tensor]) -> Any:
        """The distribution whose numbers have been arranged as one batch."""
        found = torch.broadcast_tensors(*map(arrange, self.numbers))
        return self.recipe.rebuild(iter(found))


def emissions(density: Density, values: Values) -> dict[str, Emission]:
    """The distribution of each observed site in each state, by name of its factor in the graph.

    The program is compiled once more with its observed sites answering with the numbers that their distributions were made
    of, masks left out, so that steps without observations have theirs, too.

    Raises:
        GraphError: the density was made of a factor graph.
        ProgramError: a distribution cannot be rebuilt from its arguments.

    >>> import symhmm, pyro, pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("y", dist.Normal(2 * z, 1.0), obs=torch.tensor(1.0))
    >>> emissions(symhmm.compile(model), {})["y"].at(lambda x: x.aligned(["z"])).mean
    tensor([0., 2.])
    """
    program = density.program
    if isinstance(program, FactorGraph):
        raise GraphError("a factor graph knows no distributions.", suggestion="compile a program")

    def make() -> tuple[Callable[..., None], dict[str, Recipe]]:
        recipes: dict[str, Recipe] = {}

        def numbers(which: Tensor, *args: Any, **kwargs: Any) -> None:
            with _Numbers(which, recipes):
                program(*args, **kwargs)

        return numbers, recipes

    wrapped, recipes = density.compiled.once("emissions", make)
    args, kwargs = density.arguments.rebuild(density.data[: len(density.arguments.tensors)])
    graph = density.graph
    with torch.no_grad():
        # Which number is asked for is an input of the compiled step.
        first = compile(wrapped, torch.tensor([0]), *args, **kwargs).factors_at(values)
        mine = {n: _recipe(n, recipes, graph) for n in graph.observed}
        most = max((r.size for r in mine.values()), default=0)
        runs = [first]
        runs += [compile(wrapped, torch.tensor([k]), *args, **kwargs).factors_at(values) for k in range(1, most)]
    out = {}
    for i, f in enumerate(first.factors):
        if f.name in mine:
            terms = [run.factors[i].term for run in runs[: mine[f.name].size]]
            out[f.name] = Emission(
                f.name, mine[f.name], tuple(Named.from_funsor(x, f.name) for x in terms), tuple(f.frames)
            )
    return out


def observed_values(density: Density) -> Density:
    """The program compiled with each observed site answering, in place of its log-density, with the sum of its value.

    Raises:
        GraphError: the density was made of a factor graph.
    """
    program = density.program
    if isinstance(program, FactorGraph):
        raise GraphError("a factor graph knows no observations.", suggestion="compile a program")

    def make() -> Callable[..., None]:
        def numbers(*args: Any, **kwargs: Any) -> None:
            with _Values():
                program(*args, **kwargs)

        return numbers

    args, kwargs = density.arguments.rebuild(density.data[: len(density.arguments.tensors)])
    return compile(density.compiled.once("observed values", make), *args, **kwargs)


def _recipe(site: str, recipes: Mapping[str, Recipe], graph: FactorGraph) -> Recipe:
    if site in recipes:
        return recipes[site]
    before, after = site.partition("{")[0], site.rpartition("}")[2]
    fitting = [r for n, r in recipes.items() if n.startswith(before) and n.endswith(after) and n not in graph.observed]
    sizes = {r.size for r in fitting}
    if len(sizes) != 1:
        raise ProgramError(f"the distribution of {site!r} has another form at different steps.")
    return fitting[0]


def _observation(msg: dict[str, Any]) -> Any:
    """The distribution of an observed site without its masks; None for other sites."""
    fn = msg["fn"]
    if not msg["is_observed"] or type(fn).__name__ in ("Unit", "_Subsample"):
        return None
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    return fn


class _Values(Messenger):
    """Observed sites answer with their value."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = _observation(msg)
        if fn is not None:
            msg["fn"], msg["mask"] = _Sum(fn, torch.tensor([0]), ()), None


class _Numbers(Messenger):
    """Observed sites answer with one of the numbers that their distributions are made of."""

    def __init__(self, which: Tensor, recipes: dict[str, Recipe]) -> None:
        super().__init__()
        self.which, self.recipes = which, recipes

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = _observation(msg)
        if fn is None:
            return
        recipe, tensors = taken(fn, str(msg["name"]))
        self.recipes[str(msg["name"])] = recipe
        msg["fn"], msg["mask"] = _Number(fn, self.which, tensors), None
        if isinstance(msg["value"], Tensor) and msg["value"].is_floating_point():
            msg["value"] = msg["value"].nan_to_num()


class _Number(TorchDistribution):
    """A distribution whose ``log_prob`` is a number that another one was made of, whatever the value."""

    arg_constraints: dict[str, Any] = {}

    def __init__(self, base: Any, which: Tensor, tensors: Sequence[Tensor]) -> None:
        self.base, self.which, self.tensors = base, which, tuple(tensors)
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return constraints.independent(constraints.real, self.event_dim) if self.event_dim else constraints.real

    def expand(self, batch_shape: Any, _instance: Any = None) -> "_Number":
        return type(self)(self.base.expand(batch_shape), self.which, self.tensors)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.base.sample(torch.Size(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        # Sites with fewer numbers than others answer with their last one, which nobody reads.
        which = self.which.clamp(max=len(self.tensors) - 1)
        dtype = next((x.dtype for x in self.tensors if x.is_floating_point()), torch.get_default_dtype())
        found = torch.stack([x.to(dtype).expand(self.batch_shape) for x in self.tensors])
        return found.index_select(0, which).squeeze(0)


class _Sum(_Number):
    """A distribution whose ``log_prob`` is the value, its elements added up."""

    def log_prob(self, value: Tensor) -> Tensor:
        total = value.flatten(-self.event_dim).sum(-1) if self.event_dim else value
        return total.to(torch.get_default_dtype()).expand(self.batch_shape)


def taken(fn: Any, site: str) -> tuple[Recipe, list[Tensor]]:
    """A distribution taken apart: its recipe, and its numbers, which broadcast with its batch.

    Raises:
        ProgramError: it keeps an argument neither under its name nor as a number or distribution.
    """
    recipe, tensors = _taken(fn, site)
    batch = len(fn.batch_shape)
    out = []
    for x in tensors:
        shape = x.shape[batch:]
        out += list(x.reshape([*x.shape[:batch], -1]).unbind(-1)) if shape else [x]
    return _trimmed(recipe, batch), out


def _trimmed(recipe: Recipe, batch: int) -> Recipe:
    shapes = {n: s[batch:] for n, s in recipe.shapes.items()}
    return Recipe(recipe.kind, shapes, recipe.statics, {n: _trimmed(r, batch) for n, r in recipe.inside.items()})


def _taken(fn: Any, site: str) -> tuple[Recipe, list[Tensor]]:
    """Recipe with the whole shapes, and the tensors expanded to their distribution's batch."""
    if isinstance(fn, Independent):
        inner, tensors = _taken(fn.base_dist, site)
        statics = {"reinterpreted_batch_ndims": fn.reinterpreted_batch_ndims}
        return Recipe(type(fn), {}, statics, {"base_distribution": inner}), tensors
    if isinstance(fn, TransformedDistribution) and "base_distribution" in inspect.signature(type(fn)).parameters:
        inner, tensors = _taken(fn.base_dist, site)
        return Recipe(type(fn), {}, {"transforms": fn.transforms}, {"base_distribution": inner}), tensors
    if type(fn).__name__ == "ExpandedDistribution":
        inner, tensors = _taken(fn.base_dist.expand(fn.batch_shape), site)
        return inner, tensors
    skipped = {n for same in _SAME for n in [x for x in same if x in fn.arg_constraints][1:]}
    tensors, shapes, statics, inside = [], {}, {}, {}
    nested: list[Tensor] = []
    for name, p in inspect.signature(type(fn)).parameters.items():
        if name == "validate_args" or name in skipped or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
            continue
        kept = [a for a in (name, f"_{name}", f"{name}_dist", f"_{name}_distribution") if hasattr(fn, a)]
        x = getattr(fn, kept[0]) if kept else None
        if isinstance(x, Distribution):
            inside[name], more = _taken(x, site)
            nested += more
        elif name in fn.arg_constraints and isinstance(x, Tensor):
            event = fn.arg_constraints[name].event_dim
            full = x.expand([*fn.batch_shape, *x.shape[x.dim() - event :]])
            shapes[name] = tuple(full.shape)
            tensors.append(full)
        elif isinstance(x, Tensor) or (x is None and p.default is p.empty):
            raise ProgramError(
                f"the distribution of {site!r} cannot be rebuilt: {type(fn).__name__} has {name!r} not in arg_constraints.",
                suggestion="arg_constraints with each tensor argument, kept under its name",
            )
        elif x is not None:
            statics[name] = x
    return Recipe(type(fn), shapes, statics, inside), tensors + nested
