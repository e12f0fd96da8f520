"""Paths of chains: messages against the reference, best paths and draws against all paths written out."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from symhmm.chains import reference
from symhmm.chains.paths import choices, draw, follow, messages
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
        found = (choices if semiring == MAX else messages)(transition, emission, 5)
        end = torch.zeros(3**history, dtype=torch.float64)
        wanted = reference.sequential(transition, emission, end, 5, history, semiring)
        assert_close(found.message, wanted, rtol=1e-12, atol=1e-12)


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
    best = follow(choices(transition, emission, length), rows, start)
    assert tuple(best[0].tolist()) == max(scores, key=scores.__getitem__)
    n = 40_000
    found = messages(transition, emission, length)
    drawn = draw(found, rows.expand(n), start.expand(n), torch.Generator().manual_seed(0)).long()
    number = (drawn * torch.tensor([size**k for k in reversed(range(length))])).sum(1)
    seen = torch.bincount(number, minlength=size**length) / n
    p = torch.tensor([*scores.values()]).softmax(0)
    assert (seen[p == 0] == 0).all()
    assert ((seen - p).abs() < 6 * (p / n).sqrt() + 1e-4).all()


def test_steps_after_the_stop_do_not_count():
    transition, emission = random_chain(1, batch=2)
    stops = torch.tensor([2, 5])
    rows, start = torch.arange(2), torch.zeros(2, dtype=torch.int64)
    found = choices(transition, emission, 5, stops)
    shorter = choices(transition[:, :2], emission[:, :2], 2)
    longer = choices(transition, emission, 5)
    assert_close(found.message, torch.stack([shorter.message[0], longer.message[1]]))
    paths = follow(found, rows, start)
    assert torch.equal(paths[0, :2], follow(shorter, rows, start)[0])
    assert torch.equal(paths[1], follow(longer, rows, start)[1])
    assert (paths[0, 2:] == 0).all()


def scored(transition, emission, path, start):
    """Log-weight of a path of states."""
    size, states, length = transition.shape[-1], transition.shape[-2], len(path)
    total, state = 0.0, start
    for t, j in enumerate(path):
        total += float(transition[t % transition.shape[0], state, j] + emission[t % emission.shape[0], j])
        state = state % (states // size) * size + j
    assert length
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("history, size, batch, constant", [(1, 3, 21, True), (1, 9, 1, False), (2, 3, 17, False)])
def test_best_paths_have_the_best_weight_in_every_lane(dtype, history, size, batch, constant):
    length = 70
    transition, emission = (x.to(dtype) for x in random_chain(history, size, length, batch, constant))
    found = choices(transition, emission, length)
    wanted = choices(transition.double(), emission.double(), length).message
    assert_close(found.message, wanted, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=0.0)
    for start in range(size**history):
        paths = follow(found, torch.arange(batch), torch.full((batch,), start))
        for r in range(batch):
            score = scored(transition[r], emission[0], paths[r].tolist(), start)
            assert score == pytest.approx(float(wanted[r, start]), rel=1e-5 if dtype == torch.float32 else 1e-12)


def test_nan_is_not_a_state_that_loses():
    transition, emission = random_chain(1)
    emission[0, 3, 1] = torch.nan
    assert choices(transition, emission, 5).message.isnan().all()


@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("far", [False, True])
def test_draws_where_numbers_span_more_than_a_double(few, far):
    """Left to right, with observations that are a thousand nats apart: only one path is possible, or nearly so."""
    size, length = 3, 6
    transition = torch.full((1, 1, size, size), -torch.inf, dtype=torch.float64)
    for s in range(size):
        transition[0, 0, s, s : s + 2] = 0.0
    emission = torch.zeros(1, length, size, dtype=torch.float64)
    emission[0, 2:, 0] = -torch.inf
    emission[0, :, 1] = -2000.0 if far else 0.0
    emission[0, :4, 2] = -torch.inf
    emission[0, 4:, 1] = -torch.inf
    found = messages(transition, emission, length)
    n = 1 if few else 20
    paths = draw(found, torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64), torch.Generator())
    assert (paths[:, 2:] == torch.tensor([1, 1, 2, 2])).all()
    assert (paths[:, 0] == 0).all() or not far


def test_a_message_in_single_precision_keeps_what_differs_between_its_states():
    transition, emission = (x.float() for x in random_chain(1, length=3000))
    emission = emission - 1000.0
    found = messages(transition, emission, 3000)
    wanted = messages(transition.double(), emission.double(), 3000).message
    assert_close(found.message.log_softmax(-1), wanted.log_softmax(-1), rtol=1e-5, atol=1e-5)


def test_draws_do_not_depend_on_threads():
    transition, emission = random_chain(1, length=700, batch=4)
    found = messages(transition, emission, 700)
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
    found = messages(transition, None, 3)
    paths = draw(found, torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), torch.Generator())
    assert paths.dtype == torch.int16
    assert (paths == 199).all()


@pytest.mark.parametrize("size, history, length", [(3, 1, 60), (2, 2, 60), (7, 1, 20)])
def test_paths_side_by_side_end_where_each_of_them_ends(size, history, length):
    """More chains than go side by side, each with an end of its own, long enough for a kernel of its own number of states."""
    transition, emission = random_chain(history, size, length, 37)
    g = torch.Generator().manual_seed(5)
    stops = torch.randint(0, length + 1, (37,), generator=g)
    start = torch.randint(size**history, (37,), generator=g)
    found = choices(transition, emission, length, stops)
    paths = follow(found, torch.arange(37), start)
    for r, stop in enumerate(stops.tolist()):
        assert (paths[r, stop:] == 0).all()
        alone = reference_best(transition[r, :stop], emission[0, :stop], int(start[r]))
        assert_close(found.message[r, start[r]].item(), alone, rtol=1e-12, atol=1e-12)
        if stop:
            score = scored(transition[r, :stop], emission[0, :stop], paths[r, :stop].tolist(), int(start[r]))
            assert score == pytest.approx(alone, rel=1e-12)


def reference_best(transition, emission, start):
    """Weight of the best path, one step after the other."""
    if not len(transition):
        return 0.0
    states, size = transition.shape[-2:]
    after = torch.zeros(states, dtype=torch.float64)
    to = (torch.arange(states) % (states // size))[:, None] * size + torch.arange(size)
    for t in range(len(transition) - 1, -1, -1):
        after = (transition[t] + emission[t] + after[to]).amax(-1)
    return after[start].item()
