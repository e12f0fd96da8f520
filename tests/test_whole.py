"""Value and gradient of chains in one operation, against the reference and all paths one by one."""

from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from random_chains import chains, every_path
from torch import Tensor
from torch.testing import assert_close

from symhmm.chains import cpu, threads, whole
from symhmm.chains.operator import chain_evidence
from symhmm.chains.prepared import prepared
from symhmm.compiler.step import trace
from symhmm.errors import SymhmmError
from symhmm.semiring import LOG


def value_and_gradient(inputs: list[Tensor], weight: Tensor | None = None, **options) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    value = chain_evidence(*inputs, **options)
    found = torch.autograd.grad(value, inputs, torch.ones_like(value) if weight is None else weight)
    return [value.detach(), *found]


def at_once(inputs: list[Tensor], weight: Tensor | None = None, **options) -> list[Tensor]:
    """The same by a recorded step."""
    values = [x.detach() for x in (*inputs, *([] if weight is None else [weight]))]

    def step(*values: Tensor) -> list[Tensor]:
        return value_and_gradient(list(values[:4]), *values[4:], **options)

    recorded = trace(step, values, [], gradients=True)
    assert [n.target.__name__ for n in recorded.body.graph.nodes if "chain" in n.name] == ["chain_evidence_gradient"]
    return list(recorded.numbers(values, recorded.constants([])))


@settings(max_examples=60)
@given(chain=chains())
def test_equals_the_sum_over_all_paths(chain):
    inputs, length, history = chain
    # Initial terms that differ where chains do not have no operator of their own.
    own, others = inputs[0].shape[:-1], [x.shape[:-e] for x, e in zip(inputs[1:], (3, 2, 1), strict=True)]
    batch = torch.broadcast_shapes(*others)
    assume(length > 0 and len(own) <= len(batch) and torch.broadcast_shapes(own, batch) == batch)
    wanted = every_path(*inputs, length, history)[LOG]
    weight = torch.linspace(-1, 2, wanted.numel(), dtype=torch.float64).reshape(wanted.shape)
    possible, zeros = wanted.isfinite(), [torch.zeros_like(x) for x in inputs]
    found = torch.autograd.grad((wanted[possible] * weight[possible]).sum(), inputs) if possible.any() else zeros
    seen = at_once(inputs, weight, length=length, history=history)
    for x, w in zip(seen, (wanted.detach(), *found), strict=True):
        assert_close(x, w, rtol=1e-10, atol=1e-10)


