"""The chain operator of the max semiring on the CPU: from torch tensors to the numba kernels and back."""

from functools import partial

import torch
from torch import Tensor

from symhmm.chains.best_path import best_backward, best_forward
from symhmm.chains.layout import Layout, common_batch
from symhmm.chains.places import terms
from symhmm.chains.threads import cut, run, thread_count


def _layout(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> Layout:
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    return Layout(batch, length, transition.shape[-2], width=1, blocks=1)


def forward(transition: Tensor, emission: Tensor, terminal: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Message (*batch, S) and the first best next state (*batch, n, S), -1 where none is possible."""
    states, size = transition.shape[-2:]
    layout = _layout(transition, emission, terminal, length)
    message = transition.new_empty([*layout.batch, states])
    choices = transition.new_empty([*layout.batch, length, states], dtype=torch.int16)
    if layout.chains == 0:
        return message, choices
    (transitions, f), (emissions, e) = terms(transition, 3, layout), terms(emission, 2, layout)
    terminals, z = terms(terminal, 1, layout)
    seconds = layout.chains * length * states * (size + 2) * 1e-9
    run([
        partial(
            best_forward, first, last, size, states // size, length,
            transitions, f.chains, f.time, *f.inner, emissions, e.chains, e.time, *e.inner,
            terminals, z.chains, *z.inner, message.view(-1).numpy(), choices.view(-1).numpy(),
        )
        for first, last in cut(layout.chains, thread_count(seconds, layout.chains))
    ])  # fmt: skip
    return message, choices


def backward(
    weight: Tensor, transition: Tensor, emission: Tensor, terminal: Tensor, choices: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    states, size = transition.shape[-2:]
    layout = _layout(transition, emission, terminal, length)
    gradients = [torch.zeros(x.shape, dtype=x.dtype) for x in (transition, emission, terminal)]
    if layout.chains:
        (g_transition, f), (g_emission, e) = terms(gradients[0], 3, layout), terms(gradients[1], 2, layout)
        g_terminal, z = terms(gradients[2], 1, layout)
        best_backward(
            layout.chains, size, states // size, length, weight.expand(*layout.batch, states).reshape(-1).numpy(),
            choices.reshape(-1).numpy(), g_transition, f.chains, f.time, g_emission, e.chains, e.time,
            g_terminal, z.chains,
        )  # fmt: skip
    return gradients[0], gradients[1], gradients[2]
