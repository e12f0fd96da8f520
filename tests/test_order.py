"""Local contraction order."""

from symhmm.compiler.order import pairwise_order


def test_one_operand_is_one_step():
    assert pairwise_order([{"a": 2}], {"a"}) == [(0,)]


def test_a_chain_of_matrices_is_never_multiplied_out_at_once():
    inputs = [{f"x{i}": 3, f"x{i + 1}": 3} for i in range(40)]
    order = pairwise_order(inputs, {f"x{i}" for i in range(41)})
    assert len(order) == 39
    pool = [set(o) for o in inputs]
    for positions in order:
        merged = set().union(*(pool[p] for p in positions))
        assert len(merged) <= 4
        pool = [s for p, s in enumerate(pool) if p not in positions]
        pool.append({v for v in merged if any(v in s for s in pool)})
    assert pool == [set()]
