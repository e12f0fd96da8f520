"""How a loop is run: one by one, a few of its steps, or the body once for all."""

import pyro
import pytest
import torch

from symhmm.capture.loops import Loop, LoopRunner
from symhmm.capture.time_index import NotVectorisable, TimeIndex
from symhmm.capture.tracking import Position
from symhmm.errors import DataError


def run(items, *, history=1, vector=True, peel=0, schedule=None, keep=False, stop=None):
    """The items a body sees with its step, and the runner."""
    position = Position()
    checks = []
    runner = LoopRunner(position, vector, peel, schedule, checks.append)
    markov, seen = pyro.markov(items, history=history, keep=keep), []
    for item in runner.iterate(markov):
        if isinstance(item, torch.Tensor) and position.levels:
            item = position.levels[-1].unbatch(item)
        seen.append((item, *position.steps[-1][1:]))
        if stop is not None and len(seen) == stop:
            break
    runner.close()
    assert not position.steps and not position.levels
    return seen, runner, checks


def test_first_steps_one_by_one_then_the_body_once_for_each_lag():
    seen, runner, checks = run(range(10, 17), history=2)
    assert [(int(i), *rest) for i, *rest in seen[:2]] == [(10, "init", 0), (11, "init", 1)]
    assert [(role, lag) for _, role, lag in seen[2:]] == [("prev", 2), ("prev", 1), ("curr", 0)]
    assert all(isinstance(i, TimeIndex) for i, *_ in seen[2:])
    assert [i.values for i, *_ in seen[2:]] == [tuple(range(10, 15)), tuple(range(11, 16)), tuple(range(12, 17))]
    (loop,) = runner.loops.values()
    assert (loop.total, loop.lead, loop.length, loop.vector, runner.entered) == (7, 2, 5, True, True)
    assert loop.where.startswith(__file__) and checks == [False, True]


def test_steps_are_run_one_by_one_where_that_is_asked_for_or_needed():
    for arguments in ({"vector": False}, {"keep": True}):
        seen, runner, checks = run(range(4), **arguments)
        assert seen == [(k, "concrete", k) for k in range(4)] and checks == [] and not runner.entered
    assert "keep=True" in next(iter(runner.loops.values())).reason
    # Two steps beyond the first ones are the least that is worth it.
    assert not next(iter(run(range(2))[1].loops.values())).vector
    assert next(iter(run(range(3))[1].loops.values())).vector
    assert not next(iter(run(range(3), peel=1)[1].loops.values())).vector


def test_a_schedule_picks_steps():
    asked = []

    def schedule(total, history):
        asked.append((total, history))
        return [0, 1, total - 1]

    seen, _, _ = run("abcdef", vector=False, schedule=schedule)
    assert seen == [("a", "concrete", 0), ("b", "concrete", 1), ("f", "concrete", 5)] and asked == [(6, 1)]


def test_items_of_any_kind_stand_for_all_steps():
    y = torch.arange(8.0).reshape(4, 2)
    (*_, (last, *_)) = run(y)[0]
    assert torch.equal(last, y[1:])
    (*_, (last, *_)) = run([0.5, 1.5, 2.5])[0]
    assert torch.equal(last, torch.tensor([1.5, 2.5]))
    (*_, ((t, row), *_)) = run(list(enumerate(["same"] * 4)))[0]
    assert t.values == (1, 2, 3) and row == "same"


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (["a", "b", "c"], "of type str"),
        ([1, 1.5, 2], "different types"),
        ([torch.zeros(2), torch.zeros(2), torch.zeros(3)], "different shapes"),
        ([(1, 2), (1,), (1, 2)], "different lengths"),
    ],
)
def test_items_that_cannot_are_refused(items, words):
    with pytest.raises(NotVectorisable, match=words):
        run(items)


def test_loops_without_steps_and_loops_that_are_left():
    with pytest.raises(DataError, match=r"the time loop at .*test_loops.py:\d+ has no steps"):
        run([])
    _, runner, checks = run(range(6), stop=2)
    assert runner.incomplete == [next(iter(runner.loops.values())).where]
    assert checks in ([], [False, True])


def test_a_loop_in_a_preparing_pass_is_a_helper():
    inner = Loop("inner", "here:1", 4, 1, 1, (("outer", "prev", 1),), True)
    assert inner.helper and not Loop("inner", "here:1", 4, 1, 1, (("outer", "curr", 0),), True).helper
