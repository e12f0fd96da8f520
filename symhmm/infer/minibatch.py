"""Minibatches of individuals: at each step the density of a few members of a plate, scaled to stand for all of them.

The program says it in Pyro's own words, ``pyro.plate("individual", N, subsample_size=B) as i`` with data read at ``i``, since
only the program knows which of its data belong to whom. The members are an input of the compiled step. The mean of the
estimates over all batches of a partition is the estimate from everybody, for the value and for the gradient.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from symhmm.compiler.density import Density
from symhmm.errors import FitError
from symhmm.infer.guide import Block, Guide


@dataclass(frozen=True)
class Minibatches:
    """A plate of which a density takes a few members at a time.

    Args:
        plate: its name.
        full: number of its members; ``size`` of them are in a batch.

    >>> Minibatches("individual", 5, 2).partition()
    [tensor([0, 1]), tensor([2, 3]), tensor([4, 0])]
    """

    plate: str
    full: int
    size: int

    def draw(self, generator: torch.Generator) -> Tensor:
        """Members of a batch, drawn without replacement, shape (size,)."""
        return torch.randperm(self.full, generator=generator)[: self.size].sort().values

    def partition(self) -> list[Tensor]:
        """Batches in which each member is once; a last one that is not full begins again with the first."""
        return [torch.arange(k, k + self.size) % self.full for k in range(0, self.full, self.size)]

    def weights(self, block: Block, chosen: Tensor) -> Tensor:
        """How often each member of a block counts: N / B if it is in the batch, else 0, and 1 outside; shape (M,)."""
        total = torch.ones((), dtype=block.unit.dtype)
        for p, n in zip(block.plates, block.members, strict=True):
            if p == self.plate:
                own = block.unit.new_zeros(n).index_fill(0, chosen, self.full / self.size)
            else:
                own = block.unit.new_ones(n)
            total = total[..., None] * own
        return total.reshape(-1)

    def owners(self, made: Guide) -> Tensor:
        """For each free number of the guide the member of the plate to which it belongs, -1 if to none."""
        out = [torch.full((made.points.size,), -1)]
        for b in made.blocks:
            place = torch.full((), -1)
            for p, n in zip(b.plates, b.members, strict=True):
                own = torch.arange(n) if p == self.plate else torch.full((n,), -1)
                place = torch.maximum(place[..., None], own)
            out.append(place.reshape(-1)[b.owners])
        found = torch.cat(out)
        return torch.nn.functional.pad(found, (0, made.size - found.numel()), value=-1)


def minibatches(density: Density) -> Minibatches | None:
    """The plate from which the program takes a subsample; None if it takes all members.

    Raises:
        FitError: members cannot be exchanged, since the program's structure depends on its data.
    """
    graph = density.graph
    part = [p for p in graph.subsamples if graph.plates[p].scale != 1]
    if not part:
        return None
    if len(part) > 1:
        raise FitError(
            f"members of {len(part)} plates at once cannot be exchanged from step to step.",
            details=[f"subsampled plates: {', '.join(part)}"],
            suggestion="subsample_size in one of them",
        )
    if density.compiled.mode != "captured":
        raise FitError(
            f"members of the subsampled plate {part[0]!r} cannot be exchanged from step to step.",
            details=[density.compiled.reason],
            suggestion="the whole plate, without subsample_size",
        )
    plate = graph.plates[part[0]]
    return Minibatches(part[0], round(plate.size * plate.scale), plate.size)


def with_members(density: Density, plate: str, chosen: Tensor) -> Density:
    """The density of other members of a subsampled plate; it shares the compiled step."""
    count = len(density.arguments.tensors)
    pairs = zip(density.graph.subsamples, density.data[count:], strict=True)
    return replace(
        density, data=(*density.data[:count], *(chosen if p == plate else x for p, x in pairs)), _constants={}
    )
