"""Chain kernels for CUDA (Triton), in log space: each program carries some lanes through all their steps.

A lane is a chain, or a block of a long one. Terms are read where `symhmm.chains.places.Places` says; the ``states`` are
padded to ``size``, a power of two, with ``-inf``. Places in memory are counted in 64 bits: a million steps of a thousand
chains are more numbers than 32 bits can count. What the next step needs is asked for before this one is worked out, since
memory answers as slowly as a step takes.

Lanes are the last axis, so that neighbouring threads hold different lanes and the sums over states need no word from another
thread. Triton would rather have the threads lie as the numbers do in memory, states side by side; so for few states it is not
told: the distance ``one`` between states is an argument that it does not look into. (Machine code of a step of 32 chains of
three states: 331 instructions in place of 1060.)
"""

import triton
import triton.language as tl

LANEWISE = tl.constexpr(16)  # states, padded, up to which neighbouring threads hold different lanes


@triton.jit
def _lanes(lanes, one, states: tl.constexpr, size: tl.constexpr, block: tl.constexpr):
    """The lanes of this program, its states, and which [lanes], [from, lanes] and [from, to, lanes] there are."""
    lane = (tl.program_id(0) * block + tl.arange(0, block)).to(tl.int64)
    k = tl.arange(0, size).to(tl.int64)
    if size <= LANEWISE:
        k *= one  # 1, and Triton does not know
    live = lane < lanes
    inside = (k < states)[:, None] & live[None, :]
    return lane, k, live, inside, inside[:, None, :] & (k < states)[None, :, None]


@triton.jit
def _terms(place, mask):
    """Log-factors, ``-inf`` where there are none."""
    return tl.load(place, mask=mask, other=float("-inf"))


@triton.jit
def _largest(x, axis: tl.constexpr):
    """The maximum, and 0 where all is impossible."""
    peak = tl.max(x, axis)
    return tl.where(peak > float("-inf"), peak, 0.0)


@triton.jit
def _log(x):
    """Of sums of exponentials: ``-inf`` of 0; what is not a number stays so."""
    return tl.where(x == 0, float("-inf"), tl.log(tl.where(x == 0, 1.0, x)))


@triton.jit(do_not_specialize=["lanes", "steps", "one"])
def lanes_forward(
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    ending, idle, messages, result,
    lanes, steps, one,
    states: tl.constexpr, size: tl.constexpr, block: tl.constexpr, timed: tl.constexpr, keep: tl.constexpr,
):  # fmt: skip
    """Messages from the end of each lane to its start.

    ``ending`` [lanes, S] and ``result`` [lanes, S] are nats in float64. ``messages`` [lanes, steps + 1, S] are kept with
    their largest at 0. ``idle`` marks lanes with one step less, which skip the last.
    """
    lane, k, live, inside, square = _lanes(lanes, one, states, size, block)
    count = steps.to(tl.int64)
    short = tl.load(idle + lane, mask=live, other=0) > 0
    rows = emission + tl.load(e_row + lane, mask=live, other=0)[None, :] + k[:, None] * e_to
    moving = transition + tl.load(t_row + lane, mask=live, other=0)[None, None, :]
    moving += k[:, None, None] * t_from + k[None, :, None] * t_to
    kept = messages + lane[None, :] * (count + 1) * states + k[:, None]
    at = lane[None, :] * states + k[:, None]
    end = _terms(ending + at, inside)
    norm = _largest(end, 0)
    after = (end - norm[None, :]).to(messages.dtype.element_ty)
    last = count - 1
    e = _terms(rows + last * e_time, inside)
    matrix = _terms(moving + last * t_time, square)
    for back in range(count):
        step = last - back
        coming = tl.maximum(step - 1, 0)
        if keep:
            tl.store(kept + (step + 1) * states, after, mask=inside)
        moves = matrix + (e + after)[None, :, :]
        e = _terms(rows + coming * e_time, inside)
        if timed:
            matrix = _terms(moving + coming * t_time, square)
        peak = _largest(moves, 1)
        before = peak + _log(tl.sum(tl.exp(moves - peak[:, None, :]), 1))
        skips = short & (step == last)
        high = tl.where(skips, 0.0, _largest(before, 0))
        after = tl.where(skips[None, :], after, before - high[None, :])
        norm += high.to(tl.float64)
    if keep:
        tl.store(kept, after, mask=inside)
    tl.store(result + at, after.to(tl.float64) + norm[None, :], mask=inside)


