"""Best paths, draws and filters of chains that move one at a time, against one dense matrix of their joint states."""

import pytest
import torch
from test_staged import CASES, case
from torch.testing import assert_close

from symhmm.chains.filters import prefix_weights
from symhmm.chains.operator import chain_message
from symhmm.chains.paths import choices, follow, messages
from symhmm.chains.staged_filters import staged_prefix_weights
from symhmm.chains.staged_paths import staged_choices, staged_draw, staged_follow, staged_messages
from symhmm.chains.stages import dense
from symhmm.semiring import MAX

STEPS = 11


@pytest.fixture(
    params=[(name, timed, holes) for name in CASES for timed in ("shared", "every step") for holes in (0, 0.3)]
)
def chains(request):
    name, timed, holes = request.param
    stages, (transition, emission, _) = case(name, [9], STEPS, timed, holes=holes)
    return stages, transition.detach(), emission.detach()


def test_best_paths_equal_those_of_the_dense_matrix(chains):
    stages, transition, emission = chains
    rows, start = torch.arange(9).repeat_interleave(stages.states), torch.arange(stages.states).repeat(9)
    for stops in (None, torch.tensor([0, 1, 5, 10, 11, 11, 3, 7, 2])):
        found = staged_choices(transition, emission, STEPS, stages, stops)
        wanted = choices(dense(transition, stages), emission, STEPS, stops)
        assert_close(found.message, wanted.message, rtol=1e-10, atol=1e-10)
        possible = wanted.message[rows, start] > -torch.inf
        both = [f(x, rows, start)[possible] for f, x in ((staged_follow, found), (follow, wanted))]
        assert torch.equal(*both)


def test_the_max_semiring_and_its_gradient(chains):
    stages, *tensors = chains
    found = []
    for staged in (True, False):
        inputs = [x.clone().requires_grad_() for x in (*tensors, torch.linspace(0, 1, stages.states).double())]
        transition, emission, terminal = inputs
        if staged:
            message = torch.ops.symhmm.best_in_stages(
                transition, emission, terminal[None], STEPS, stages.encoded()
            )[0]  # fmt: skip
        else:
            message = chain_message(dense(transition, stages), emission, terminal[None], length=STEPS, semiring=MAX)
        weight = torch.linspace(-1, 2, message.numel()).double().reshape(message.shape)
        loss = (torch.where(message.isfinite(), message, 0) * weight).sum()
        found.append([message, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_filters_equal_those_of_the_dense_matrix(chains):
    stages, transition, emission = chains
    generator = torch.Generator().manual_seed(1)
    start, other = (torch.randn(9, *n, generator=generator).double() for n in ([stages.states], [STEPS, stages.states]))
    moved = transition + torch.randn(transition.shape, generator=generator)
    for now_transition, now_emission in ((transition, emission.clone()), (moved, other)):
        now_emission.requires_grad_()
        found = staged_prefix_weights(start, transition, emission, now_transition, now_emission, STEPS, stages)
        matrices = dense(transition, stages), dense(now_transition, stages)
        wanted = prefix_weights(start, matrices[0], emission, matrices[1], now_emission, STEPS)
        assert_close(found, wanted, rtol=1e-10, atol=1e-10)
        gradients = [
            torch.autograd.grad(torch.where(x.isfinite(), x, 0).cumsum(-1).sum(), now_emission) for x in (found, wanted)
        ]
        assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_gradient_of_the_moves_of_a_filter():
    stages, (transition, emission, start) = case("a ring", [4], 5, "shared")
    arguments = start.expand(4, -1), transition.detach(), emission.detach(), transition, emission
    found = staged_prefix_weights(*arguments, 5, stages)
    wanted = prefix_weights(
        arguments[0], dense(arguments[1], stages), arguments[2], dense(transition, stages), emission, 5
    )
    gradients = [torch.autograd.grad(x.sum(), [transition, emission]) for x in (found, wanted)]
    assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [1.0, 700.0])
def test_numbers_of_any_size(scale):
    # Ranges in which single steps leave what float64 can tell apart: those chains go through logarithms.
    stages, (transition, emission, _) = case("a ring", [3], 40, "every step")
    transition, emission = (
        x.detach() * torch.tensor([1.0, scale, 1.0]).double()[:, None, None] for x in (transition, emission)
    )
    found, wanted = staged_messages(transition, emission, 40, stages), messages(dense(transition, stages), emission, 40)
    assert_close(found.message, wanted.message, rtol=1e-10, atol=1e-10)
    assert bool((found.scales[1] < 0).any()) == (scale > 1) and not bool((found.scales[[0, 2]] < 0).any())
    start = torch.zeros(3, stages.states).double()
    filters = [
        f(start, x, emission, x, emission, 40, *more)
        for f, x, more in (
            (staged_prefix_weights, transition, [stages]), (prefix_weights, dense(transition, stages), []),
        )
    ]  # fmt: skip
    assert_close(*filters, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("name", "scale"), [("a ring", 1.0), ("a ring", 300.0), ("two factors of one chain", 1.0)])
def test_draws_have_the_probabilities_of_paths(name, scale):
    stages, (transition, emission, _) = case(name, [2], 2, "every step", holes=0.2)
    transition, emission = transition.detach() * scale, emission.detach() * scale
    matrix, s = dense(transition, stages), stages.states
    joint = matrix[:, 0, :, :, None] + emission[:, 0, None, :, None] + matrix[:, 1, None] + emission[:, 1, None, None]
    found = staged_messages(transition, emission, 2, stages)
    draws, start = 40_000, int(found.message.isfinite().all(0).nonzero()[0])
    wanted = joint[:, start].flatten(1).softmax(-1)
    rows = torch.arange(2).repeat_interleave(draws)
    paths = staged_draw(found, rows, torch.full_like(rows, start), torch.Generator().manual_seed(0)).long()
    for row in range(2):
        seen = torch.bincount(paths[rows == row] @ torch.tensor([s, 1]), minlength=s * s) / draws
        noise = (wanted[row] * (1 - wanted[row]) / draws).sqrt()
        assert bool((seen[wanted[row] == 0] == 0).all())
        assert float(((seen - wanted[row]).abs() / noise.clamp_min(1 / draws)).max()) < 4.5


def test_draws_do_not_depend_on_who_else_is_drawn():
    stages, (transition, emission, _) = case("a ring", [3], 20, "shared")
    found = staged_messages(transition, emission, 20, stages)
    rows = torch.arange(3)
    one, two = (staged_draw(found, rows, rows, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.dtype == torch.int8
