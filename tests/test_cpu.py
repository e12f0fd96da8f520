"""The CPU kernels: what the operator tests do not see of memory layout, threads, vectors and underflow."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import masked, simd
from symhmm.chains.jit import kernel
from symhmm.chains.layout import Layout, layout_of
from symhmm.chains.operator import chain_message
from symhmm.chains.places import places
from symhmm.chains.reference import sequential
from symhmm.chains.transpose import lanes_to_rows, rows_to_lanes
from symhmm.semiring import MAX


@kernel
def exponentials(x, out, width):
    for i in range(0, x.size, width):
        simd.store(out, i, simd.exp(simd.load(x, i)))


@pytest.mark.parametrize("dtype, lowest, ulps", [(np.float32, -86.0, 2), (np.float64, -700.0, 2)])
def test_vector_exponential(dtype, lowest, ulps):
    width = 64 // np.dtype(dtype).itemsize
    x = np.linspace(lowest, 2, 1024 * width).astype(dtype)
    x[:4] = -np.inf, np.nan, 0.0, 10 * lowest
    out = np.empty_like(x)
    exponentials(x, out, width)
    assert out[0] == 0 and math.isnan(out[1]) and out[2] == 1 and out[3] == 0
    wanted = np.exp(x[4:].astype(np.float64))
    assert (np.abs(out[4:] / wanted - 1) < ulps * np.finfo(dtype).eps).all()


@kernel
def scales(x, out, power, width):
    simd.store(power, 0, simd.exponent(simd.load(x, 0)))
    simd.store(out, 0, simd.load(x, 0) * simd.reciprocal_power(simd.load(x, 0)))
    return simd.total(simd.load(x, 0)), simd.any_below(simd.load(x, 0), simd.fill(x, 1e-3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scaling_by_powers_of_two_is_exact_and_finite_at_zero(dtype):
    width = 64 // np.dtype(dtype).itemsize
    x = np.geomspace(1e-30, 1e9, width).astype(dtype)
    x[0] = 0
    out, power = np.empty_like(x), np.empty_like(x)
    total, small = scales(x, out, power, width)
    assert out[0] == 0 and (out[1:] >= 1).all() and (out[1:] < 2).all()
    assert (out[1:] * 2.0 ** power[1:].astype(np.float64) == x[1:]).all()
    assert math.isclose(total, x.sum(), rel_tol=1e-6) and small


@kernel
def there_and_back(flat, rows, tile, out, width, add):
    rows_to_lanes(flat, rows, 0, 1, tile, 0, width)
    lanes_to_rows(tile, 0, width, out, rows, 0, 1, add)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_transposed_and_back(dtype):
    width = 64 // np.dtype(dtype).itemsize
    flat = np.arange(width * 50, dtype=dtype)
    rows, tile, out = np.arange(width) * 50, np.empty(width * width, dtype), np.zeros_like(flat)
    there_and_back(flat, rows, tile, out, width, False)
    square = flat.reshape(width, 50)[:, 1 : width + 1]
    assert (tile.reshape(width, width) == square.T).all()
    assert (out.reshape(width, 50)[:, 1 : width + 1] == square).all() and out.sum() == square.sum()
    there_and_back(flat, rows, tile, out, width, True)
    assert (out.reshape(width, 50)[:, 1 : width + 1] == 2 * square).all()


@kernel
def firsts(numbers, count, out):
    vector = masked.load_first(numbers, 1, count)
    simd.store(out, 0, vector)
    masked.store_first(out, simd.lanes_of(out), count, vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_the_first_lanes_of_a_vector(dtype, count):
    width = 64 // np.dtype(dtype).itemsize
    numbers, out = np.arange(width + 1, dtype=dtype), np.zeros(2 * width, dtype)
    firsts(numbers, count, out)
    assert (out[:width] == [min(k, count) for k in range(1, width + 1)]).all()
    assert (out[width:] == [k if k <= count else 0 for k in range(1, width + 1)]).all()


@pytest.mark.parametrize("length, blocks", [(1, 1), (1000, 32), (1001, 32), (1023, 32), (64, 4), (67, 4)])
def test_blocks_cover_a_chain(length, blocks):
    layout = Layout((2, 3), length, 4, 16, blocks)
    sizes = np.diff(layout.starts)
    assert layout.starts[0] == 0 and layout.starts[-1] == length
    assert sizes[-1] == layout.steps and (sizes >= layout.steps - 1).all()
    messages = layout.messages(torch.empty(0))
    assert messages.shape == (2, 3, blocks, layout.steps + 1, 4) and layout.fits(messages, layout.scales(messages))
    assert not layout.fits(messages.contiguous(), layout.scales(messages)) or layout.lanes == 1


def test_only_what_is_short_of_lanes_is_cut():
    assert layout_of((64,), 10_000, 4, torch.float32).blocks == 1
    assert layout_of((), 10_000, 4, torch.float32).blocks > 8
    assert layout_of((), 10_000, 100, torch.float32).blocks == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 20])
@pytest.mark.parametrize("steps, copies", [(45, 1), (45, 2), (1, 1), (1, 2)])
def test_any_order_of_memory(order, dtype, size, steps, copies):
    # 19 sequences leave lanes of a vector empty; a transition of its own for each copy makes them share emission terms.
    emission = torch.randn(19, steps, size, dtype=dtype)
    back = [order.index(d) for d in range(3)]
    strided = emission.permute(order).contiguous().permute(back).requires_grad_()
    transition = torch.randn(copies, 1, 1, size, size, dtype=dtype)
    results = []
    for x, strategy in ((emission.requires_grad_(), "sequential"), (strided, "kernel")):
        message = chain_message(transition, x, length=45, strategy=strategy)
        results.append([message, *torch.autograd.grad(message.sum(), x)])
    tolerance = 1e-3 if dtype == torch.float32 else 1e-10
    assert_close(results[1], results[0], rtol=tolerance, atol=tolerance)
    gradient = results[1][1].squeeze(1)
    assert gradient.stride() == torch.empty_like(strided.squeeze(1)).stride()


def test_shared_emissions_are_read_not_expanded():
    transition = torch.randn(1, 3, 3)
    row = torch.randn(200, 3)
    shared = chain_message(transition, row.expand(50, 200, 3))
    assert_close(shared, chain_message(transition, row).expand(50, 3))
    memory = places(torch.Size((50, 200, 3)), (0, 3, 1), True, layout_of((50,), 200, 3, torch.float32), 1)
    assert memory.extent == 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_left_to_right_chains_underflow_into_log_space(dtype):
    # Once state 2 is reached it is never left, and late observations speak against it: messages differ by 1e5 nats.
    transition = torch.tensor([[0.9, 0.1, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]], dtype=dtype).log()[None]
    emission = torch.randn(5, 700, 3, dtype=dtype) * 100
    emission[3] /= 100
    inputs = [transition.requires_grad_(), emission.requires_grad_()]
    message = chain_message(*inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wanted = sequential(*exact, torch.zeros(3).double()[None], 700, 1)
    loose = dtype == torch.float32
    assert_close(message.double(), wanted, rtol=1e-6 if loose else 1e-10, atol=0)
    for g, w in zip(torch.autograd.grad(message.sum(), inputs), torch.autograd.grad(wanted.sum(), exact), strict=True):
        g, w = torch.nan_to_num(g), torch.nan_to_num(w)
        assert_close(g.double(), w, rtol=2e-3 if loose else 1e-9, atol=2e-3 if loose else 1e-9)


def test_a_not_a_number_stays_one():
    emission = torch.zeros(20, 30, 3)
    emission[4, 7, 1] = torch.nan
    message = chain_message(torch.zeros(1, 3, 3), emission)
    assert message[4].isnan().all() and message[:4].isfinite().all() and message[5:].isfinite().all()


def test_the_best_path_is_the_gradient_of_the_max_semiring():
    transition, emission = torch.randn(1, 3, 3).double(), torch.randn(4, 50, 3).double().requires_grad_()
    message = chain_message(transition, emission, semiring=MAX)
    (indicator,) = torch.autograd.grad(message[:, 1].sum(), emission)
    assert ((indicator == 0) | (indicator == 1)).all() and (indicator.sum(-1) == 1).all()
    path = indicator.argmax(-1)
    before = torch.cat([torch.full((4, 1), 1), path[:, :-1]], 1)
    weight = transition[0][before, path] + emission.gather(-1, path[..., None])[..., 0]
    assert_close(weight.sum(-1), message[:, 1])


def test_ties_go_to_the_first_path():
    emission = torch.zeros(5, 3).requires_grad_()
    (indicator,) = torch.autograd.grad(chain_message(torch.zeros(1, 3, 3), emission, semiring=MAX)[2], emission)
    assert_close(indicator, torch.tensor([1.0, 0.0, 0.0]).expand(5, 3))


@pytest.mark.parametrize("size", [200, 256])
def test_hundreds_of_states(size):
    inputs = torch.randn(1, size, size).double(), torch.randn(3, 6, size).double()
    assert_close(chain_message(*inputs), chain_message(*inputs, strategy="sequential"))


def test_an_empty_batch():
    emission = torch.zeros(0, 4, 2, requires_grad=True)
    message = chain_message(torch.zeros(1, 2, 2), emission)
    assert message.shape == (0, 2)
    message.sum().backward()
    assert emission.grad.shape == (0, 4, 2)


def test_importing_the_operator_does_not_import_numba():
    check = "import sys, symhmm.chains.operator; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", check]).returncode == 0


# The peak of a process counts from its own start: what other tests have used would hide what this one needs.
MEMORY = """
import torch
from symhmm.chains.operator import chain_message
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
def work(emission):
    (gradient,) = torch.autograd.grad(chain_message(torch.zeros(1, 4, 4), emission).sum(), emission)
    return gradient
