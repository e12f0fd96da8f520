"""Chains in which few moves are possible go through a list of these, against the reference over the whole matrix."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import cpu, sparse
from symhmm.chains.layout import layout_of
from symhmm.chains.operator import chain_message
from symhmm.chains.paths import choices, follow
from symhmm.distributions.chain import dwell_chain
from symhmm.semiring import MAX

STATES, STEPS = 48, 12


def band(below, above, states=STATES):
    """Which moves a band allows."""
    i = torch.arange(states)
    return (i >= i[:, None] - below) & (i <= i[:, None] + above)


MASKS = {
    "left to right": band(0, 1),
    "band": band(1, 1),
    "semi-Markov": dwell_chain(torch.ones(2, 2) - torch.eye(2), torch.zeros(2, 24)) > -torch.inf,
    "a state without a way out": band(0, 1) & (torch.arange(STATES) != 7)[:, None],
}


def terms(mask, timed, batch=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(2)
    size = {"shared": (1, 1), "own": (batch, 1), "every step": (1, STEPS), "all": (batch, STEPS)}[timed]
    transition = torch.randn(*size, STATES, STATES, generator=generator, dtype=dtype)
    if timed == "all":  # every step of every chain leaves out some more
        mask = mask & (torch.rand(transition.shape, generator=generator) < 0.9)
    emission = torch.randn(batch, STEPS, STATES, generator=generator, dtype=dtype)
    terminal = torch.randn(1, STATES, generator=generator, dtype=dtype)
    return [x.requires_grad_() for x in (transition.masked_fill(~mask, -torch.inf), emission, terminal)]


def call(inputs):
    layout = layout_of((inputs[1].shape[0],), STEPS, STATES, inputs[0].dtype)
    return sparse.listed(*(x.detach() for x in inputs), layout)


@pytest.mark.parametrize("timed", ["shared", "own", "every step", "all"])
@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradient_equal_the_reference(name, timed):
    inputs = terms(MASKS[name], timed)
    assert call(inputs).weights <= int(MASKS[name].sum())
    found = []
    for strategy in ("kernel", "sequential"):
        message = chain_message(*inputs, strategy=strategy)
        weight = torch.linspace(-1, 2, message.numel(), dtype=message.dtype).reshape(message.shape)
        loss = (torch.where(message.isfinite(), message, 0) * weight).sum()
        found.append([message, *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*found, strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert bool((found[0][1][inputs[0] == -torch.inf] == 0).all())


def test_chains_whose_numbers_are_lost_go_through_logarithms():
    inputs = terms(MASKS["left to right"], "shared", dtype=torch.float32)
    with torch.no_grad():
        inputs[1][3] *= 100
    layout = layout_of((9,), STEPS, STATES, torch.float32)
    few = sparse.listed(*(x.detach() for x in inputs), layout)
    _, _, scales, _ = cpu.forward(*(x.detach() for x in inputs), STEPS)
    assert few and [int(r) for r in (scales[:, 0, 0] < 0).nonzero()] == [3]
    found = [chain_message(*inputs, strategy=s) for s in ("kernel", "sequential")]
    assert_close(*found, rtol=1e-4, atol=1e-3)
    gradients = [torch.autograd.grad(x.logsumexp(-1).sum(), inputs) for x in found]
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_matrices_without_much_to_leave_out_stay_whole():
    full, loose, late = (
        terms(m, t) for m, t in ((band(48, 48), "own"), (band(9, 9), "own"), (band(1, 1), "every step"))
    )
    assert call(full) is None and call(loose) is None and call(late) is not None
    with torch.no_grad():
        late[0][0, -1] = 0.0  # all moves are possible in the last step
    assert call(late) is None
    with torch.no_grad():
        late[0][0, -1] = torch.nan  # and what is not a number is no zero
    assert call(late) is None and bool(chain_message(*late).isnan().any())
    small = [x[..., :8] for x in terms(band(0, 1), "own")]
    small[0] = small[0][..., :8, :]
    assert sparse.listed(*small, layout_of((9,), STEPS, 8, torch.float64)) is None


def test_best_paths_through_a_list():
    transition, emission, _ = (x.detach() for x in terms(MASKS["semi-Markov"], "own"))
    stops = torch.tensor([0, 1, 12, 12, 7, 3, 12, 11, 12])
    found = choices(transition, emission, STEPS, stops)
    rows, start = torch.arange(9), torch.arange(9)
    paths = follow(found, rows, start).long()
    for r in range(9):
        states = torch.cat([start[r : r + 1], paths[r, : stops[r]]])
        steps = torch.arange(int(stops[r]))
        weight = transition[r, 0, states[:-1], states[1:]].sum() + emission[r, steps, states[1:]].sum()
        assert_close(weight, found.message[r, start[r]], rtol=1e-10, atol=1e-10)
        wanted = chain_message(
            transition[r], emission[r, : stops[r]], length=int(stops[r]), strategy="sequential", semiring=MAX
        )
        assert_close(found.message[r], wanted, rtol=1e-10, atol=1e-10)
        assert bool((paths[r, stops[r] :] == 0).all())
