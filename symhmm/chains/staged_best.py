"""The operator of the max semiring for chains whose steps go in stages, on the CPU."""

import torch
from torch import Tensor

from symhmm.chains.places import memory
from symhmm.chains.stage_paths import best_stages_backward
from symhmm.chains.staged import call_for
from symhmm.chains.staged_paths import run_choices
from symhmm.chains.stages import Stages


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, code: list[int]
) -> tuple[Tensor, Tensor]:
    """Message (*batch, S) and the number of the best term of every sum of all stages (*batch, n, sums).

    Arguments are those of `symhmm.chains.staged.forward`.
    """
    call = call_for((transition, emission, terminal), length, Stages.decoded(code))
    found = run_choices(call, transition, emission, terminal)
    choices = found.choices.permute(2, 0, 1).to(torch.int16).contiguous()
    choices = choices.view(*call.layout.batch, *choices.shape[1:])
    # The sums of the last stage are the initial states: where no path begins, the gradient ends at once.
    first = choices[..., 0, -call.layout.states :]
    first[found.message == -torch.inf] = -1
    return found.message.to(transition.dtype), choices


def backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    choices: Tensor,
    length: int,
    code: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()``: the weights along the best paths, none where no path is possible."""
    call = call_for((transition, emission, terminal), length, Stages.decoded(code))
    zeros = [torch.zeros(x.shape, dtype=x.dtype) for x in (transition, emission, terminal)]
    gradients = zeros[0], zeros[1], zeros[2]
    layout, table = call.layout, call.tables
    if layout.chains:
        own = call_for(gradients, length, Stages.decoded(code))
        every = choices.expand(*layout.batch, *choices.shape[-2:]).reshape(-1).numpy()
        weights = weight.expand(*layout.batch, layout.states).reshape(-1).numpy()
        best_stages_backward(
            layout.chains, layout.states, length, table.stages, table.numbers, own.entry, table.largest, table.sums,
            weights, every,
            memory(gradients[0], own.transition.extent), own.transition.chains, own.transition.time,
            memory(gradients[1], own.emission.extent), own.emission.chains, own.emission.time,
            memory(gradients[2], own.terminal.extent), own.terminal.chains,
        )  # fmt: skip
    return gradients
