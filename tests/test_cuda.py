"""The Triton kernels, in Triton's interpreter on the CPU, against the reference; on a device where there is one."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains.layout import device_layout_of, device_sizes
from symhmm.chains.reference import sequential

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


@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_reference(cuda, name, holes):
    inputs, length, blocks = terms(name, holes)
    rank = max(inputs[0].dim() - 3, inputs[1].dim() - 2)
    aligned = [x[(None,) * (rank - x.dim() + event)] for x, event in zip(inputs, (3, 2, 1), strict=True)]
    message, *saved = cuda.forward(*aligned, length, blocks)
    free = [x.clone().requires_grad_() for x in aligned]
    wanted = sequential(*free, length, 1)
    assert_close(message, wanted.detach(), rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 2, message.numel(), dtype=message.dtype, device=DEVICE).reshape(message.shape)
    weight = torch.where(message > -torch.inf, weight, 0)
    loss = (torch.where(wanted > -torch.inf, wanted, 0) * weight).sum()
    gradients = torch.autograd.grad(loss, free, allow_unused=True, materialize_grads=True)
    for seen, g in zip(cuda.backward(weight, *aligned, *saved, length), gradients, strict=True):
        assert_close(seen, g, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("batch", "length"), [((3,), 20), ((2,), 64), ((), 130)])
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
