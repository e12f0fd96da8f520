"""FactorGraph: the one intermediate representation, funsor terms with named inputs plus plates, chains and roles."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal

import funsor
from torch import Tensor
from torch.distributions import constraints

from symhmm.errors import GraphError

funsor.set_backend("torch")
# funsor 0.4.8 asks whether a value is a compiled function of JAX as soon as anyone has imported JAX, of a type that it
# only looks up for its own JAX backend.
if funsor.util._JAX_COMPILED_FUNCTION_TYPE is None:
    funsor.util._JAX_COMPILED_FUNCTION_TYPE = ()

Role = Literal["discrete latent", "observed", "continuous latent", "factor"]


@dataclass(frozen=True)
class Factor:
    """One log-factor of the model.

    Args:
        name: the site it comes from; ``y_{time}`` stands for the sites of all steps of the axis ``time``.
        term: real-valued funsor in nats; its inputs are names of discrete variables, plates and time axes.
        role: what the site is.
        frames: the plates and time axes in which the site stands. The term may be constant over some of them (an input
            is then missing): it still counts once per member.
        scale: weight set by ``poutine.scale`` (without subsampling, which belongs to the plate). Discrete latents and what
            depends on them must share one scale, which multiplies their summed-out log-density, as in Pyro.
    """

    name: str
    term: funsor.terms.Funsor
    role: Role
    frames: tuple[str, ...] = ()
    scale: float = 1.0

    @property
    def inputs(self) -> dict[str, int]:
        """Sizes of the discrete inputs."""
        return {k: d.size for k, d in self.term.inputs.items() if d.dtype != "real"}


@dataclass(frozen=True)
class Plate:
    """A conditionally independent context; ``scale`` is full size / subsample size, ``dim`` its Pyro dimension."""

    size: int
    scale: float = 1.0
    dim: int | None = None


@dataclass(frozen=True)
class Variable:
    """A discrete latent that is summed out.

    Args:
        size: number of values.
        frames: plates and time axes in which it stands.
        site: name of its site (``z_{time}`` in a vectorised loop).
        support: shape (size, *event), the values it takes.
    """

    size: int
    frames: tuple[str, ...] = ()
    site: str = ""
    support: Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class ChainVariable:
    """One discrete latent of a time loop, under the names that it has as seen from a step.

    Args:
        initial: names at the ``history`` concrete steps before the axis, oldest first; they are ordinary variables.
        previous: names as seen one to ``history`` steps later, oldest first (``z_{time-2}``, ``z_{time-1}``).
        current: name at the step itself (``z_{time}``).
        steps: the site name at each of the ``length`` steps of the axis.
    """

    initial: tuple[str, ...]
    previous: tuple[str, ...]
    current: str
    steps: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """A vectorised ``pyro.markov`` loop: factors that have ``axis`` as a frame hold for each of ``length`` steps.

    ``first`` is the position in the loop of the axis' first step; the steps before it are ordinary factors.
    """

    axis: str
    length: int
    history: int
    variables: tuple[ChainVariable, ...] = ()
    first: int = 0


@dataclass(frozen=True)
class Param:
    """A ``pyro.param``: fixed effect. ``value`` is the initial constrained value."""

    value: Tensor
    constraint: constraints.Constraint = constraints.real
    event_dim: int | None = None


@dataclass(frozen=True)
class Latent:
    """A continuous sample site: random effect if it stands in plates, fixed effect with a prior otherwise.

    ``value`` has shape ``batch_shape + event_shape`` of the site (in the units of the model); ``support`` is the
    constraint of its prior; ``plates`` maps the name of each plate to its (negative) batch dimension. ``size`` counts along
    subsampled plates are the full ones.
    """

    value: Tensor
    support: constraints.Constraint
    event_dim: int
    plates: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True)
class Observed:
    """An observed site: ``shape`` of its value (one step's in a vectorised loop) and the family of its distribution."""

    shape: tuple[int, ...]
    family: str
    frames: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoopNote:
    """How a time loop was captured: ``tier`` is vector, stacked or unrolled; ``reason`` says why it is not vector."""

    tier: str
    steps: int
    reason: str = ""


@dataclass(frozen=True)
class Recipe:
    """How the program was run to capture it, so that the same run can be repeated under a tracer without deciding again.

    Args:
        tier: vector, stacked or unrolled.
        max_plate_nesting: number of rightmost dimensions kept for plates.
        peel: concrete steps at the start of each loop beyond the usual ones (for branches such as ``if t < 3``).
        fresh: whether tensors made in a vectorised body start with the time dimension, so that they can be written in place.
    """

    tier: str = "vector"
    max_plate_nesting: int = 0
    peel: int = 0
    fresh: bool = False


@dataclass(frozen=True)
class FactorGraph:
    """A log-density as a product of named factors over discrete variables, plates and time axes.

    ``print(graph)`` shows the model to its author. ``check()`` raises `GraphError` when names or sizes disagree.
    """

    factors: tuple[Factor, ...]
    variables: Mapping[str, Variable] = field(default_factory=dict)
    plates: Mapping[str, Plate] = field(default_factory=dict)
    chains: Mapping[str, Chain] = field(default_factory=dict)
    params: Mapping[str, Param] = field(default_factory=dict)
    latents: Mapping[str, Latent] = field(default_factory=dict)
    observed: Mapping[str, Observed] = field(default_factory=dict)
    deterministic: Mapping[str, Any] = field(default_factory=dict)
    subsamples: Mapping[str, Tensor] = field(default_factory=dict)
    loops: Mapping[str, LoopNote] = field(default_factory=dict)
    recipe: Recipe | None = None

    def check(self) -> "FactorGraph":
        """Return the graph itself if names and sizes agree.

        Raises:
            GraphError: a name is unknown or used twice, sizes disagree, or a term varies over a plate outside of which it
                stands.

        >>> FactorGraph(()).check().factors
        ()
        """
        sizes = {n: p.size for n, p in self.plates.items()} | {n: c.length for n, c in self.chains.items()}
        twice = (set(sizes) & set(self.variables)) | {
            n for n, k in Counter(f.name for f in self.factors).items() if k > 1
        }
        if twice:
            raise GraphError(f"the name {sorted(twice)[0]!r} is used for two things.", suggestion="rename one of them")
        sizes |= {n: v.size for n, v in self.variables.items()}
        for owner, frames in [(f.name, f.frames) for f in self.factors] + [
            (n, v.frames) for n, v in self.variables.items()
        ]:
            for p in frames:
                if p not in self.plates and p not in self.chains:
                    raise GraphError(
                        f"{owner!r} stands in the unknown plate {p!r}.", details=[f"plates: {_names(self.plates)}"]
                    )
        for f in self.factors:
            for name, size in f.inputs.items():
                if name not in sizes:
                    raise GraphError(
                        f"factor {f.name!r} reads the unknown name {name!r}.", details=[f"known: {_names(sizes)}"]
                    )
                if size != sizes[name]:
                    raise GraphError(
                        f"factor {f.name!r} has the wrong size.", details=[f"{name}: seen {size}, wanted {sizes[name]}"]
                    )
                outside = ({name} if name not in self.variables else set(self.variables[name].frames)) - set(f.frames)
                if outside:
                    plate = sorted(outside)[0]
                    raise GraphError(
                        f"site {f.name!r} reads {name!r} outside of its plate {plate!r}.",
                        details=[f"{name!r} has one value for each of the {sizes[plate]} members"],
                        suggestion=f"move {f.name!r} inside the plate {plate!r}",
                    )
        for chain in self.chains.values():
            for c in chain.variables:
                widths = {n: sizes[n] for n in (*c.initial, *c.previous, c.current)}
                if len(set(widths.values())) > 1:
                    raise GraphError(f"the number of states changes along {chain.axis!r}.", details=[str(widths)])
        return self

    def at(self, values: Mapping[str, Tensor]) -> "FactorGraph":
        """The graph with the real-valued inputs of its terms replaced by ``values``."""
        factors = []
        for f in self.factors:
            wanted = {n: funsor.Tensor(values[n]) for n, d in f.term.inputs.items() if d.dtype == "real"}
            factors.append(replace(f, term=f.term(**wanted)) if wanted else f)
        return replace(self, factors=tuple(factors))

    def __repr__(self) -> str:
        rows = [("site", "role", "inputs", "stands in")]
        for f in self.factors:
            inputs = " ".join(f"{n}:{s}" for n, s in f.inputs.items())
            rows.append((f.name, f.role, inputs or "-", " ".join(f.frames) or "-"))
        rows += [(n, "param", f"shape {tuple(p.value.shape)}", "-") for n, p in self.params.items()]
        widths = [max(len(r[c]) for r in rows) for c in range(4)]
        lines = ["FactorGraph"] + [
            "  " + "  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in rows
        ]
        for name, p in self.plates.items():
            lines.append(f"  plate {name}: {p.size} members" + (f", scale {p.scale:g}" if p.scale != 1 else ""))
        for name, note in self.loops.items():
            reason = f" because {note.reason}" if note.reason else ""
            lines.append(f"  loop {name}: {note.steps} steps, {note.tier}{reason}")
        for name, c in self.chains.items():
            links = (
                ", ".join(f"{v.previous[0] if v.previous else 'nothing'} -> {v.current}" for v in c.variables)
                or "no variable"
            )
            lines.append(f"  axis {name}: {c.length} steps from step {c.first}, history {c.history}: {links}")
        return "\n".join(lines)


def _names(names: Mapping[str, Any]) -> str:
    return ", ".join(list(names)[:12]) or "none"
