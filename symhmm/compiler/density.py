"""Density: a compiled log-density with every discrete latent summed out, and `compile`, which makes it."""

import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from warnings import warn

import torch
from funsor.tensor import Tensor as Term
from torch import Tensor

from symhmm.capture.program import capture
from symhmm.compiler.arguments import Arguments, take_apart
from symhmm.compiler.free import FreeValues
from symhmm.compiler.layout import Layout, layout
from symhmm.compiler.lower import lower
from symhmm.compiler.plan import MEMORY_LIMIT, plan
from symhmm.compiler.step import Constants, Step, trace
from symhmm.compiler.steps import ChainContract, Plan
from symhmm.compiler.taped import quick
from symhmm.compiler.transforms import differentiated, outside, uncollected
from symhmm.errors import ProgramError, StructureDependsOnInput, SymhmmWarning
from symhmm.graph import FactorGraph
from symhmm.memory import keep_freed_memory
from symhmm.recorder import untraced

ANY_ORDER = ("scan", "sequential")  # strategies of chains that have derivatives of any order, of both modes

Values = Mapping[str, Tensor]
Key = tuple[Hashable, ...]
T = TypeVar("T")


@dataclass
class Compiled:
    """What densities of one program and one data shape share. ``steps`` fills as functions are asked for.

    ``mode`` is ``captured`` (data are inputs of the step), ``fixed data`` (the program's structure depends on data, which
    were therefore built in) or ``eager`` (the program runs at each evaluation). ``kept`` is what queries work out from
    names and sizes alone, so that they do it once.
    """

    graph: FactorGraph
    plan: Plan
    layout: Layout
    mode: str = "captured"
    reason: str = ""
    steps: dict[Key, Step] = field(default_factory=dict)
    kept: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What ``make`` returned when it was first called for ``key``."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


