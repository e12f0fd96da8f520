"""The chain operator against all hidden paths, one by one."""

import itertools
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_chains import random_terms
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from symhmm.chains.layout import DEVICE_STATES
from symhmm.chains.operator import _kernel, chain_message, segment_count
from symhmm.chains.registered import chain
from symhmm.errors import ShapeError, SymhmmError
from symhmm.semiring import LOG, MAX, Semiring

STRATEGIES = ["kernel", "segments", "sequential", "scan"]


def every_path(transition: Tensor, emission: Tensor, terminal: Tensor, length: int, semiring: Semiring) -> Tensor:
    """The oracle: multiply along each path, sum over all of them."""
    states, size = transition.shape[-2:]
    columns = []
    for start in range(states):
        paths = []
        for path in itertools.product(range(size), repeat=length):
            s, weight = start, 0.0
            for t, x in enumerate(path):
                f, e = min(t, transition.shape[-3] - 1), min(t, emission.shape[-2] - 1)
                weight = weight + transition[..., f, s, x] + emission[..., e, x]
                s = s * size % states + x
            paths.append(weight + terminal[..., s])
        columns.append(semiring.reduce(torch.stack(paths, -1), -1))
    batch = torch.broadcast_shapes(transition.shape[:-3], emission.shape[:-2], terminal.shape[:-1])
    return torch.stack(columns, -1).expand(*batch, states)