work(torch.zeros(40, 1000, 4).requires_grad_())
emission = torch.zeros(40, 100_000, 4).requires_grad_()
before = peak()
gradient = work(emission)
assert gradient.sum() > 0
print((peak() - before) / (emission.numel() * 4))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_memory_of_value_and_gradient_is_three_times_the_emissions():
    # Beyond the emissions themselves: the saved messages and the gradient, and little else.
    command = [sys.executable, "-W", "ignore", "-c", MEMORY]
    used = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 1.5 < used < 3


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shared", ["transition", "emission", "neither", "both over time"])
def test_parts_of_the_lanes_add_up_and_do_so_in_one_order(shared):
    generator = torch.Generator().manual_seed(0)
    steps = 1 if shared == "both over time" else 300
    transition = torch.randn(*([1] if shared == "transition" else [70, 1]), 3, 3, generator=generator).double()
    emission = torch.randn(*([] if shared == "emission" else [70]), steps, 3, generator=generator).double()
    results = []
    for strategy in ("kernel", "kernel", "sequential"):
        inputs = [x.clone().requires_grad_() for x in (transition, emission)]
        message = chain_message(*inputs, length=300, strategy=strategy)
        results.append([message, *torch.autograd.grad(message.logsumexp(-1).sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert_close(results[0], results[2])