@dataclass(frozen=True, eq=False)
class Density(FreeValues):
    """The log-density of a program's parameters and continuous latents given its data, discrete latents summed out.

    Values are named and constrained (as the program sees them) in ``log_prob`` and ``per``; the vector of
    ``value_and_grad`` is unconstrained. Everything is in nats.

    >>> import pyro, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.param("mu", torch.tensor(1.0))
    ...     z = pyro.sample("z", dist.Bernoulli(0.5))
    ...     pyro.sample("y", dist.Normal(mu * z, 1.0), obs=y)
    >>> density = compile(model, torch.tensor(0.0))
    >>> density.log_prob({"mu": torch.tensor(0.0)})
    tensor(-0.9189)
    """

    program: Callable[..., Any] | FactorGraph
    arguments: Arguments
    compiled: Compiled
    data: tuple[Tensor, ...]
    _constants: dict[Key, Constants] = field(default_factory=dict, repr=False)

    @property
    def graph(self) -> FactorGraph:
        """The factor graph at the initial values, as captured."""
        return self.compiled.graph

    @property
    def plan(self) -> Plan:
        """How the graph is contracted."""
        return self.compiled.plan

    @property
    def layout(self) -> Layout:
        """Names, shapes and places of the free values."""
        return self.compiled.layout

    def log_prob(self, values: Values) -> Tensor:
        """Log-density at constrained values, nats, shape ().

        Differentiable in the values; works inside ``make_fx`` and the transforms of ``torch.func``. Where those take
        derivatives (``grad``, ``jvp``, ``hessian``), chains are contracted by a scan, which has derivatives of any order but
        takes longer than `value_and_grad`. No Jacobian is included.

        Raises:
            ValuesError: a name is missing or unknown, or a shape is wrong.
        """
        return self._evaluate(("total",), values)

    def per(self, plate: str, values: Values) -> Tensor:
        """Log-density terms of each member of ``plate``, nats, shape (members,).

        Terms outside the plate (priors of population parameters) are left out; a subsampled plate gives the members of
        the subsample, unscaled.

        Raises:
            GraphError: there is no such plate.
            IntractableError: members are coupled by a discrete latent outside the plate.
        """
        return self._evaluate(("per", plate), values)

    def value_and_grad(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Log-density at an unconstrained vector and its gradient, shapes () and (size,); no Jacobian is included."""
        vector = vector.detach()
        if self.compiled.mode == "eager":
            return _value_and_grad(lambda *v: self._eager(("total",), v), self.layout, vector)
        step, constants = self._captured(("gradient",))
        value, gradient = step.numbers((vector,), constants)
        return value, gradient

    def graph_at(self, values: Values) -> FactorGraph:
        """The factor graph with its terms evaluated at constrained ``values`` (runs the program)."""
        return self._graph(tuple(self.layout.check(values).values()), self.data)

    def factors_at(self, values: Values) -> FactorGraph:
        """As `graph_at`, but replayed without running the program; what is no factor stays as captured."""
        if not self._replayed:
            return self.graph_at(values)
        step, constants = self._captured(("factors",))
        return with_terms(self.graph, step.body(*self.layout.check(values).values(), *constants))

    def numbers(self, key: Key, f: Callable[..., tuple[Tensor, ...]], values: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """What ``f(factors, *values)`` returns, recorded once for the program and replayed, cut off from derivatives.

        Args:
            key: names ``f`` and all that it depends on besides the program, the density's data and ``values``.
            f: is given `factors_at`, or what stands for it in the recording; may take derivatives itself.
        """
        if not self._replayed:
            return f(self.factors_at, *values)

        def recorded() -> Step:
            forward, _ = self._captured(("factors",))
            n = len(values)

            def whole(*inputs: Tensor) -> tuple[Tensor, ...]:
                constants = forward.prologue(*inputs[n:])

                def factors(at: Values) -> FactorGraph:
                    return with_terms(self.graph, forward.body(*self.layout.check(at).values(), *constants))

                return f(factors, *inputs[:n])

            return quick(trace(whole, values, self._inputs(), gradients=True), n)

        step, constants = self._step(key, recorded)
        out: tuple[Tensor, ...] = step.numbers(values, constants)
        return out

    def nonfinite_sites(self, values: Values) -> tuple[str, ...]:
        """Sites whose factor is NaN or infinite, or impossible in every state, at ``values``; names of the graph."""
        bad = []
        graph = self.graph_at(values)
        for f in graph.factors:
            x = f.term.data.detach()
            states = [i for i, n in enumerate(f.term.inputs) if n in graph.variables]
            best = x.amax(states) if states else x
            if bool(x.isnan().any()) or not bool(best.isfinite().all()):
                bad.append(f.name)
        return tuple(bad)

    def bind(self, *args: Any, **kwargs: Any) -> "Density":
        """The density for other data; of the same shapes, dtypes and static arguments it reuses the compiled step."""
        return compile(self.program, *args, **kwargs)

    def __repr__(self) -> str:
        g, e = self.graph, self.layout.entries
        free = ", ".join(f"{x.name} {x.shape}" for x in e[:8]) + (", ..." if len(e) > 8 else "")
        how = self.compiled.mode + (f" because {self.compiled.reason}" if self.compiled.reason else "")
        return f"Density of {self.size} free values ({free or 'none'}); {len(g.variables)} discrete names summed out; {how}"

    def _evaluate(self, key: tuple[str, ...], values: Values) -> Tensor:
        checked = tuple(self.layout.check(values).values())
        if differentiated() and any(
            isinstance(s, ChainContract) and s.strategy not in ANY_ORDER for s in self.plan.steps
        ):
            key = ("any order", *key[1:])
        if self.compiled.mode == "eager":
            return self._eager(key, checked)
        step, constants = self._captured(key)
        return step.body(*checked, *constants)

    @property
    def _replayed(self) -> bool:
        """Whether factors can be had without running the program."""
        return self.compiled.mode != "eager" and all(isinstance(f.term, Term) for f in self.graph.factors)

    def _captured(self, key: tuple[str, ...]) -> tuple[Step, Constants]:
        return self._step(key, lambda: self._trace(key))

    def _step(self, key: Key, make: Callable[[], Step]) -> tuple[Step, Constants]:
        steps = self.compiled.steps
        if key not in steps:
            with uncollected(), outside(), untraced():
                steps[key] = make()
        if key not in self._constants:
            # Data may be inputs of a recording that goes on here, which then holds how the constants follow from them.
            with outside():
                self._constants[key] = steps[key].constants(self._inputs())
        return steps[key], self._constants[key]

    def _inputs(self) -> tuple[Tensor, ...]:
        return self.data if self.compiled.mode == "captured" else ()

    def _trace(self, key: tuple[str, ...]) -> Step:
        start = tuple(x.detach() for x in self.initial().values())
        if key == ("gradient",):
            forward, _ = self._captured(("total",))
            n = len(self._inputs())

            def gradient(vector: Tensor, *data: Tensor) -> tuple[Tensor, Tensor]:
                constants = forward.prologue(*data[:n])
                return _value_and_grad(lambda *values: forward.body(*values, *constants), self.layout, vector)

            return quick(trace(gradient, [self.layout.pack(self.initial())], self._inputs(), gradients=True), 1)
        chosen = None if key == ("factors",) else self._plan_for(key)

        def density(*inputs: Tensor) -> Tensor | list[Tensor]:
            values, data = inputs[: len(start)], inputs[len(start) :] or self.data
            graph = self._graph(values, data)
            return [f.term.data for f in graph.factors] if chosen is None else lower(graph, chosen)

        return trace(density, start, self._inputs())

    def _eager(self, key: tuple[str, ...], values: tuple[Tensor, ...]) -> Tensor:
        return lower(self._graph(values, self.data), self._plan_for(key))

    def _plan_for(self, key: tuple[str, ...]) -> Plan:
        if key == ("total",):
            return self.plan
        return plan(self.graph, keep=key[1:], strategy=ANY_ORDER[0] if key[0] == "any order" else self.plan.strategy)

    def _graph(self, values: Sequence[Tensor], data: Sequence[Tensor]) -> FactorGraph:
        named = dict(zip((e.name for e in self.layout.entries), values, strict=True))
        return _run(self.program, self.arguments, named, data, self.graph)


def with_terms(graph: FactorGraph, terms: Iterable[Tensor]) -> FactorGraph:
    """The graph with other numbers in its factors, of the same shapes."""
    pairs = zip(graph.factors, terms, strict=True)
    return replace(graph, factors=tuple(replace(f, term=_renumbered(f.term, x)) for f, x in pairs))


def _renumbered(term: Term, x: Tensor) -> Term:
    """The term with other numbers.

    Funsor derives the type of a new term from its inputs and looks it up among all others, which takes a query longer than
    its numbers do; here the type is known, and the numbers are new.
    """
    values = (x, tuple(term.inputs.items()), term.dtype)
    made: Term = type.__call__(type(term), *values)
    made._ast_values = values
    return made


_CACHE: "weakref.WeakKeyDictionary[Any, dict[Any, Compiled]]" = weakref.WeakKeyDictionary()


def compile(
    program: Callable[..., Any] | FactorGraph,
    *args: Any,
    strategy: str = "auto",
    memory_limit: float = MEMORY_LIMIT,
    **kwargs: Any,
) -> Density:
    """Compile a Pyro program (or a hand-made factor graph) into a `Density`.

    The program is captured, planned and traced once for each shape of its arguments; calling again with data of the same
    shapes, dtypes and static arguments reuses all of it. Tensors in the arguments (also inside lists, dicts, dataclasses
    and namespaces) may then change; tensors the program reaches in other ways (globals, closures) are constants.

    Args:
        program: a callable with Pyro primitives, as for Pyro's own inference.
        args, kwargs: its arguments.
        strategy: how chains are contracted, see `symhmm.compiler.plan.plan`.
        memory_limit: bytes that the largest step of the contraction may take.

    Raises:
        ProgramError, ShapeError, DataError: the program or its data cannot be captured; the text names the site.
        IntractableError: exact summation is out of reach; the text names sites, plate and the number of joint states.
    """
    keep_freed_memory()
    arguments = take_apart(args, kwargs)
    key = (arguments.signature, strategy, memory_limit)
    cache = _cache_of(program)
    if key in cache:
        compiled = cache[key]
        if compiled.mode == "captured":
            subsamples = tuple(compiled.graph.subsamples.values())
            return Density(program, arguments, compiled, arguments.tensors + subsamples)
    with uncollected():
        graph = (program if isinstance(program, FactorGraph) else capture(program, args, kwargs)).check()
        compiled = Compiled(graph, plan(graph, strategy=strategy, memory_limit=memory_limit), layout(graph))
        density = Density(program, arguments, compiled, arguments.tensors + tuple(graph.subsamples.values()))
        _capture_step(density)
    cache[key] = compiled
    return density


def _capture_step(density: Density) -> None:
    """Trace the total log-density in the most general mode that the program allows, and check it against the program."""
    compiled = density.compiled
    for mode in ("captured", "fixed data"):
        compiled.mode = mode
        try:
            density._captured(("total",))
        except StructureDependsOnInput as error:
            first_line = str(error).splitlines()[0]
            if not error.placeholder.startswith("data"):
                compiled.mode, compiled.reason = "eager", first_line
                warn(f"the program runs at each evaluation because {first_line}", SymhmmWarning, stacklevel=3)
                return
            compiled.reason = first_line
            continue
        break
    # A second point: what the trace wrongly holds constant shows up as a difference.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(density.size, generator=generator, dtype=density.layout.dtype)
    values = tuple(v.detach() for v in density.unpack(density.pack(density.initial()) + 0.1 * noise).values())
    wanted = density._eager(("total",), values)
    step, constants = density._captured(("total",))
    seen = step.body(*values, *constants)
    tolerance = 1e-8 if seen.dtype == torch.float64 else 1e-3
    if not torch.allclose(seen, wanted, rtol=tolerance, atol=tolerance, equal_nan=True):
        compiled.mode = "eager"
        compiled.reason = f"the captured step gives {seen.item():.8g} where the program gives {wanted.item():.8g}"
        warn(f"the program runs at each evaluation because {compiled.reason}", SymhmmWarning, stacklevel=3)


def _value_and_grad(f: Callable[..., Tensor], where: Layout, vector: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        free = vector.detach().requires_grad_()
        value = f(*where.unpack(free).values())
        if not value.requires_grad:
            return value.detach(), torch.zeros_like(free)
        (gradient,) = torch.autograd.grad(value, free, allow_unused=True, materialize_grads=True)
    return value.detach(), gradient


def _run(
    program: Callable[..., Any] | FactorGraph,
    arguments: Arguments,
    values: Values,
    data: Sequence[Tensor],
    template: FactorGraph,
) -> FactorGraph:
    if isinstance(program, FactorGraph):
        return program.at(values)
    n = len(arguments.tensors)
    args, kwargs = arguments.rebuild(tuple(data[:n]))
    subsamples = dict(zip(template.subsamples, data[n:], strict=True))
    graph = capture(program, args, kwargs, values=values, subsamples=subsamples, recipe=template.recipe)
    seen, wanted = [f.name for f in graph.factors], [f.name for f in template.factors]
    if seen != wanted:
        changed = sorted(set(seen) ^ set(wanted)) or seen
        raise ProgramError(
            f"the program's sites changed between two runs: {', '.join(map(repr, changed[:6]))}.",
            suggestion="make control flow independent of parameter values",
        )
    return graph


def _cache_of(program: Any) -> dict[Any, Compiled]:
    try:
        return _CACHE.setdefault(program, {})
    except TypeError:  # not hashable, or no weak references: such programs are compiled at each call
        return {}