def gradients(message: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Of a sum with weights of both signs; what is impossible has no part in it."""
    weight = torch.linspace(-1, 2, message.numel(), dtype=message.dtype).reshape(message.shape)
    loss = (torch.where(message.isfinite(), message, 0) * weight).sum()
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@st.composite
def chains(draw, max_length=5, max_batch=3):
    size, history = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length = draw(st.integers(0, max_length if size**history < 10 else 3))
    seed, holes = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.0, 0.2, 0.6]))
    full = draw(st.lists(st.integers(1, max_batch), max_size=2))
    generator = torch.Generator().manual_seed(seed)

    term = random_terms(draw, full, length, generator, holes)
    states = size**history
    inputs = [term(states, size, timed=True), term(size, timed=True), term(states, timed=False)]
    return inputs, length, history


@pytest.mark.parametrize("semiring", [LOG, MAX])
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=60, deadline=None)
@given(chain=chains())
def test_equals_the_sum_over_all_paths(strategy, semiring, chain):
    inputs, length, history = chain
    seen = chain_message(*inputs, length=length, history=history, semiring=semiring, strategy=strategy)
    wanted = every_path(*inputs, length, semiring)
    assert_close(seen, wanted, rtol=1e-10, atol=1e-10)
    for g, w in zip(gradients(seen, inputs), gradients(wanted, inputs), strict=True):
        assert_close(g, w, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(chain=chains())
def test_float32(chain):
    inputs, length, history = chain
    single = [x.detach().float().requires_grad_() for x in inputs]
    seen = chain_message(*single, length=length, history=history)
    wanted = chain_message(*inputs, length=length, history=history, strategy="sequential")
    assert seen.dtype == torch.float32
    assert_close(seen, wanted.float(), rtol=2e-6, atol=2e-5)
    for g, w in zip(gradients(seen, single), gradients(wanted, inputs), strict=True):
        assert_close(g, w.float(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=20, deadline=None)
@given(chain=chains(), cut=st.integers(0, 5))
def test_a_chain_split_and_joined_is_the_same_chain(strategy, chain, cut):
    (transition, emission, terminal), length, history = chain
    cut = min(cut, length)

    def part(start: int, stop: int, end: Tensor) -> Tensor:
        t = transition if transition.shape[-3] == 1 else transition[..., start:stop, :, :]
        e = emission if emission.shape[-2] == 1 else emission[..., start:stop, :]
        return chain_message(t, e, end, length=stop - start, history=history, strategy=strategy)

    joined = part(0, cut, part(cut, length, terminal))
    assert_close(joined, part(0, length, terminal), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_relabelled_states_change_nothing(strategy):
    transition, emission, terminal = (
        torch.randn(6, 3, 3).double(),
        torch.randn(4, 6, 3).double(),
        torch.randn(3).double(),
    )
    order = torch.tensor([2, 0, 1])
    seen = chain_message(transition[:, order][..., order], emission[..., order], terminal[order], strategy=strategy)
    assert_close(seen, chain_message(transition, emission, terminal)[..., order])


def long_chain(batch, length, size, history=1, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = size**history
    transition = torch.randn(1, states, size, generator=generator, dtype=torch.float64).log_softmax(-1)
    emission = 3 * torch.randn(*batch, length, size, generator=generator, dtype=torch.float64)
    terminal = torch.randn(*batch, states, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (transition, emission, terminal)]


@pytest.mark.parametrize(
    "batch, length, size, history",
    [
        ((), 1000, 3, 1),
        ((), 301, 2, 2),
        ((3,), 517, 4, 1),
        ((2, 9), 70, 5, 1),
        ((40,), 65, 9, 1),
        ((17,), 33, 3, 2),
        ((), 40, 20, 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_long_chains_equal_the_reference(batch, length, size, history, dtype):
    inputs = long_chain(batch, length, size, history)
    single = [x.detach().to(dtype).requires_grad_() for x in inputs]
    wanted = chain_message(*inputs, history=history, strategy="sequential")
    seen = chain_message(*single, history=history, strategy="kernel")
    exact = dtype == torch.float64
    assert_close(seen.double(), wanted, rtol=1e-10 if exact else 2e-6, atol=0)
    for g, w in zip(gradients(seen, single), gradients(wanted, inputs), strict=True):
        assert_close(g.double(), w, rtol=1e-10 if exact else 2e-4, atol=1e-11 if exact else 2e-4)


def varying(batch, length, size, share):
    transition = torch.randn(*(1 if s else n for n, s in zip(batch, share, strict=True)), length, size, size).double()
    return [
        transition.requires_grad_(),
        torch.randn(1, 1, size).double().requires_grad_(),
        torch.zeros(1, size).double(),
    ]


@pytest.mark.parametrize("share", [(False, False), (True, False), (False, True), (True, True)])
def test_transitions_of_each_step_shared_or_not(share):
    transition, emission, terminal = varying((5, 7), 67, 3, share)
    results = []
    for strategy in ("kernel", "sequential"):
        message = chain_message(transition, emission, terminal, strategy=strategy)
        results.append([message, *gradients(message, [transition, emission])])
    for seen, wanted in zip(*results, strict=True):
        assert_close(seen, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_numbers_beyond_the_range_of_the_dtype(dtype):
    # State 0 is never left and explains nothing: its message is thousands of nats below that of the other.
    stuck = torch.tensor([[[0.0, -torch.inf], [-1.0, -0.5]]], dtype=dtype)
    emission = torch.tensor([-40.0, 0.0], dtype=dtype).repeat(300, 1).requires_grad_()
    message = chain_message(stuck, emission)
    assert_close(message[0], torch.tensor(-12000.0, dtype=dtype))
    (gradient,) = torch.autograd.grad(message[0], emission)
    assert_close(gradient, torch.tensor([1.0, 0.0], dtype=dtype).expand(300, 2))
    # One observation that only a state of tiny probability explains, and terms of -80000 nats everywhere.
    emission = torch.zeros(50, 2, dtype=dtype)
    emission[20], emission[30, 0] = -80000.0, -90000.0
    transition = torch.tensor([[0.0, -700.0], [-700.0, 0.0]], dtype=dtype)[None]
    seen = chain_message(transition, emission)
    assert_close(
        seen, chain_message(transition.double(), emission.double(), strategy="sequential").to(dtype), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(), (5,), (16,)])
def test_an_impossible_observation_is_minus_infinity_with_finite_gradients(dtype, batch):
    inputs = [x.detach() for x in long_chain(batch, 90, 3, dtype=dtype)]
    if batch:
        inputs[1][2, 50] = -torch.inf
    else:
        inputs[1][50] = -torch.inf
    inputs = [x.requires_grad_() for x in inputs]
    message = chain_message(*inputs)
    impossible = message.isneginf().all(-1)
    assert impossible.sum() == 1
    found = torch.autograd.grad(message.sum(), inputs)
    assert all(g.isfinite().all() for g in found)
    assert (found[1][impossible] == 0).all()


def test_a_hundred_thousand_steps_of_tiny_probabilities():
    transition = torch.tensor([[0.9, 0.1], [0.2, 0.8]]).log()[None]
    emission = torch.tensor([-690.0, -700.0]).expand(100_000, 2)
    seen = chain_message(transition, emission)
    wanted = chain_message(transition.double(), emission[:1].double(), length=100_000, strategy="scan")
    assert_close(seen.double(), wanted, rtol=1e-7, atol=0)


def step(transition, emission, terminal):
    inputs = [x.detach().requires_grad_() for x in (transition, emission, terminal)]
    value = chain_message(*inputs).square().sum()
    return value, torch.autograd.grad(value, inputs)


def test_a_tracer_records_one_node_for_the_value_and_one_for_the_gradient():
    inputs = torch.randn(1, 2, 2), torch.randn(5, 40, 2), torch.randn(2)
    graph = make_fx(step)(*inputs)
    calls = [str(n.target) for n in graph.graph.nodes if "symhmm" in str(n.target)]
    assert calls == ["symhmm.chain.default", "symhmm.chain_backward.default"]
    other = [torch.randn_like(x) for x in inputs]
    assert_close(graph(*other), step(*other))
    assert_close(make_fx(step, tracing_mode="fake")(*inputs)(*other), step(*other))


@pytest.mark.parametrize("length", [1, 40, 400])
@pytest.mark.parametrize("mapped", [m for m in itertools.product([False, True], repeat=3) if any(m)])
def test_vmap_equals_a_loop(length, mapped):
    plain = torch.randn(1, 2, 2).double(), torch.randn(3, length, 2).double(), torch.randn(2).double()
    many = [torch.randn(4, *x.shape).double() if m else x for x, m in zip(plain, mapped, strict=True)]
    dims = tuple(0 if m else None for m in mapped)
    one_by_one = [[x[i] if m else x for x, m in zip(many, mapped, strict=True)] for i in range(4)]
    seen = torch.func.vmap(chain_message, dims)(*many)
    assert_close(seen, torch.stack([chain_message(*x) for x in one_by_one]))
    graph = make_fx(step)(*plain)
    value, found = torch.func.vmap(graph, dims)(*many)
    for i, x in enumerate(one_by_one):
        wanted, grads = step(*x)
        assert_close(value[i], wanted)
        assert_close([g[i] for g in found], list(grads))


def test_many_cotangents_at_once():
    inputs = long_chain((), 400, 3)
    message = chain_message(*inputs)
    rows = torch.autograd.grad(message, inputs, torch.eye(3).double(), is_grads_batched=True, retain_graph=True)
    for s in range(3):
        wanted = torch.autograd.grad(message[s], inputs, retain_graph=True)
        assert_close([r[s] for r in rows], list(wanted))


def test_the_same_numbers_with_one_thread_and_with_two():
    inputs = long_chain((40,), 600, 4, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            message = chain_message(*inputs)
            results.append([message, *gradients(message, inputs)])
    finally:
        torch.set_num_threads(before)
    assert_close(results[0], results[1], rtol=1e-5, atol=1e-4)


def test_compiles():
    inputs = torch.randn(1, 2, 2), torch.randn(5, 40, 2), torch.randn(2)
    assert_close(torch.compile(chain_message, fullgraph=True, backend="aot_eager")(*inputs), chain_message(*inputs))


def test_a_second_derivative_of_the_kernel_names_the_strategies_that_have_one():
    emission = torch.randn(4, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(chain_message(torch.zeros(1, 2, 2), emission).sum(), emission, create_graph=True)
    with pytest.raises(SymhmmError, match="scan"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    "transition, emission, terminal",
    [((2, 3), (4, 3), (3,)), ((1, 3, 2), (4, 2), (3,)), ((1, 3, 3), (4, 2), (3,)), ((1, 3, 3), (4, 3), (2,)),
     ((5, 3, 3), (4, 3), (3,)), ((2, 1, 3, 3), (3, 4, 3), (3,))],
)  # fmt: skip
def test_sizes_that_do_not_fit(transition, emission, terminal):
    with pytest.raises(ShapeError):
        chain_message(torch.zeros(transition), torch.zeros(emission), torch.zeros(terminal))


def test_unknown_strategy():
    with pytest.raises(SymhmmError, match="sequential"):
        chain_message(torch.zeros(1, 2, 2), strategy="fastest")


def test_segments_keep_the_differences_between_states_over_a_hundred_thousand_steps():
    generator = torch.Generator().manual_seed(3)
    transition = torch.randn(3, 3, generator=generator).log_softmax(-1)[None].requires_grad_()
    emission = (torch.randn(2, 100_000, 3, generator=generator) - 50).requires_grad_()
    found = []
    for strategy in ("kernel", "segments"):
        message = chain_message(transition, emission, strategy=strategy)
        found.append((message, *torch.autograd.grad(message.logsumexp(-1).sum(), (transition, emission))))
    assert_close(found[1][0], found[0][0])
    assert_close(found[1][1], found[0][1], rtol=1e-5, atol=1e-2)
    assert_close(found[1][2], found[0][2], rtol=1e-5, atol=1e-5)


def test_segments_keep_the_messages_of_one_at_a_time():
    inputs = torch.zeros(1, 1, 8, 8), torch.zeros(1, 1000, 8), torch.zeros(1, 8)
    message, ends = torch.ops.symhmm.chain_in_segments(*inputs, 1000, 10)
    assert message.shape == (1, 8) and ends.shape == (1, 10, 8)
    assert segment_count(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8), torch.zeros(1, 8), 10**8) == 12


def test_too_many_states_for_a_device_go_by_the_reference():
    with FakeTensorMode():
        few, many = (torch.empty(1, k, k, device="cuda") for k in (DEVICE_STATES, DEVICE_STATES + 1))
        assert _kernel(few, 1, LOG) is (chain if find_spec("triton") else None)
        assert _kernel(many, 1, LOG) is None