@triton.jit(do_not_specialize=["lanes", "steps", "one"])
def lanes_backward(
    transition, t_row, t_time, t_from, t_to,
    emission, e_row, e_time, e_to,
    starting, idle, messages,
    g_transition, gt_row, gt_time, g_emission, ge_row, ge_time, finishing,
    lanes, steps, one,
    states: tl.constexpr, size: tl.constexpr, block: tl.constexpr,
    timed: tl.constexpr, own: tl.constexpr, alike: tl.constexpr,
):  # fmt: skip
    """Occupancies from the start of each lane to its end, and the gradients.

    ``starting`` and ``finishing`` [lanes, S] are occupancies. The gradient of the emission terms is written, one row for
    each lane and step; so is that of a constant transition, one matrix for each lane. That of a transition of every step is
    written where each lane has its ``own``, else added; where all lanes have the same (``alike``), their sum is added.
    """
    lane, k, live, inside, square = _lanes(lanes, one, states, size, block)
    count = steps.to(tl.int64)
    short = tl.load(idle + lane, mask=live, other=0) > 0
    rows = emission + tl.load(e_row + lane, mask=live, other=0)[None, :] + k[:, None] * e_to
    moving = transition + tl.load(t_row + lane, mask=live, other=0)[None, None, :]
    moving += k[:, None, None] * t_from + k[None, :, None] * t_to
    kept = messages + lane[None, :] * (count + 1) * states + k[:, None]
    g_rows = g_emission + tl.load(ge_row + lane, mask=live, other=0)[None, :] + k[:, None]
    g_moving = tl.load(gt_row + lane, mask=live, other=0)
    entry = k[:, None] * states + k[None, :]
    at = lane[None, :] * states + k[:, None]
    dtype = messages.dtype.element_ty
    here = tl.load(starting + at, mask=inside, other=0.0).to(dtype)
    counts = tl.zeros([size, size, block], dtype=dtype)
    last = count - 1
    to = _terms(rows, inside) + _terms(kept + states, inside)
    matrix = _terms(moving, square)
    for step in range(count):
        coming = tl.minimum(step + 1, last)
        moves = matrix + to[None, :, :]
        to = _terms(rows + coming * e_time, inside) + _terms(kept + (coming + 1) * states, inside)
        if timed:
            matrix = _terms(moving + coming * t_time, square)
        weights = tl.exp(moves - _largest(moves, 1)[:, None, :])
        total = tl.sum(weights, 1)
        flow = (here / tl.where(total == 0, 1.0, total))[:, None, :] * weights
        skips = short & (step == last)
        writes = inside & (skips == 0)[None, :]
        there = tl.sum(flow, 0)
        tl.store(g_rows + step * ge_time, there, mask=writes)
        if not timed:
            counts += tl.where(skips[None, None, :], 0.0, flow)
        elif own:
            place = g_transition + g_moving[None, None, :] + step * gt_time + entry[:, :, None]
            tl.store(place, flow, mask=square & writes[:, None, :])
        elif alike:
            place = g_transition + step * gt_time + entry
            tl.atomic_add(place, tl.sum(flow, 2), mask=(k < states)[:, None] & (k < states)[None, :], sem="relaxed")
        else:
            place = g_transition + g_moving[None, None, :] + step * gt_time + entry[:, :, None]
            tl.atomic_add(place, flow, mask=square & writes[:, None, :], sem="relaxed")
        here = tl.where(skips[None, :], here, there)
    if not timed:
        place = g_transition + lane[None, None, :] * states * states + entry[:, :, None]
        tl.store(place, counts, mask=square)
    tl.store(finishing + at, here, mask=inside)
