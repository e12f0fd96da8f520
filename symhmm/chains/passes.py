"""Both passes over a batch of chains as one call each (numba): what needs all lanes, and the lane kernels, in turn.

A call into compiled code and the arrays it is handed cost as much as a short chain, so that there is one call where one
thread does everything. Several threads go through the phases together: ``first`` and ``last`` say which phases a call
carries out, ``part`` of ``parts`` which share of the lanes is its own.
"""

import numpy as np

from symhmm.chains.jit import inner, kernel
from symhmm.chains.joins import join_backward, join_forward, read_terminal
from symhmm.chains.lanes_backward import lanes_backward
from symhmm.chains.lanes_forward import lanes_forward
from symhmm.chains.simd import lanes_of, numbers_at

UNITS, JOIN, RECURSION, END = range(4)


@inner
def share(count, part, parts):
    """The groups of lanes of a part; the first parts, which the caller takes while other threads wake, are the larger ones."""
    return -(-count * part // parts), -(-count * (part + 1) // parts)


@kernel
def forward_pass(
    first, last, part, parts, shape, like, transition_at, f, emission_at, e, terminal_at, z, idles, work, message_like,
    saved_at,
):  # fmt: skip
    """Messages of all chains, from the end to the start.

    Args:
        shape: states K, joint states S / K, steps, chains, blocks, lanes, lanes of the unit messages.
        f, e: where the transition and emission terms lie, see `symhmm.chains.places.Places`: lanes, lanes of the units,
            strides, and for the transition whether all lanes share it.
        z: where the terminal terms lie: chains, stride.
        idles: the lanes, and the lanes of the units, that have one step less.
        work: messages in float64 at the ends of the lanes and of the units, at their starts, and what marks lanes in
            which a message was lost.
        message_like: a number of the type in which the message is written.
        saved_at: addresses of the message, and of what is kept for the gradient: messages, scales, links.
    """
    size, rest, steps, chains, blocks, lanes, unit_lanes = shape
    ending, units, starts, products, flags, unit_flags = work
    message_at, messages_at, scales_at, links_at = saved_at
    states = size * rest
    width = lanes_of(numbers_at(transition_at, like))
    for phase in range(first, last):
        if phase == UNITS:
            low, high = share(unit_lanes // width, part, parts)
            lanes_forward(
                low, high, size, rest, steps, unit_lanes, idles[1],
                like, transition_at, f[1], f[2], f[3], f[4], f[5], emission_at, e[1], e[2], e[3],
                units, False, messages_at, scales_at, products, unit_flags,
            )  # fmt: skip
        elif phase == JOIN:
            read_terminal(ending, lanes, blocks, states, numbers_at(terminal_at, like), z[0], z[1])
            if blocks > 1:
                join_forward(
                    chains, blocks, states, products, unit_lanes, unit_flags,
                    ending, lanes, numbers_at(links_at, np.float64(0)), flags,
                )  # fmt: skip
        else:
            low, high = share(lanes // width, part, parts)
            lanes_forward(
                low, high, size, rest, steps, lanes, idles[0],
                like, transition_at, f[0], f[2], f[3], f[4], f[5], emission_at, e[0], e[2], e[3],
                ending, True, messages_at, scales_at, starts, flags,
            )  # fmt: skip
            message = numbers_at(message_at, message_like)
            for b in range(-(-low * width // blocks), min(chains, -(-high * width // blocks))):
                for s in range(states):
                    message[b * states + s] = starts[s * lanes + b * blocks]


@kernel
def backward_pass(
    first, last, part, parts, shape, like, transition_at, f, emission_at, e, idle, work, weight_at, saved_at,
    gradients_at, gf, ge, gz,
):  # fmt: skip
    """Gradients of the messages, from the start to the end.

    Args:
        shape: states K, joint states S / K, steps, chains, blocks, lanes, and how many lanes are in use.
        f, e: as in `forward_pass`.
        work: occupancies at the starts and ends of the lanes, and which chains are not left to the careful kernel.
        weight_at: address of the weight of each message [chains, S].
        saved_at: addresses of messages, scales and links.
        gradients_at: addresses of the gradients of transition, emission and terminal terms.
        gf, ge: lanes, stride over time, for the emission the stride of the states and whether lanes share numbers that
            are then added to, and the bytes from the gradient of one part to that of the next.
        gz: where the gradients of the terminal terms lie, by chain.
    """
    size, rest, steps, chains, blocks, lanes, used = shape
    starting, finishing, fast = work
    messages_at, scales_at, links_at = saved_at
    states = size * rest
    width = lanes_of(numbers_at(transition_at, like))
    for phase in range(first, last):
        if phase == JOIN:
            scales = numbers_at(scales_at, like)
            for b in range(chains):
                fast[b] = scales[b * blocks] > 0
            join_backward(
                chains, blocks, states, numbers_at(weight_at, like), fast, numbers_at(links_at, np.float64(0)),
                numbers_at(messages_at, like), lanes, starting,
            )  # fmt: skip
        elif phase == RECURSION:
            low, high = share(lanes // width, part, parts)
            lanes_backward(
                low, high, size, rest, steps, lanes, used, idle,
                like, transition_at, f[0], f[2], f[3], f[4], f[5], emission_at, e[0], e[2], e[3],
                starting, messages_at, scales_at, gradients_at[0] + part * gf[2], gf[0], gf[1],
                gradients_at[1] + part * ge[4], ge[0], ge[1], ge[2], ge[3], finishing,
            )  # fmt: skip
        else:
            g_terminal = numbers_at(gradients_at[2], like)
            for b in range(chains):
                for s in range(states):
                    g_terminal[gz[b] + s] += finishing[s * lanes + b * blocks + blocks - 1]
