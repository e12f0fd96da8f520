"""Paths of chains: messages against the reference, best paths and draws against all paths written out."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import reference
from symhmm.chains.paths import draw, follow, messages
from symhmm.semiring import LOG, MAX


def random_chain(history, size=3, length=5, batch=2, constant=False):
    g = torch.Generator().manual_seed(history)
    transition = torch.randn(batch, 1 if constant else length, size**history, size, generator=g, dtype=torch.float64)
    transition[0, 0, 0, 1] = -torch.inf
    return transition, torch.randn(1, length, size, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("history", [1, 2])
def test_messages_equal_the_reference(history, constant):
    transition, emission = random_chain(history, constant=constant)
    for semiring in (LOG, MAX):
        found = messages(transition, emission, 5, maximise=semiring == MAX)
        end = torch.zeros(3**history, dtype=torch.float64)
        wanted = reference.sequential(transition, emission, end, 5, history, semiring)
        assert_close(found.values[:, 0], wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("history", [1, 2])
def test_paths_against_all_paths(history):
    size, length = 3, 4
    transition, emission = random_chain(history, size, length)
    scores = {}
    for path in itertools.product(range(size), repeat=length):
        state, total = 0, 0.0
        for t, j in enumerate(path):
            total += float(transition[0, t, state, j] + emission[0, t, j])
            state = (state % size ** (history - 1)) * size + j
        scores[path] = total
    rows, start = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    best = follow(messages(transition, emission, length, maximise=True), rows, start)
    assert tuple(best[0].tolist()) == max(scores, key=scores.__getitem__)
    n = 40_000
    found = messages(transition, emission, length, maximise=False)
    drawn = draw(found, rows.expand(n), start.expand(n), torch.Generator().manual_seed(0)).long()
    number = (drawn * torch.tensor([size**k for k in reversed(range(length))])).sum(1)
    seen = torch.bincount(number, minlength=size**length) / n
    p = torch.tensor([*scores.values()]).softmax(0)
    assert (seen[p == 0] == 0).all()
    assert ((seen - p).abs() < 6 * (p / n).sqrt() + 1e-4).all()


def test_steps_after_the_stop_do_not_count():
    transition, emission = random_chain(1, batch=2)
    stops = torch.tensor([2, 5])
    found = messages(transition, emission, 5, maximise=True, stops=stops)
    shorter = messages(transition[:, :2], emission[:, :2], 2, maximise=True)
    assert_close(found.values[0, 0], shorter.values[0, 0])
    assert (found.values[0, 2:] == 0).all()


def test_draws_do_not_depend_on_threads():
    transition, emission = random_chain(1, length=700, batch=4)
    found = messages(transition, emission, 700, maximise=False)
    rows = torch.arange(4).repeat(50)
    start = torch.zeros(200, dtype=torch.int64)
    before = torch.get_num_threads()
    out = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        out.append(draw(found, rows, start, torch.Generator().manual_seed(5)))
    torch.set_num_threads(before)
    assert torch.equal(*out)
    assert out[0].dtype == torch.int8


def test_many_states_need_wider_integers():
    transition = torch.zeros(1, 1, 200, 200, dtype=torch.float64)
    transition[..., 199] = 50.0
    found = messages(transition, None, 3, maximise=False)
    paths = draw(found, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.Generator())
    assert paths.dtype == torch.int16
    assert (paths == 199).all()