def terms(batch, length, size, *, moving=False, own=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    lead = batch if own else tuple(1 for _ in batch)
    inputs = [
        normal(*lead, size).log_softmax(-1), normal(*lead, length if moving else 1, size, size).log_softmax(-1),
        3 * normal(*batch, length, size), normal(*lead, size),
    ]  # fmt: skip
    return [x.to(dtype) for x in inputs]


# Of the last four, some or all chains are done one by one.
SIZES = [
    ((37,), 45, 3),
    ((2, 9), 70, 7),
    ((40,), 33, 20),
    ((3,), 1, 1),
    ((400,), 5, 2),
    ((20,), 40, 50),
    ((2,), 2000, 4),
]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("moving, own", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("batch, length, size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_reference(batch, length, size, moving, own, dtype, parts, monkeypatch):
    monkeypatch.setattr(threads, "SMALL", 1e-12 if parts == 2 else 1e3)
    monkeypatch.setattr(torch, "get_num_threads", lambda: parts)
    inputs = terms(batch, length, size, moving=moving, own=own)
    weight = torch.linspace(-1, 2, inputs[2].shape[:-2].numel(), dtype=torch.float64).reshape(batch)
    wanted = value_and_gradient(inputs, weight, strategy="sequential")
    seen = at_once([x.to(dtype) for x in inputs], weight.to(dtype))
    exact = dtype == torch.float64
    assert_close(seen[0].double(), wanted[0], rtol=1e-10 if exact else 3e-6, atol=1e-10 if exact else 1e-4)
    for x, w in zip(seen[1:], wanted[1:], strict=True):
        assert x.dtype == dtype
        assert_close(x.double(), w, rtol=1e-10 if exact else 1e-3, atol=1e-10 if exact else 1e-3)


def left_to_right(batch, size, dtype):
    """Once the last state is reached it is never left, and late observations speak against it: messages differ by 1e5 nats."""
    moves = (0.9 * torch.eye(size) + 0.1 * torch.eye(size).roll(1, 1)).triu()
    moves[-1, -1] = 1
    emission = 100 * torch.randn(*batch, 300, size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    emission[::2] = 0  # every second chain loses nothing
    ends = [torch.zeros(size, dtype=dtype) for _ in range(2)]
    return [ends[0], moves.log()[None].to(dtype), emission.to(dtype), ends[1]]


@pytest.mark.parametrize("count, size", [(40, 3), (35, 17)])
@pytest.mark.parametrize("slab", [1, whole.SLAB])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lost_messages_are_repeated_in_log_space(dtype, slab, count, size, monkeypatch):
    repeated = []
    monkeypatch.setattr(whole, "SLAB", slab)
    repeat = whole._repeat
    monkeypatch.setattr(whole, "_repeat", lambda chains, *rest: repeated.extend(chains) or repeat(chains, *rest))
    inputs, weight = left_to_right((count,), size, dtype), torch.linspace(-1, 2, count, dtype=dtype)
    wanted = value_and_gradient([x.double() for x in inputs], weight.double(), strategy="sequential")
    seen = at_once(inputs, weight)
    assert {1, 3, 33} < set(repeated) <= set(range(1, count, 2))
    exact = dtype == torch.float64
    assert_close(seen[0].double(), wanted[0], rtol=1e-10 if exact else 1e-6, atol=0)
    for x, w in zip(seen[1:], wanted[1:], strict=True):
        x, w = x.double().nan_to_num(), w.nan_to_num()
        assert_close(x, w, rtol=1e-9 if exact else 2e-3, atol=1e-9 if exact else 2e-3)


def test_lost_messages_of_a_chain_of_few_moves_go_through_the_list_of_these(monkeypatch):
    monkeypatch.setattr(whole, "_repeat", None)
    inputs = left_to_right((2,), 60, torch.float32)
    inputs[2] = inputs[2][1:]
    wanted = value_and_gradient([x.double() for x in inputs], strategy="sequential")
    for x, w in zip(at_once(inputs), wanted, strict=True):
        assert_close(x.double().nan_to_num(), w.nan_to_num(), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("together", [1, 2**12, 2**30])
def test_groups_of_lanes_together_or_one_by_one(together, monkeypatch):
    inputs = terms((100,), 40, 4, dtype=torch.float32)
    wanted = at_once(inputs)
    monkeypatch.setattr(whole, "TOGETHER", together)
    assert_close(at_once(inputs), wanted, rtol=0, atol=0)


@pytest.mark.parametrize("count, size", [(20, 3), (6, 16), (22, 16)])
def test_impossible_observations_and_numbers_that_are_none(count, size):
    inputs = terms((count,), 30, size, own=False, dtype=torch.float32)
    inputs[2][-2, 7] = -torch.inf
    inputs[2][-3, 7, 1] = torch.nan
    value, *found = at_once(inputs)
    assert value[-2] == -torch.inf and value[-3].isnan() and value.isfinite().sum() == count - 2
    assert (found[2][-2] == 0).all() and found[2][-1].isfinite().all() and found[2][:-3].isfinite().all()


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1)])
@pytest.mark.parametrize("copies", [1, 3])
def test_any_order_of_memory_and_terms_that_chains_share(order, copies):
    """A transition of its own for each copy makes them share emission terms."""
    initial, _, emission, terminal = terms((5,), 45, 18, own=False)
    back = [order.index(d) for d in range(3)]
    emission = emission.permute(order).contiguous().permute(back)[None]
    transition = torch.randn(copies, 1, 1, 18, 18, dtype=torch.float64)
    inputs = [initial, transition, emission, terminal]
    wanted = value_and_gradient(inputs, strategy="sequential")
    assert_close(at_once(inputs), wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "batch, length, size, singles",
    [(1, 200, 16, 1), (1, 100_000, 64, 1), (5, 200, 16, 5), (12, 200, 16, 0), (100, 500, 16, 4), (3, 200, 8, 0), (9, 200, 64, 9)],
)  # fmt: skip
def test_chains_that_would_leave_most_lanes_empty_are_done_one_by_one(batch, length, size, singles):
    shapes = torch.Size((1, 1, size, size)), torch.Size((batch, length, size)), torch.Size((1, size))
    strides = tuple(tuple(torch.empty(shape, device="meta").stride()) for shape in shapes)
    order = whole._ordered(prepared(shapes, strides, torch.float32, length))
    assert order.singles == singles and order.groups == -(-(batch - singles) // 16)


def test_a_large_total_does_not_drown_what_differs_between_states():
    # In single precision the sum over 1e5 steps, -3e5 nats, resolves no more than 1/32 of a nat.
    generator = torch.Generator().manual_seed(0)
    emission = torch.randn(16, 100_000, 2, generator=generator) - 3
    exact = [
        torch.tensor([[0.3, 0.7]]).log(),
        torch.tensor([[[[0.9, 0.1], [0.4, 0.6]]]]).log(),
        emission,
        torch.zeros(1, 2),
    ]
    wanted = value_and_gradient([x.double() for x in exact])
    seen = at_once(exact)
    assert_close(seen[1].double(), wanted[1], rtol=1e-5, atol=0)


def test_messages_of_few_chains_are_held_at_a_time(monkeypatch):
    # 2000 chains are 125 groups of lanes; memory is needed for the messages of those that are worked upon.
    inputs = terms((2000,), 200, 4, own=False, dtype=torch.float32)
    sizes = []
    made = whole.empty_strided
    monkeypatch.setattr(whole, "empty_strided", lambda size, *rest: sizes.append(size) or made(size, *rest))
    at_once(inputs)
    assert len(sizes) == 1 and 0 < prod(sizes[0]) < inputs[2].numel() / 4


def test_what_torch_asks_of_an_operator():
    inputs = [x.requires_grad_() for x in terms((3,), 40, 2, own=False)]
    for weight in (None, torch.ones(3, dtype=torch.float64)):
        torch.library.opcheck(
            torch.ops.symhmm.chain_evidence_gradient.default, (*inputs, weight, 40),
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )  # fmt: skip
    found = torch.ops.symhmm.chain_evidence_gradient(*inputs, None, 40)
    with pytest.raises(SymhmmError, match="scan"):
        found[1].sum().backward()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("which", range(4))
def test_vmap_equals_a_loop(which, weighted):
    inputs = terms((3,), 40, 2, own=False)
    weight = torch.linspace(-1, 2, 3, dtype=torch.float64) if weighted else None
    many = [torch.stack([x, x - 0.5, 2 * x]) if i == which else x for i, x in enumerate(inputs)]
    dims = tuple(0 if i == which else None for i in range(4))
    operator = torch.ops.symhmm.chain_evidence_gradient
    seen = torch.func.vmap(operator, (*dims, None, None))(*many, weight, 40)
    for k in range(3):
        one = [x[k] if i == which else x for i, x in enumerate(many)]
        assert_close([x[k] for x in seen], list(operator(*one, weight, 40)))


def test_few_long_chains_are_cut_and_go_one_pass_after_the_other(monkeypatch):
    inputs, calls, evidence = terms((1,), 3000, 4), [], cpu.evidence
    wanted = value_and_gradient(inputs, strategy="sequential")
    monkeypatch.setattr(cpu, "evidence", lambda *args: calls.append(args) or evidence(*args))
    seen = torch.ops.symhmm.chain_evidence_gradient(*inputs, None, 3000)
    assert len(calls) == 1
    assert_close(list(seen), wanted, rtol=1e-10, atol=1e-10)
