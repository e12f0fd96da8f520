"""The order of a local contraction, found by opt_einsum from sizes alone."""

from collections.abc import Mapping, Sequence

import opt_einsum


def pairwise_order(inputs: Sequence[Mapping[str, int]], summed: set[str]) -> list[tuple[int, ...]]:
    """Pairs of positions to contract, in ``opt_einsum``'s convention: the result is appended at the end of the list.

    Args:
        inputs: names and sizes of each operand's inputs.
        summed: names to sum out; all others stay in the result.

    >>> pairwise_order([{"a": 2, "b": 3}, {"b": 3, "c": 50}, {"c": 50}], {"b", "c"})
    [(1, 2), (0, 1)]
    """
    if len(inputs) == 1:
        return [(0,)]
    symbols = {n: opt_einsum.get_symbol(i) for i, n in enumerate(dict.fromkeys(n for o in inputs for n in o))}
    terms = ",".join("".join(symbols[n] for n in o) for o in inputs)
    output = "".join(s for n, s in symbols.items() if n not in summed)
    path, _ = opt_einsum.contract_path(f"{terms}->{output}", *(tuple(o.values()) for o in inputs), shapes=True)
    # Paths may end with one step over many operands (no gain from pairs); funsors are then multiplied all at once.
    return [tuple(sorted(positions)) for positions in path]
