"""The Triton kernels, in Triton's interpreter on the CPU, against the reference; on a device where there is one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_chains import random_terms
from test_operator import every_path, gradients
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from symhmm.chains import cpu
from symhmm.chains.layout import device_layout_of, device_sizes
from symhmm.chains.operator import chain_evidence, chain_message
from symhmm.chains.reference import sequential
from symhmm.compiler.step import trace
from symhmm.errors import SymhmmError
from symhmm.semiring import LOG

pytestmark = pytest.mark.cuda

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "one short chain": ((1, 3, 3), (5, 3), (3,), 5, 1),
    "one step": ((1, 2, 2), (1, 2), (2,), 1, 1),
    "one state": ((1, 1, 1), (4, 1), (1,), 4, 1),
    "many chains, shared transition": ((1, 1, 3, 3), (70, 6, 3), (1, 3), 6, 1),
    "transition of every step": ((4, 6, 2, 2), (4, 6, 2), (4, 2), 6, 1),
    "shared transition of every step": ((1, 6, 2, 2), (4, 6, 2), (1, 2), 6, 1),
    "shared emission": ((4, 1, 3, 3), (1, 6, 3), (1, 3), 6, 1),
    "emission constant over time": ((2, 6, 3, 3), (1, 1, 3), (1, 3), 6, 1),
    "blocks of equal length": ((1, 1, 3, 3), (2, 12, 3), (1, 3), 12, 4),
    "blocks that differ by a step": ((1, 1, 3, 3), (2, 10, 3), (2, 3), 10, 4),
    "blocks, transition of every step": ((2, 11, 2, 2), (2, 11, 2), (1, 2), 11, 2),
    "two batch axes": ((3, 1, 1, 2, 2), (1, 2, 5, 2), (1, 1, 2), 5, 1),
}


@pytest.fixture(scope="module")
def cuda():
    """The module under test; the top `conftest.py` has it interpreted where there is no device."""
    pytest.importorskip("triton", reason="Triton is not installed (the gpu extra)")
    from symhmm.chains import cuda

    return cuda


def terms(name, holes=0.0, dtype=torch.float64):
    transition, emission, terminal, length, blocks = CASES[name]
    generator = torch.Generator().manual_seed(7)
    found = [2 * torch.randn(size, dtype=dtype, generator=generator) for size in (transition, emission, terminal)]
    for x in found[:2]:
        x[torch.rand(x.shape, generator=generator) < holes] = -torch.inf
    return [x.to(DEVICE) for x in found], length, blocks


def reference(inputs, length, weight):
    """Message, and gradients of its weighted sum."""
    free = [x.clone().requires_grad_() for x in inputs]
    message = sequential(*free, length, 1)
    loss = (torch.where(message > -torch.inf, message, 0) * weight).sum()
    return message.detach(), torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("schedulers", [1, 512])  # few: lanes are put together, as many as a program holds
@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_reference(cuda, name, holes, schedulers, monkeypatch):
    monkeypatch.setattr(cuda, "SCHEDULERS", schedulers)
    inputs, length, blocks = terms(name, holes)
    rank = max(inputs[0].dim() - 3, inputs[1].dim() - 2)
    aligned = [x[(None,) * (rank - x.dim() + event)] for x, event in zip(inputs, (3, 2, 1), strict=True)]
    message, *saved = cuda.forward(*aligned, length, blocks)
    weight = torch.linspace(-1, 2, message.numel(), dtype=message.dtype, device=DEVICE).reshape(message.shape)
    weight = torch.where(message > -torch.inf, weight, 0)
    wanted, slopes = reference(aligned, length, weight)
    assert_close(message, wanted, rtol=1e-10, atol=1e-10)
    for seen, g in zip(cuda.backward(weight, *aligned, *saved, length), slopes, strict=True):
        assert_close(seen, g, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("batch", "length"), [((3,), 20), ((2,), 64), ((), 130), ((), 4000)])
def test_shapes_are_those_that_a_tracer_is_told(cuda, batch, length):
    inputs = [torch.zeros(*batch, *event, device=DEVICE) for event in ((1, 2, 2), (length, 2), (2,))]
    sizes = device_sizes(batch, length, 2)
    assert tuple(tuple(x.shape) for x in cuda.forward(*inputs, length)) == sizes
    assert sizes[1][-3] == device_layout_of(batch, length, 2).blocks


def test_single_precision_stays_close_over_many_steps_in_blocks(cuda):
    generator = torch.Generator().manual_seed(1)
    transition = torch.randn(1, 1, 3, 3, generator=generator).log_softmax(-1).to(DEVICE)
    emission = (torch.randn(1, 400, 3, generator=generator) - 30).to(DEVICE)
    terminal = torch.zeros(1, 3, device=DEVICE)
    message, *saved = cuda.forward(transition, emission, terminal, 400, 8)
    wanted = sequential(transition.double(), emission.double(), terminal.double(), 400, 1)
    assert_close(message.double(), wanted, rtol=1e-6, atol=1e-3)
    occupancy = cuda.backward(wanted.softmax(-1).float(), transition, emission, terminal, *saved, 400)[1]
    assert_close(occupancy.sum(-1), torch.ones(1, 400, device=DEVICE), rtol=1e-4, atol=1e-4)


def test_blocks_of_blocks_equal_the_reference(cuda):
    generator = torch.Generator().manual_seed(3)
    sizes = ((1, 1, 2, 2), (1, 256, 2), (1, 2))
    inputs = [torch.randn(size, dtype=torch.float64, generator=generator).to(DEVICE) for size in sizes]
    blocks = 128
    message, *saved = cuda.forward(*inputs, 256, blocks)
    assert saved[2].shape[-3] > blocks  # the chain of blocks was cut, too
    wanted, slopes = reference(inputs, 256, torch.ones_like(message))
    assert_close(message, wanted, rtol=1e-10, atol=1e-10)
    for seen, g in zip(cuda.backward(torch.ones_like(message), *inputs, *saved, 256), slopes, strict=True):
        assert_close(seen, g, rtol=1e-10, atol=1e-10)
    # A gradient for each of many weights, as `torch.func.vmap` asks for it: so many chains would not have been cut again.
    weights = torch.randn(40, 1, 2, dtype=torch.float64, generator=generator).to(DEVICE)
    many = [x.expand(40, *x.shape) for x in (*inputs, *saved)]
    found = cuda.backward(weights, *many, 256)
    for n in (0, 39):
        for seen, g in zip(found, reference(inputs, 256, weights[n])[1], strict=True):
            assert_close(seen[n], g, rtol=1e-10, atol=1e-10)


def test_a_batch_of_no_chains(cuda):
    sizes = ((1, 1, 3, 3), (0, 6, 3), (1, 3))
    inputs = [torch.zeros(size, device=DEVICE) for size in sizes]
    message, *saved = cuda.forward(*inputs, 6)
    assert tuple(tuple(x.shape) for x in (message, *saved)) == device_sizes((0,), 6, 3)
    found = cuda.backward(message, *inputs, *saved, 6)
    assert [tuple(g.shape) for g in found] == list(sizes)
    assert all((g == 0).all() for g in found)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # of the interpreter
def test_what_is_not_a_number_is_not_impossible(cuda):
    inputs, length, blocks = terms("many chains, shared transition")
    inputs[1][3, 2, 1] = torch.nan
    message = cuda.forward(*inputs, length, blocks)[0]
    assert message[3].isnan().all()
    assert message[[0, 1, 2, 4]].isfinite().all()


def test_too_many_states_are_refused(cuda):
    inputs = [torch.zeros(size, device=DEVICE) for size in ((1, 300, 300), (2, 300), (300,))]
    with pytest.raises(SymhmmError, match=r"at most 256 states(.|\n)*300(.|\n)*sequential"):
        cuda.forward(*inputs, 2)


def test_one_impossible_observation_and_tiny_probabilities(cuda):
    length = 100_000 if DEVICE == "cuda" else 1_000
    generator = torch.Generator().manual_seed(5)
    transition = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64).log_softmax(-1)
    emission = 5 * torch.randn(2, length, 2, generator=generator, dtype=torch.float64) - 800
    emission[1, length // 3] = -torch.inf
    inputs = [x.to(DEVICE) for x in (transition, emission, torch.zeros(1, 2, dtype=torch.float64))]
    message, *saved = cuda.forward(*inputs, length, 32)
    wanted = sequential(*inputs, length, 1) if length <= 1_000 else chain_message(*[x.cpu() for x in inputs]).to(DEVICE)
    assert_close(message, wanted, rtol=1e-10, atol=1e-10)
    assert message[0].isfinite().all() and (message[1] == -torch.inf).all()
    found = cuda.backward(torch.ones_like(message), *inputs, *saved, length)
    assert all(g.isfinite().all() for g in found)
    assert_close(found[1][0].sum(-1), torch.full_like(found[1][0, :, 0], 2))


@st.composite
def small_chains(draw):
    """Terms of a few chains that may or may not vary over steps and chains, in any layout, and the number of blocks."""
    states, length = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    seed, holes = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.0, 0.2, 0.6]))
    full = draw(st.lists(st.integers(1, 3), max_size=2))
    term = random_terms(draw, full, length, torch.Generator().manual_seed(seed), holes)
    found = [term(states, states, timed=True), term(states, timed=True), term(states, timed=False)]
    lead = max(x.dim() - event for x, event in zip(found, (3, 2, 1), strict=True))
    found = [
        x.detach()[(None,) * (lead - x.dim() + event)].to(DEVICE) for x, event in zip(found, (3, 2, 1), strict=True)
    ]
    return found, length, draw(st.integers(1, max(1, length // 2)))


@settings(max_examples=200 if DEVICE == "cuda" else 30)
@given(chain=small_chains())
def test_equals_the_sum_over_all_paths(cuda, chain):
    inputs, length, blocks = chain
    message, *saved = cuda.forward(*inputs, length, blocks)
    free = [x.cpu().requires_grad_() for x in inputs]
    wanted = every_path(*free, length, LOG)
    assert_close(message.cpu(), wanted.detach(), rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 2, message.numel(), dtype=message.dtype).reshape(message.shape)
    weight = torch.where(wanted > -torch.inf, weight, 0).detach()
    seen = cuda.backward(weight.to(DEVICE), *inputs, *saved, length)
    for g, w in zip(seen, gradients(wanted, free), strict=True):
        assert_close(g.cpu(), w, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_many_cotangents_become_part_of_the_batch(cuda, monkeypatch):
    called = []

    def seen(name):
        kernel = getattr(cuda, name)
        return lambda *args: (called.append(name), kernel(*args))[1]

    for name in ("forward", "backward"):
        # Where there is no device, the operator's kernels for the CPU stand aside.
        monkeypatch.setattr(cuda if DEVICE == "cuda" else cpu, name, seen(name))
    sizes = (1, 2, 2), (3, 90, 2), (2,)
    terms = [torch.randn(size, dtype=torch.float64).to(DEVICE).requires_grad_() for size in sizes]
    many = torch.func.vmap(chain_message, (None, 0, None))(*terms)
    alone = terms[0], terms[1][1], terms[2]
    message, wanted = (chain_message(*alone, strategy=name) for name in ("kernel", "sequential"))
    assert_close(many[1], wanted, rtol=1e-10, atol=1e-10)
    rows = torch.eye(2, dtype=torch.float64, device=DEVICE)
    found, correct = (torch.autograd.grad(x, terms, rows, is_grads_batched=True) for x in (message, wanted))
    assert_close(found, correct, rtol=1e-10, atol=1e-10)
    assert set(called) == {"forward", "backward"}


on_device = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device: torch dispatches no operator to the kernels")


@on_device
@settings(max_examples=100)
@given(chain=small_chains())
def test_the_operator_on_a_device_equals_the_one_on_the_cpu(chain):
    inputs, length, _ = chain
    results = []
    for device in ("cuda", "cpu"):
        free = [x.to(device).requires_grad_() for x in inputs]
        message = chain_message(*free, length=length)
        results.append([message.cpu(), *(g.cpu() for g in gradients(message, free))])
    for seen, wanted in zip(*results, strict=True):
        assert_close(seen, wanted, rtol=1e-10, atol=1e-10)


def step(initial, *terms):
    """Log-probability and its gradients."""
    free = [x.detach().requires_grad_() for x in (initial, *terms)]
    value = chain_evidence(free[0], *free[1:])
    return value.detach(), *torch.autograd.grad(value.sum(), free)


@on_device
@pytest.mark.parametrize("length", [1, 40, 4000])
def test_tracers_and_vmap_on_a_device(length):
    alone = [torch.randn(size, dtype=torch.float64) for size in ((3,), (1, 3, 3), (5, length, 3), (3,))]
    wanted = step(*alone)
    inputs = [x.to("cuda") for x in alone]
    recorded = trace(step, inputs, [], gradients=True)
    graph = make_fx(step)(*inputs)
    found = {
        "eager": step(*inputs),
        "make_fx": graph(*inputs),
        "compiled": recorded.numbers(inputs, recorded.constants([])),
    }
    found["fake"] = make_fx(step, tracing_mode="fake")(*inputs)(*inputs)
    for name, seen in found.items():
        assert_close(
            [x.cpu() for x in seen], list(wanted), rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )
    many = torch.func.vmap(graph, (None, None, 0, None))(
        *inputs[:2], torch.stack([inputs[2], inputs[2] - 1]), inputs[3]
    )
    assert_close([x[0].cpu() for x in many], list(wanted), rtol=1e-10, atol=1e-10)
    whole = torch.compile(chain_message, fullgraph=True, backend="aot_eager")
    assert_close(whole(*inputs[1:]).cpu(), chain_message(*alone[1:]), rtol=1e-10, atol=1e-10)


@on_device
def test_a_stream_and_a_graph_of_its_own():
    inputs = [torch.randn(size, device="cuda") for size in ((1, 3, 3), (20, 400, 3))]
    wanted = chain_message(*inputs)
    with torch.cuda.stream(torch.cuda.Stream()):
        inputs[1].add_(1)
        assert_close(chain_message(*inputs), wanted + 400, rtol=1e-5, atol=1e-3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain_message(*inputs)
    inputs[1].sub_(1)
    graph.replay()
    assert_close(found, wanted, rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
def test_tensors_on_a_device_that_is_not_the_current_one():
    inputs = [torch.randn(size, dtype=torch.float64) for size in ((1, 3, 3), (20, 400, 3))]
    assert_close(chain_message(*[x.to("cuda:1") for x in inputs]).cpu(), chain_message(*inputs))
