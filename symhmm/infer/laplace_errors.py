"""How uncertain the integrated effects are when the values beside them are estimates, too."""

import torch
from torch import Tensor

from symhmm.infer.information import Information
from symhmm.infer.laplace import Laplace
from symhmm.infer.target import Target

STEP = 1e-4  # of a difference, relative to max(1, size)


def effect_errors(marginal: Laplace, goal: Target, found: Information) -> Tensor:
    """Standard errors of the effects around their conditional modes, unconstrained, shape (M, D).

    The conditional variance given the other values, plus that of the modes as these vary: ``inv(H) + J V J'`` with J the
    derivative of the modes and V the covariance from the information (Kass and Steffey 1989, section 3). Values in flat
    directions and at an edge do not vary. Costs two searches for modes for each value.

    Args:
        marginal: whose effects they are.
        goal: the target on it, started at its maximum.
        found: information there.
    """
    members, start = marginal.members, goal.start

    def modes(vector: Tensor) -> Tensor:
        with torch.no_grad():
            return marginal.modes_at(members.flat(goal.values(vector))).u

    with torch.no_grad():
        root = marginal.modes_at(members.flat(goal.values(start))).root
    moving = (found.covariance.diagonal() > 0).nonzero()[:, 0]
    slopes = torch.zeros(*members.index.shape, len(moving), dtype=root.dtype)
    for k, position in enumerate(goal.free[moving].tolist()):
        step = torch.zeros_like(start)
        step[position] = STEP * max(1.0, abs(float(start[position])))
        slopes[..., k] = (modes(start + step) - modes(start - step)) / (2 * step[position])
    covariance = found.covariance[moving][:, moving].to(root.dtype)
    return (root.square().sum(-1) + ((slopes @ covariance) * slopes).sum(-1)).sqrt()
