"""Both checks of a vectorised body: neither carried tensors nor Python state get through."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from symhmm.capture.program import capture
from symhmm.capture.verify import windows
from symhmm.errors import SymhmmWarning
from symhmm.testing import enumerate_joint

LOC = torch.tensor([-1.0, 1.0])


def running_mask(y):
    """Agrees with a constant on these data: only the marks can tell."""
    seen = torch.tensor(True)
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
        pyro.sample(f"y_{t}", dist.Normal(LOC[z] * (1 + seen), 1.0), obs=y[t])
        seen = seen | (y[t] > 100)


def moving_average(y):
    average = torch.zeros(())
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
        pyro.sample(f"y_{t}", dist.Normal(LOC[z] + average, 1.0), obs=y[t])
        average = 0.9 * average + 0.1 * y[t]


def written_through_a_view(y):
    total = torch.zeros(2)
    part = total[0]
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
        pyro.sample(f"y_{t}", dist.Normal(LOC[z] + total[0], 1.0), obs=y[t])
        part += 0.1


def counter(y):
    """A Python number: only the comparison with concrete steps can tell."""
    rate = 1.0
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
        pyro.sample(f"y_{t}", dist.Normal(LOC[z] * rate, 1.0), obs=y[t])
        rate *= 0.9


def iterator(y):
    numbers = iter(range(len(y)))
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
        pyro.sample(f"y_{t}", dist.Normal(LOC[z] * next(numbers), 1.0), obs=y[t])


def left_early(y):
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
        pyro.sample(f"y_{t}", dist.Normal(LOC[z], 1.0), obs=y[t])
        if t >= 5:
            break


def by_hand(program, y):
    """The sites of these programs are independent given the data: sum each step's state on its own."""
    total, carried, rate = torch.zeros(()), torch.zeros(()), 1.0
    for t in range(6 if program is left_early else len(y)):
        loc = {
            running_mask: LOC * 2,
            moving_average: LOC + carried,
            written_through_a_view: LOC + 0.1 * t,
            counter: LOC * rate,
            iterator: LOC * t,
            left_early: LOC,
        }[program]
        total = total + (torch.tensor([0.7, 0.3]).log() + dist.Normal(loc, 1.0).log_prob(y[t])).logsumexp(0)
        carried, rate = 0.9 * carried + 0.1 * y[t], rate * 0.9
    return total


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (running_mask, "carried over more steps"),
        (moving_average, "carried over more steps"),
        (written_through_a_view, "carried over more steps"),
        (counter, "differs from the program's own"),
        (iterator, "differs from the program's own"),
        (left_early, "left before its end"),
    ],
)
def test_what_a_vectorised_body_gets_wrong_is_noticed(program, reason) -> None:
    y = torch.randn(9)
    with pytest.warns(SymhmmWarning, match=reason):
        graph = capture(program, (y,))
    assert {note.tier for note in graph.loops.values()} <= {"stacked", "unrolled"}
    assert_close(enumerate_joint(graph), by_hand(program, y))


def test_long_loops_are_checked_at_both_ends_and_in_the_middle() -> None:
    schedule = windows(500)
    assert schedule(500, 1) == list(range(500))
    assert schedule(1000, 1) == [0, 1, 2, 3, 4, 499, 500, 998, 999]
    assert schedule(1000, 2)[-3:] == [997, 998, 999]


def test_a_late_change_of_a_long_loop_is_noticed() -> None:
    def program(y):
        scales = [1.0] * 1190 + [2.0] * 10
        for t in pyro.markov(range(len(y))):
            pyro.sample(f"y_{t}", dist.Normal(0.0, scales[t]), obs=y[t])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SymhmmWarning)
        capture(program, (torch.randn(1200),))
    assert any("differs from the program's own" in str(w.message) for w in caught)
