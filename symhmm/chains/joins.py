"""Where the blocks of a long chain meet (numba): messages at their ends, occupancies at their starts."""

import numpy as np

from symhmm.chains.jit import kernel


@kernel
def read_terminal(ending, lanes, blocks, states, terminal, z_row, z_from):
    """The terminal terms of all chains at the end of their last blocks."""
    for lane in range(blocks - 1, lanes):
        chain = min(lane // blocks, z_row.size - 1)
        for s in range(states):
            ending[s * lanes + lane] = terminal[z_row[chain] + s * z_from]


@kernel
def join_forward(chains, blocks, states, products, product_lanes, product_flags, ending, lanes, links, flags):
    """Messages at the end of every block from the products of the blocks, last to first, in log space.

    ``links`` [chains, blocks - 1, S, S] receives the probability of the state after a block given the state before it.
    """
    move = np.empty(states)
    for b in range(chains):
        for p in range(blocks - 1, -1, -1):
            lane, column = b * blocks + p, (b * blocks + p) * states
            for s in range(states):
                best = -np.inf
                for k in range(states):
                    flags[lane] |= product_flags[column + k]
                    move[k] = products[s * product_lanes + column + k] + ending[k * lanes + lane]
                    best = max(best, move[k])
                norm = 0.0
                for k in range(states):
                    move[k] = np.exp(move[k] - best) if best > -np.inf else 0.0
                    norm += move[k]
                if p > 0:
                    ending[s * lanes + lane - 1] = best + np.log(norm) if best > -np.inf else -np.inf
                if p < blocks - 1:
                    for k in range(states):
                        links[((b * (blocks - 1) + p) * states + s) * states + k] = (
                            move[k] / norm if norm > 0.0 else 0.0
                        )


@kernel
def join_backward(chains, blocks, states, weight, fast, links, messages, lanes, starting):
    """Occupancy divided by message at the start of every block, first to last; chains that are not ``fast`` get 0."""
    here, there = np.empty(states), np.empty(states)
    starting[:] = 0.0
    for b in range(chains):
        if not fast[b]:
            continue
        for s in range(states):
            here[s] = weight[b * states + s]
        for p in range(blocks):
            lane = b * blocks + p
            for s in range(states):
                beta = messages[s * lanes + lane]
                if beta > 0.0:
                    starting[s * lanes + lane] = here[s] / beta
            if p < blocks - 1:
                link = (b * (blocks - 1) + p) * states * states
                for k in range(states):
                    there[k] = 0.0
                    for s in range(states):
                        there[k] += here[s] * links[link + s * states + k]
                here, there = there, here
