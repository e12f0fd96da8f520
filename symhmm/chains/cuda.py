"""The chain operator on CUDA: many short chains in one pass, few long ones as blocks, products of blocks, and blocks again.

A chain that is cut into blocks is itself a chain over its blocks, whose transition matrices are their products: the same
kernels carry messages and occupancies from block to block, and where there are many blocks, that chain is cut in turn. (The
parallel scan of Hassan, Sarkka and Garcia-Fernandez 2021, "Temporal Parallelization of Inference in Hidden Markov Models",
in three or five levels instead of a tree.)
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from symhmm.chains.cuda_steps import lanes_backward, lanes_forward
from symhmm.chains.layout import DEVICE_STATES, Layout, common_batch, device_layout_between, device_layout_of
from symhmm.chains.places import idle, places
from symhmm.errors import SymhmmError

# A warp holds at most so many bytes of numbers [from, to, lanes], 32 threads with registers for a few such tensors each, and
# at least so many numbers; within these limits there are programs for all schedulers of a device.
MOST_BYTES, FEWEST, SCHEDULERS = 4096, 128, 512
WARPS = 16

Rows = tuple[Tensor, int, tuple[int, ...]]


def forward(
    transition: Tensor, emission: Tensor, terminal: Tensor, length: int, blocks: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Message (*batch, S), and for the gradient: messages (*batch, blocks, steps + 1, S), those where blocks meet
    (*batch, 1, blocks + 1, S), and the products of blocks (*batch, blocks, S, S); the last two are empty for one block, and
    hold those of the chain of blocks behind their own where that is cut as well (then in as many pieces, each with its end).

    Raises:
        SymhmmError: more than 256 states.
    """
    states = transition.shape[-1]
    if states > DEVICE_STATES:
        raise SymhmmError(
            f"the chain kernel for CUDA takes at most {DEVICE_STATES} states.",
            details=[f"states seen {states}"],
            suggestion="strategy='sequential', whose steps are operations of torch",
        )
    batch = common_batch(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    layout = _layout(batch, length, states, blocks)
    ending = terminal.double().expand(*batch, states).contiguous()
    with torch.cuda.device_of(transition):
        message, *kept = _contracted(transition, emission, ending, layout)
    return message.to(transition.dtype), kept[0], kept[1], kept[2]


def _contracted(
    transition: Tensor, emission: Tensor, ending: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with the message in float64, from ``ending`` (*batch, S) in float64."""
    batch, states = layout.batch, layout.states
    if layout.blocks == 1:
        message, messages = _recursion(transition, emission, ending.reshape(-1, states), layout, keep=True)
        empty = transition.new_empty(*batch, 1, 0, states), transition.new_empty(*batch, 0, states, states)
        return message.reshape(ending.shape), messages, *empty
    # Step 1: a message for each state at the end of a block: the columns of its product.
    units = torch.eye(states, dtype=torch.float64, device=ending.device).log().repeat(layout.lanes, 1)
    columns, _ = _recursion(transition, emission, units, layout, keep=False, copies=states)
    products = columns.reshape(*batch, layout.blocks, states, states).mT
    peaks = products.amax((-2, -1))
    peaks = peaks.masked_fill(peaks == -torch.inf, 0)  # a number given to `torch.where` would be copied to the device
    products = (products - peaks[..., None, None]).to(transition.dtype).contiguous()
    # Step 2: the chain of blocks; its message is that of the whole chain.
    coarse = device_layout_between(layout)
    message, met, *deeper = _contracted(products, _nothing(products), ending, coarse)
    # Step 3: all steps, from where each block ends.
    ends = met[..., 1:, :].double().reshape(-1, states).contiguous()
    _, messages = _recursion(transition, emission, ends, layout, keep=True)
    between = met.reshape(*batch, 1, -1, states)
    if coarse.blocks > 1:
        between, products = torch.cat([between, deeper[0]], -2), torch.cat([products, deeper[1]], -3)
    return message + peaks.sum(-1, keepdim=True), messages, between, products


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
    starting = weight.to(transition.dtype).expand(*batch, states).contiguous()
    messages, between, products = (x.expand(*batch, *x.shape[-3:]) for x in (messages, between, products))
    with torch.cuda.device_of(transition):
        starting = _before_blocks(starting, between, products, layout)
        g_transition, g_emission, finishing = _occupancies(transition, emission, starting, messages, layout)
    g_terminal = finishing.reshape(*batch, layout.blocks, states)[..., -1, :].sum_to_size(terminal.shape)
    return g_transition, g_emission.sum_to_size(emission.shape).contiguous(), g_terminal.contiguous()


def _before_blocks(starting: Tensor, between: Tensor, products: Tensor, layout: Layout) -> Tensor:
    """Occupancies before every block [lanes, S] from those before every chain (*batch, S)."""
    batch, blocks, states = layout.batch, layout.blocks, layout.states
    if blocks > 1:
        # How the chain of blocks was cut: a batch may have grown since, and would now be cut otherwise.
        coarse = Layout(batch, blocks, states, 1, max(1, products.shape[-3] - blocks))
        own = coarse.blocks * (coarse.steps + 1)
        met = between[..., :own, :].reshape(*batch, coarse.blocks, coarse.steps + 1, states)
        before = _before_blocks(starting, between[..., own:, :], products[..., blocks:, :, :], coarse)
        products = products[..., :blocks, :, :]
        _, after, _ = _occupancies(products, _nothing(products), before, met, coarse)
        starting = torch.cat([starting[..., None, :], after[..., :-1, :]], -2)
    return starting.reshape(-1, states).contiguous()


def _recursion(
    transition: Tensor, emission: Tensor, ending: Tensor, layout: Layout, *, keep: bool, copies: int = 1
) -> tuple[Tensor, Tensor]:
    """Messages at the start of all lanes [lanes, S] in float64, and at all their steps (*batch, blocks, steps + 1, S)."""
    states, lanes = layout.states, ending.shape[0]
    steps = layout.steps + 1 if keep else 0
    messages = transition.new_empty(*layout.batch, layout.blocks, steps, states)
    result = torch.empty_like(ending)
    if lanes == 0:
        return result, messages
    f, e = _rows(transition, layout, copies), _rows(emission, layout, copies)
    size, block, warps = tile(states, lanes, transition.dtype)
    lanes_forward[(triton.cdiv(lanes, block),)](
        transition, f[0], f[1], *f[2], emission, e[0], e[1], *e[2], ending, _idle(layout, copies, ending.device),
        messages, result, lanes, layout.steps, 1,
        states=states, size=size, block=block, timed=transition.shape[-3] > 1, keep=keep,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    return result, messages


def _occupancies(
    transition: Tensor, emission: Tensor, starting: Tensor, messages: Tensor, layout: Layout
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the transition in its own shape and of the emission in full (*batch, n, S), and occupancies at the
    ends of the lanes [lanes, S]."""
    states, lanes, timed = layout.states, starting.shape[0], transition.shape[-3] > 1
    own, alike = _owners(transition, layout)
    g_emission = emission.new_empty(*layout.batch, layout.length, states)
    finishing = torch.empty_like(starting)
    if lanes == 0:
        return torch.zeros_like(transition), g_emission, finishing
    if timed:
        # Lanes that share a transition add to it.
        g_transition = (transition.new_empty if own else transition.new_zeros)(transition.shape)
    else:
        g_transition = transition.new_empty(*layout.batch, layout.blocks, states, states)
    f, e = _rows(transition, layout, 1), _rows(emission, layout, 1)
    gf, ge = _rows(g_transition, layout, 1) if timed else f, _rows(g_emission, layout, 1)
    size, block, warps = tile(states, lanes, transition.dtype)
    lanes_backward[(triton.cdiv(lanes, block),)](
        transition, f[0], f[1], *f[2], emission, e[0], e[1], *e[2], starting, _idle(layout, 1, starting.device),
        messages.contiguous(), g_transition, gf[0], gf[1], g_emission, ge[0], ge[1], finishing, lanes, layout.steps, 1,
        states=states, size=size, block=block, timed=timed, own=own, alike=alike,
        num_warps=warps, enable_fp_fusion=True,
    )  # fmt: skip
    if not timed:
        g_transition = g_transition.sum(-3, keepdim=True).sum_to_size(transition.shape).contiguous()
    return g_transition, g_emission, finishing


def _owners(transition: Tensor, layout: Layout) -> tuple[bool, bool]:
    """Whether each lane has gradients of a transition of every step for itself, and whether all lanes have the same."""
    chains = tuple(transition.shape[:-3])
    return chains == layout.batch, layout.blocks == 1 and all(n == 1 for n in chains)


def _layout(batch: tuple[int, ...], length: int, states: int, blocks: int | None) -> Layout:
    return (
        device_layout_of(batch, length, states) if blocks is None else Layout(tuple(batch), length, states, 1, blocks)
    )


def _nothing(products: Tensor) -> Tensor:
    """Emission terms of the chain of blocks: zeros."""
    return products.new_zeros(*(1 for _ in products.shape[:-2]), products.shape[-1])


def tile(states: int, lanes: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """States padded to a power of two, lanes in a program, and warps that share them.

    Programs of one warp up to 16 states: nothing in a step waits for another warp. A thread holds a whole lane of few states
    where there are many lanes; few lanes are spread over more programs.

    >>> from symhmm.chains.cuda import tile
    >>> tile(3, 100_000, torch.float32), tile(3, 20, torch.float32), tile(64, 100, torch.float32)
    ((4, 32, 1), (4, 8, 1), (64, 1, 8))
    """
    size = triton.next_power_of_2(states)
    block = max(1, min(32, MOST_BYTES // dtype.itemsize // size**2))
    while block > max(1, FEWEST // size**2) and triton.cdiv(lanes, block) < SCHEDULERS:
        block //= 2
    return size, block, min(WARPS, max(1, size**2 * 8 // MOST_BYTES))


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
