"""Chain kernels for CUDA (Triton), in log space: each program carries some lanes through all their steps.

A lane is a chain, or a block of a long one. Terms are read where `symhmm.chains.places.Places` says; the ``states`` are
padded to ``size``, a power of two, with ``-inf``.
"""

import triton
import triton.language as tl


@triton.jit
def _matrix(transition, row, step, t_time, t_from, t_to, inside, size: tl.constexpr):
    """Transition terms [lanes, from, to] of one step."""
    k = tl.arange(0, size)
    offset = step * t_time + k[None, :, None] * t_from + k[None, None, :] * t_to
    return tl.load(transition + row[:, None, None] + offset, mask=inside, other=float("-inf"))


@triton.jit
def _largest(x, axis: tl.constexpr):
    """The maximum, and 0 where all is impossible."""
    peak = tl.max(x, axis)
    return tl.where(peak > float("-inf"), peak, 0.0)


@triton.jit
def lanes_forward(
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    ending, idle, messages, result,
    lanes, steps,
    states: tl.constexpr, size: tl.constexpr, block: tl.constexpr, timed: tl.constexpr, keep: tl.constexpr,
):  # fmt: skip
    """Messages from the end of each lane to its start.

    ``ending`` [lanes, S] and ``result`` [lanes, S] are nats in float64. ``messages`` [lanes, steps + 1, S] are kept with
    their largest at 0. ``idle`` marks lanes with one step less, which skip the last.
    """
    lane = tl.program_id(0) * block + tl.arange(0, block)
    k = tl.arange(0, size)
    live = lane < lanes
    inside = live[:, None] & (k < states)[None, :]
    square = inside[:, :, None] & (k < states)[None, None, :]
    f_row, row = tl.load(t_row + lane, mask=live, other=0), tl.load(e_row + lane, mask=live, other=0)
    short = tl.load(idle + lane, mask=live, other=0)
    end = tl.load(ending + lane[:, None] * states + k[None, :], mask=inside, other=float("-inf"))
    norm = _largest(end, 1)
    after = (end - norm[:, None]).to(messages.dtype.element_ty)
    matrix = _matrix(transition, f_row, 0, t_time, t_from, t_to, square, size)
    for back in range(steps):
        step = steps - 1 - back
        if keep:
            at = (lane[:, None] * (steps + 1) + step + 1) * states + k[None, :]
            tl.store(messages + at, after, mask=inside)
        e = tl.load(emission + row[:, None] + step * e_time + k[None, :] * e_to, mask=inside, other=float("-inf"))
        if timed:
            matrix = _matrix(transition, f_row, step, t_time, t_from, t_to, square, size)
        moves = matrix + (e + after)[:, None, :]
        peak = _largest(moves, 2)
        total = tl.sum(tl.exp(moves - peak[:, :, None]), 2)
        before = tl.where(total > 0, peak + tl.log(tl.where(total > 0, total, 1.0)), float("-inf"))
        skips = (short > 0) & (back == 0)
        high = tl.where(skips, 0.0, _largest(before, 1))
        after = tl.where(skips[:, None], after, before - high[:, None])
        norm += high.to(tl.float64)
    if keep:
        tl.store(messages + lane[:, None] * (steps + 1) * states + k[None, :], after, mask=inside)
    tl.store(result + lane[:, None] * states + k[None, :], after.to(tl.float64) + norm[:, None], mask=inside)


@triton.jit
def lanes_backward(
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    starting, idle, messages,
    g_transition, gt_row, gt_time, g_emission, ge_row, ge_time, finishing,
    lanes, steps,
    states: tl.constexpr, size: tl.constexpr, block: tl.constexpr, timed: tl.constexpr,
):  # fmt: skip
    """Occupancies from the start of each lane to its end, and the gradients.

    ``starting`` and ``finishing`` [lanes, S] are occupancies. The gradient of the emission terms is written, one row for
    each lane and step; so is that of a constant transition, one matrix for each lane; that of a transition of every step is
    added, since lanes may share it.
    """
    lane = tl.program_id(0) * block + tl.arange(0, block)
    k = tl.arange(0, size)
    live = lane < lanes
    inside = live[:, None] & (k < states)[None, :]
    square = inside[:, :, None] & (k < states)[None, None, :]
    f_row, row = tl.load(t_row + lane, mask=live, other=0), tl.load(e_row + lane, mask=live, other=0)
    gf_row, g_row = tl.load(gt_row + lane, mask=live, other=0), tl.load(ge_row + lane, mask=live, other=0)
    short = tl.load(idle + lane, mask=live, other=0)
    here = tl.load(starting + lane[:, None] * states + k[None, :], mask=inside, other=0.0)
    matrix = _matrix(transition, f_row, 0, t_time, t_from, t_to, square, size)
    counts = tl.zeros([block, size, size], dtype=messages.dtype.element_ty)
    entry = k[None, :, None] * states + k[None, None, :]
    for step in range(steps):
        at = (lane[:, None] * (steps + 1) + step + 1) * states + k[None, :]
        after = tl.load(messages + at, mask=inside, other=float("-inf"))
        e = tl.load(emission + row[:, None] + step * e_time + k[None, :] * e_to, mask=inside, other=float("-inf"))
        if timed:
            matrix = _matrix(transition, f_row, step, t_time, t_from, t_to, square, size)
        moves = matrix + (e + after)[:, None, :]
        weights = tl.exp(moves - _largest(moves, 2)[:, :, None])
        total = tl.sum(weights, 2)
        flow = (here / tl.where(total > 0, total, 1.0))[:, :, None] * weights
        skips = (short > 0) & (step == steps - 1)
        writes = inside & (skips == 0)[:, None]
        there = tl.sum(flow, 1)
        tl.store(g_emission + g_row[:, None] + step * ge_time + k[None, :], there, mask=writes)
        if timed:
            to = g_transition + gf_row[:, None, None] + step * gt_time + entry
            tl.atomic_add(to, flow, mask=square & writes[:, :, None])
        else:
            counts += tl.where(skips[:, None, None], 0.0, flow)
        here = tl.where(skips[:, None], here, there)
    if not timed:
        tl.store(g_transition + lane[:, None, None] * states * states + entry, counts, mask=square)
    tl.store(finishing + lane[:, None] * states + k[None, :], here, mask=inside)
