"""Chains that move one at a time, against the one dense matrix of their joint states."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains.operator import chain_message, staged_message
from symhmm.chains.stages import Stages, arranged, dense

# Sizes of the chains, and the variables of each transition factor: 0..M-1 before the step, M..2M-1 after it.
CASES = {
    "two chains alone": ((2, 3), [(0, 2), (1, 3)]),
    "three chains alone": ((2, 2, 3), [(0, 3), (1, 4), (2, 5)]),
    "the second looks at the first, now": ((2, 3), [(0, 2), (1, 2, 3)]),
    "the second looks at the first, before": ((2, 3), [(0, 2), (0, 1, 3)]),
    "a ring": ((2, 2, 2), [(0, 1, 3), (1, 2, 4), (2, 0, 5)]),
    "two factors of one chain": ((2, 2), [(0, 2), (1, 2), (1, 3)]),
    "a chain that forgets": ((2, 3), [(0, 2), (3,)]),
    "five and nine states": ((5, 9), [(0, 2), (0, 1, 3)]),
    "one state, and seven": ((1, 7), [(0, 2), (1, 3)]),
    "a factor of earlier states alone": ((2, 2), [(0, 2), (1, 3), (0, 1)]),
}


def case(name, batch, steps, timed, dtype=torch.float64, holes=0.0):
    sizes, factors = CASES[name]
    stages, _ = arranged(sizes, factors)
    generator = torch.Generator().manual_seed(3)
    t_batch = [1 for _ in batch] if timed == "shared" else batch
    time = steps if timed == "every step" else 1

    def term(*size):
        x = torch.randn(*size, dtype=dtype, generator=generator)
        return x.masked_fill(torch.rand(x.shape, generator=generator) < holes, -torch.inf).requires_grad_()

    transition = term(*t_batch, time, sum(stages.entries))
    return stages, [transition, term(*batch, steps, stages.states), term(*[1 for _ in batch], stages.states)]


@pytest.mark.parametrize("timed", ["shared", "own", "every step"])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("holes", [0.0, 0.3])
def test_value_and_gradient_equal_the_dense_matrix(name, timed, holes):
    stages, inputs = case(name, [9], 11, timed, holes=holes)
    message = torch.ops.symhmm.chain_in_stages(*inputs, 11, stages.encoded())[0]
    wanted = chain_message(dense(inputs[0], stages), *inputs[1:], length=11, strategy="sequential")
    assert_close(message, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.linspace(-1, 2, message.numel(), dtype=message.dtype).reshape(message.shape)
    found = []
    for x in (message, wanted):
        loss = (torch.where(x.isfinite(), x, 0) * weight).sum()
        found.append(torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_what_single_precision_loses_is_made_densely():
    stages, inputs = case("two chains alone", [3], 200, "shared", torch.float32)
    with torch.no_grad():
        inputs[1][1] *= 200
    message = torch.ops.symhmm.chain_in_stages(*inputs, 200, stages.encoded())[0]
    wanted = chain_message(dense(inputs[0], stages), *inputs[1:], length=200)
    assert_close(message, wanted)
    found = [torch.autograd.grad(x.sum(), inputs) for x in (message, wanted)]
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("timed", ["shared", "own", "every step"])
def test_several_threads_do_the_same(timed, monkeypatch):
    monkeypatch.setattr("symhmm.chains.threads.SMALL", 1e-12)
    before = torch.get_num_threads()
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        stages, inputs = case("a ring", [50], 7, timed, holes=0.2)
        message = torch.ops.symhmm.chain_in_stages(*inputs, 7, stages.encoded())[0]
        total = torch.where(message.isfinite(), message, 0).sum()
        found.append((message, *torch.autograd.grad(total, inputs)))
    torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_members_of_a_vmap_are_members_of_the_batch():
    stages, inputs = case("a ring", [2], 5, "shared")
    many = [torch.stack([x.detach(), x.detach() + 1]) for x in inputs]

    def one(*terms):
        return torch.ops.symhmm.chain_in_stages(*terms, 5, stages.encoded())[0]

    assert_close(torch.func.vmap(one)(*many), torch.stack([one(*(x[k] for x in many)) for k in range(2)]))


def test_the_cheapest_order_costs_what_it_should():
    stages, groups = arranged((4, 4, 4), CASES["three chains alone"][1])
    assert stages.cost == 3 * 4**4 and groups == ((0,), (1,), (2,))
    # What the second chain reads of the first after the step is summed out before the first.
    stages, _ = arranged((2, 3), CASES["the second looks at the first, now"][1])
    assert [s.out for s in stages.stages] == [3, 2]
    assert Stages.decoded(stages.encoded()) == stages


@pytest.mark.parametrize("timed", ["shared", "every step"])
def test_segments_make_the_messages_again(timed, monkeypatch):
    stages, (transition, emission, _) = case("a ring", [9], 40, timed, holes=0.1)
    factors = [x.detach() for x in transition.split(list(stages.entries), -1)]
    monkeypatch.setattr("symhmm.chains.operator.BUDGET", 9 * 8 * 8 * 7)
    _, ends = torch.ops.symhmm.stages_in_segments(
        transition.detach(), emission.detach(), torch.zeros(1, 8).double(), 40, 6, stages.encoded()
    )
    assert ends.shape == (9, 6, 8)
    found = []
    for segments in (True, False):
        inputs = [x.clone().requires_grad_() for x in (*factors, emission.detach())]
        message = staged_message(inputs[:-1], inputs[-1], 40, stages, segments=segments)
        found.append((message, *torch.autograd.grad(torch.where(message.isfinite(), message, 0).sum(), inputs)))
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)
