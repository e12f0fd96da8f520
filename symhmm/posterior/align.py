"""Alignment: one order of the states, whatever order a fit, a chain or a draw has found them in."""

from collections.abc import Mapping

import torch
from torch import Tensor

from symhmm.errors import GraphError


def order_by(values: Mapping[str, Tensor], name: str) -> Tensor:
    """States sorted by a parameter that has one number per state, smallest first.

    Returns:
        shape (K,), int64; entry k is the state that becomes number k, as `Answers.reordered` expects.

    Raises:
        GraphError: there is no such value, or it does not have one number per state.

    >>> order_by({"mean": torch.tensor([3.0, 1.0, 2.0])}, "mean")
    tensor([1, 2, 0])
    """
    if name not in values or values[name].dim() != 1:
        known = [n for n, x in values.items() if x.dim() == 1]
        raise GraphError(f"{name!r} does not have one number per state.", details=[f"these have: {', '.join(known)}"])
    return values[name].detach().argsort(stable=True)


def match(found: Tensor, reference: Tensor) -> Tensor:
    """States matched with those of a reference: the assignment of least total squared distance.

    Args:
        found: shape (K, D), what describes each state: means, standard deviations, or columns of state probabilities.
        reference: shape (K, D), the same of the reference.

    Returns:
        shape (K,), int64; entry k is the state of ``found`` that is state k of the reference.

    >>> match(torch.tensor([[5.0], [1.0]]), torch.tensor([[0.9], [4.0]]))
    tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment

    if found.shape != reference.shape or found.dim() != 2:
        raise GraphError(
            "states and reference cannot be matched.",
            details=[f"seen {tuple(found.shape)} and {tuple(reference.shape)}, wanted (K, D) twice"],
        )
    cost = (reference[:, None] - found[None]).square().sum(-1)
    _, states = linear_sum_assignment(cost.detach().numpy())
    return torch.as_tensor(states, dtype=torch.int64)
