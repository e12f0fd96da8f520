"""The steps of a plan: frozen values made of names and integers, printable before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from symhmm.chains.stages import Stages


@dataclass(frozen=True)
class Operand:
    """What a plan knows of a term: ``inputs`` with sizes, the ``frames`` it stands in, the sites it is made of."""

    index: int
    inputs: Mapping[str, int]
    frames: frozenset[str]
    sites: tuple[str, ...]

    @property
    def size(self) -> int:
        return prod(self.inputs.values())


@dataclass(frozen=True)
class Contract:
    """Multiply ``operands`` and sum out ``variables``."""

    operands: tuple[int, ...]
    variables: tuple[str, ...]
    result: Operand
    flops: int
    elements: int
    why: str = "local variables"


@dataclass(frozen=True)
class PlateProduct:
    """Multiply over the members of ``plates`` (name, size, subsampling scale); missing inputs count ``size`` times."""

    operands: tuple[int, ...]
    plates: tuple[tuple[str, int, float], ...]
    result: Operand
    flops: int
    elements: int
    why: str = "no variable of the plate is left"


@dataclass(frozen=True)
class ChainContract:
    """Contract the time axis ``axis`` to a message over its initial states.

    ``initial[i]``, ``previous[i]`` list the names ``history`` ... 1 steps back (oldest first) and ``current`` the names at
    the step; the joint state of a step is the product of the chain's variables in this order. With ``stages`` the
    variables are summed out one after the other, ``groups[k]`` are the transition operands of stage k.
    """

    operands: tuple[int, ...]
    axis: str
    length: int
    history: int
    initial: tuple[tuple[str, ...], ...]
    previous: tuple[tuple[str, ...], ...]
    current: tuple[str, ...]
    transition: tuple[int, ...]
    emission: tuple[int, ...]
    batch: tuple[str, ...]
    strategy: str
    result: Operand
    flops: int
    elements: int
    why: str
    stages: Stages | None = None
    groups: tuple[tuple[int, ...], ...] = ()


Step = Contract | PlateProduct | ChainContract


@dataclass(frozen=True)
class Plan:
    """Steps of a contraction, in order; ``outputs`` are operands whose weighted sum is the log-density.

    Prints one row per step with its cost, like ``opt_einsum``'s ``PathInfo``.
    """

    operands: tuple[Operand, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[int, float], ...]
    keep: frozenset[str]
    strategy: str

    @property
    def flops(self) -> int:
        """Multiply-adds of one evaluation."""
        return sum(s.flops for s in self.steps)

    @property
    def largest(self) -> int:
        """Elements of the largest intermediate."""
        return max((s.elements for s in self.steps), default=1)

    @property
    def peak_bytes(self) -> int:
        """Bytes of the largest step at 8 bytes an element: its operands, its intermediate and its result."""
        sizes = {o.index: o.size for o in self.operands} | {s.result.index: s.result.size for s in self.steps}
        return 8 * max((sum(sizes[i] for i in s.operands) + s.elements for s in self.steps), default=1)

    def __repr__(self) -> str:
        head = f"Plan: {len(self.steps)} steps, {self.flops:.3g} flops, largest intermediate {self.largest:.3g} elements, peak "
        rows = [("step", "eliminates", "over", "flops", "elements", "why")]
        for s in self.steps:
            rows.append(
                (_kind(s), eliminated(s), _shape(s.result.inputs), f"{s.flops:.3g}", f"{s.elements:.3g}", s.why)
            )
        widths = [max(len(r[c]) for r in rows) for c in range(len(rows[0]))]
        table = ["  " + "  ".join(text.ljust(w) for text, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([head + in_bytes(self.peak_bytes), *table])


def _kind(step: Step) -> str:
    return {Contract: "sum", PlateProduct: "plate", ChainContract: "chain"}[type(step)]


def eliminated(step: Step) -> str:
    """What a step sums out, in words."""
    match step:
        case Contract():
            return ", ".join(step.variables) or "nothing (product)"
        case PlateProduct():
            return ", ".join(p for p, _, _ in step.plates)
        case ChainContract():
            return f"{', '.join(step.current)} along {step.axis} ({step.strategy})"


def _shape(inputs: Mapping[str, int]) -> str:
    return " ".join(f"{n}:{s}" for n, s in inputs.items()) or "-"


def in_bytes(n: float) -> str:
    """A number of bytes for people.

    >>> in_bytes(3 * 2**20)
    '3 MiB'
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"
