"""Points: the parameters that a guide moves as they are, some of them tied or in order."""

from dataclasses import dataclass

from torch import Tensor

from symhmm.infer.restrict import Restriction


@dataclass(frozen=True, eq=False)
class Points:
    """Parameters as a function of a guide's first free numbers, which are zero at the start.

    Args:
        index: shape (P,), positions of the parameters in the density's vector.
        start: shape (n,), the coordinates that are moved: those of the restriction, or the parameters themselves.
        unit: shape (n,), the scale on which they are moved.
        restriction: what is tied or ordered among them.
    """

    index: Tensor
    start: Tensor
    unit: Tensor
    restriction: Restriction | None = None

    @property
    def size(self) -> int:
        """Free numbers n of the parameters."""
        return self.start.numel()

    def __call__(self, phi: Tensor) -> Tensor:
        """The unconstrained parameters, shape (P,), where the guide's free numbers are ``phi``."""
        moved = self.start + self.unit * phi[: self.size]
        return moved if self.restriction is None else self.restriction(moved)


def points(origin: Tensor, index: Tensor, unit: Tensor, restriction: Restriction | None = None) -> Points:
    """Parameters that start at ``origin[index]``, or as near to it as the restriction allows.

    Args:
        origin, unit: shape (size,), the start and the scale of each coordinate of the density.
        index: shape (P,), positions of the parameters, in the order in which ``restriction`` has them.

    >>> import torch
    >>> points(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([0, 2]), torch.ones(3))(torch.tensor([1.0, 0.0]))
    tensor([4., 7.])
    """
    if restriction is None:
        return Points(index, origin[index], unit[index])
    start = restriction.inverse(origin[index])
    steps = unit[index][restriction.first].clone()
    for c in restriction.chains:  # the logarithm of a step
        steps[c[1:]] = (steps[c[1:]] / start[c[1:]].exp()).clamp(max=1.0)
    return Points(index, start, steps, restriction)
