"""Amortised guides: a network that says from what is known of a member where its latents lie.

All members share the network's weights, so that a fit of many individuals has few free numbers, and a new individual needs
one pass through the network.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from symhmm.errors import FitError
from symhmm.infer.guide import Block, Guide, Moments, arrangement
from symhmm.infer.points import Points


@dataclass(frozen=True, eq=False)
class Amortised:
    """A guide to ask for: ``symhmm.fit(..., method="svi", guide=Amortised(network, features))``.

    Args:
        network: from features, shape (M, F), to (M, 2 D): the means of the D latents of each member, then the logarithms of
            their standard deviations, both relative to the start and its scale.
        features: shape (M, F), one row for each member in the order of the plate.
        plate: whose members they are; may be left out if there is only one with latents.
    """

    network: nn.Module
    features: Tensor
    plate: str = ""


@dataclass(frozen=True, eq=False)
class AmortisedGuide(Guide):
    """A `Guide` one of whose blocks is predicted; the network's weights are the last numbers of ``phi``."""

    asked: Amortised
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Length of ``phi``."""
        return super().size + sum(prod(s) for s in self.shapes)

    def initial(self) -> Tensor:
        """Zeros for the points and the other blocks, and the network's own weights."""
        weights = [p.detach().reshape(-1).to(self.origin.dtype) for p in self.asked.network.parameters()]
        return torch.cat([self.origin.new_zeros(super().size), *weights])

    def block_moments(self, b: Block, pieces: Sequence[Tensor], phi: Tensor) -> Moments:
        """What the network says of its block; the others as in any guide."""
        if b.family != "network":
            return super().block_moments(b, pieces, phi)
        flat = phi[super().size :].split([prod(s) for s in self.shapes])
        weights = {n: x.reshape(s) for n, x, s in zip(self.names, flat, self.shapes, strict=True)}
        out = torch.func.functional_call(self.asked.network, weights, (self.asked.features,))
        loc, log_scale = out.split(b.index.shape[1], dim=-1)
        return Moments(self.origin[b.index] + b.unit * loc, b.unit * log_scale.exp())


def amortised(
    asked: Amortised, origin: Tensor, points: Points, blocks: tuple[Block, ...], unit: Tensor
) -> AmortisedGuide:
    """The guide that was asked for; arguments as of `symhmm.infer.guide.guide`.

    Raises:
        FitError: there is no such plate, or the network's output has another shape than (M, 2 D).
    """
    chosen = [b for b in blocks if b.plates and asked.plate in ("", *b.plates)]
    if len(chosen) != 1:
        plates = [", ".join(b.plates) for b in blocks if b.plates]
        raise FitError(
            f"an amortised guide is for the latents of one plate, and {asked.plate or 'none'!r} was named.",
            details=[f"plates with latents: {'; '.join(plates) or 'none'}"],
            suggestion="Amortised(network, features, plate=...)",
        )
    m, d = chosen[0].index.shape
    with torch.no_grad():
        seen = tuple(asked.network(asked.features).shape)
    if seen != (m, 2 * d):
        raise FitError(
            f"the network of the guide returns shape {seen}.",
            details=[f"wanted {(m, 2 * d)}: mean and log scale of {d} latents of {m} members of {chosen[0].plates}"],
            suggestion=f"a last layer of {2 * d} outputs, and features with {m} rows",
        )
    rest, order = arrangement(origin, points.index, blocks)
    own = tuple(b.scaled(unit, "network" if b is chosen[0] else b.family) for b in blocks)
    names, weights = zip(*asked.network.named_parameters(), strict=True)
    shapes = tuple(tuple(w.shape) for w in weights)
    return AmortisedGuide(origin, points, own, rest, order, asked, names, shapes)
