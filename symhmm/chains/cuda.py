"""The chain operator on CUDA: many short chains in one pass, few long ones as blocks, products of blocks, and blocks again.

A chain that is cut into blocks is itself a chain over its blocks, whose transition matrices are their products: the same
kernels carry messages and occupancies from block to block. (The parallel scan of Hassan, Sarkka and Garcia-Fernandez 2021,
"Temporal Parallelization of Inference in Hidden Markov Models", in three levels instead of a tree.)
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from symhmm.chains.cuda_steps import lanes_backward, lanes_forward
from symhmm.chains.layout import Layout, common_batch, device_layout_of
from symhmm.chains.places import idle, places

TILE = 4096  # numbers [lanes, from, to] that one program holds

Rows = tuple[Tensor, int, tuple[int, ...]]


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, blocks: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: messages (*batch, blocks, steps + 1, S), those where blocks meet
    (*batch, 1, blocks + 1, S), and the products of blocks (*batch, blocks, S, S); the last two are empty for one block."""
    states = transition.shape[-1]
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    layout = _layout(batch, length, states, blocks)
    ending = terminal.double().expand(*batch, states).reshape(-1, states).contiguous()
    if layout.blocks == 1:
        message, messages = _recursion(transition, emission, ending, layout, keep=True)
        empty = transition.new_empty(*batch, 1, 0, states), transition.new_empty(*batch, 0, states, states)
        return message.reshape(*batch, states).to(transition.dtype), messages, *empty
    # Step 1: a message for each state at the end of a block: the columns of its product.
    units = torch.eye(states, dtype=torch.float64, device=terminal.device).log().repeat(layout.lanes, 1)
    columns, _ = _recursion(transition, emission, units, layout, keep=False, copies=states)
    products = columns.reshape(*batch, layout.blocks, states, states).mT
    peaks = products.amax((-2, -1))
    peaks = torch.where(peaks > -torch.inf, peaks, 0)
    products = (products - peaks[..., None, None]).to(transition.dtype).contiguous()
    # Step 2: the chain of blocks; its message is that of the whole chain.
    nothing = _nothing(products)
    message, between = _recursion(products, nothing, ending, _layout(batch, layout.blocks, states, 1), keep=True)
    message = message.reshape(*batch, states) + peaks.sum(-1, keepdim=True)
    # Step 3: all steps, from where each block ends.
    ends = between[..., 0, 1:, :].double().reshape(-1, states).contiguous()
    _, messages = _recursion(transition, emission, ends, layout, keep=True)
    return message.to(transition.dtype), messages, between, products


def backward(
    weight: Tensor,
    transition: Tensor,
    emission: Tensor,
    terminal: Tensor,
    messages: Tensor,
    between: Tensor,
    products: Tensor,
    length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``(weight * message).sum()`` in the shapes of transition, emission and terminal."""
    states = transition.shape[-1]
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    layout = _layout(batch, length, states, messages.shape[-3])
    starting = weight.expand(*batch, states).reshape(-1, states).contiguous()
    if layout.blocks > 1:
        products, between = (x.expand(*batch, *x.shape[-3:]).contiguous() for x in (products, between))
        coarse = _layout(batch, layout.blocks, states, 1)
        _, after, _ = _occupancies(products, _nothing(products), starting, between, coarse)
        before = torch.cat([starting.reshape(*batch, 1, states), after[..., :-1, :]], -2)
        starting = before.reshape(-1, states).contiguous()
    messages = messages.expand(*batch, *messages.shape[-3:]).contiguous()
    g_transition, g_emission, finishing = _occupancies(transition, emission, starting, messages, layout)
    g_terminal = finishing.reshape(*batch, layout.blocks, states)[..., -1, :].sum_to_size(terminal.shape)
    return g_transition, g_emission.sum_to_size(emission.shape).contiguous(), g_terminal.contiguous()


def _recursion(
    transition: Tensor, emission: Tensor, ending: Tensor, layout: Layout, *, keep: bool, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """Messages at the start of all lanes [lanes, S] in float64, and at all their steps (*batch, blocks, steps + 1, S)."""
    states, lanes = layout.states, ending.shape[0]
    f, e = _rows(transition, layout, copies), _rows(emission, layout, copies)
    steps = layout.steps + 1 if keep else 0
    messages = transition.new_empty(*layout.batch, layout.blocks, steps, states)
    result = torch.empty_like(ending)
    size, block = _tile(states)
    lanes_forward[(triton.cdiv(lanes, block),)](
        transition, f[0], f[1], *f[2], emission, e[0], e[1], *e[2], ending, _idle(layout, copies, ending.device),
        messages, result, lanes, layout.steps,
        states=states, size=size, block=block, timed=transition.shape[-3] > 1, keep=keep,
    )  # fmt: skip
    return result, messages


def _occupancies(
    transition: Tensor, emission: Tensor, starting: Tensor, messages: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the transition in its own shape and of the emission in full (*batch, n, S), and occupancies at the
    ends of the lanes [lanes, S]."""
    states, lanes, timed = layout.states, starting.shape[0], transition.shape[-3] > 1
    f, e = _rows(transition, layout, 1), _rows(emission, layout, 1)
    g_emission = emission.new_empty(*layout.batch, layout.length, states)
    if timed:
        g_transition = torch.zeros(transition.shape, dtype=transition.dtype, device=transition.device)
    else:
        g_transition = transition.new_empty(*layout.batch, layout.blocks, states, states)
    gf, ge = _rows(g_transition, layout, 1) if timed else f, _rows(g_emission, layout, 1)
    finishing = torch.empty_like(starting)
    size, block = _tile(states)
    lanes_backward[(triton.cdiv(lanes, block),)](
        transition, f[0], f[1], *f[2], emission, e[0], e[1], *e[2], starting, _idle(layout, 1, starting.device), messages,
        g_transition, gf[0], gf[1], g_emission, ge[0], ge[1], finishing, lanes, layout.steps,
        states=states, size=size, block=block, timed=timed,
    )  # fmt: skip
    if not timed:
        g_transition = g_transition.sum(-3, keepdim=True).sum_to_size(transition.shape).contiguous()
    return g_transition, g_emission, finishing


def _layout(batch: tuple[int, ...], length: int, states: int, blocks: int | None) -> Layout:
    return (
        device_layout_of(batch, length, states) if blocks is None else Layout(tuple(batch), length, states, 1, blocks)
    )


def _nothing(products: Tensor) -> Tensor:
    """Emission terms of the chain of blocks: zeros."""
    return products.new_zeros(*(1 for _ in products.shape[:-2]), products.shape[-1])


def _tile(states: int) -> tuple[int, int]:
    """States padded to a power of two, and lanes in a program."""
    size = triton.next_power_of_2(states)
    return size, max(1, min(64, TILE // size**2))


def _rows(x: Tensor, layout: Layout, copies: int) -> Rows:
    """Where each lane finds its terms: starts of the lanes, and strides over time and states."""
    return _rows_of(x.shape, x.stride(), layout, copies, x.device)


@lru_cache(maxsize=256)
def _rows_of(size: torch.Size, stride: tuple[int, ...], layout: Layout, copies: int, device: torch.device) -> Rows:
    found = places(size, stride, True, layout, copies)
    return torch.from_numpy(found.lanes.copy()).to(device), found.time, found.inner


@lru_cache(maxsize=256)
def _idle(layout: Layout, copies: int, device: torch.device) -> Tensor:
    return torch.from_numpy(idle(layout, copies).astype("int8")).to(device)
