"""The loop variable of a vectorised loop means at every step what the integer means there."""

import pytest
import torch
from torch.testing import assert_close

from symhmm.capture.names import Names
from symhmm.capture.time_index import FirstStep, Level, NotVectorisable, TimeIndex, select

VALUES = (2, 3, 4, 5)


@pytest.fixture
def level():
    level = Level("loop", len(VALUES), 1, Names(), object())
    with level.active():
        yield level


@pytest.fixture
def t(level):
    return TimeIndex(level, VALUES, VALUES)


X = torch.arange(7 * 8 * 7.0).reshape(7, 8, 7)


@pytest.mark.parametrize(
    "pick",
    [
        lambda x, t: x[t],
        lambda x, t: x[t - 1],
        lambda x, t: x[-t],
        lambda x, t: x[..., t],
        lambda x, t: x[:, t + 1],
        lambda x, t: x[t, ..., t],
        lambda x, t: x[t - 1 : t + 1],
        lambda x, t: x[..., t : t + 2, :],
        lambda x, t: x[None, t, None],
        lambda x, t: x[t, torch.tensor([0, 2])],
        lambda x, t: x[torch.tensor([1, 0]), t],
        lambda x, t: x[t % 3],
        lambda x, t: x[2 * t - 4, t // 2],
    ],
)
def test_indexing_means_the_same_at_every_step(level, t, pick) -> None:
    class Indexed:
        def __getitem__(self, index):
            return select(X, index, int)

    found = level.unbatch(pick(Indexed(), t))
    assert_close(found, torch.stack([pick(X, k) for k in VALUES]))


def test_index_out_of_range(t) -> None:
    with pytest.raises(IndexError, match="index 7 is out of bounds for dimension 0 with size 7"):
        select(X, t + 2, int)


def test_window_of_varying_length(t) -> None:
    with pytest.raises(NotVectorisable, match="length that depends"):
        select(X, slice(None, t), int)


def test_branches_are_decided_where_all_steps_agree(t) -> None:
    assert t > 0 and bool(t != 0) and t - 1 >= 1 and not (t < 1)
    with pytest.raises(NotVectorisable, match="truth value") as caught:
        bool(t < 4)
    assert caught.value.peel == 2
    with pytest.raises(NotVectorisable) as caught:
        bool(t % 2 == 0)
    assert caught.value.peel == 0


def test_arithmetic_with_tensors(level, t) -> None:
    lengths = torch.tensor([3, 5])
    for found in (t < lengths, lengths > t):
        assert_close(level.unbatch(found), torch.stack([k < lengths for k in VALUES]))
    assert_close(level.unbatch(t * 0.5), torch.tensor([0.5 * k for k in VALUES]))


def test_names_resolve_and_print(level, t) -> None:
    names = level.names
    for name, second, template in (
        (f"x_{t}", "x_3", "x_{time}"),
        (f"x_{t:03d}", "x_003", "x_{time}"),
        (f"x_{t + 1}", "x_4", "x_{time+1}"),
        ("x_%d" % t, "x_3", "x_{time}"),  # noqa: UP031
        ("x_" + str(t - 2), "x_1", "x_{time-2}"),
        (f"{t}_{7 - t}", "3_4", None),
    ):
        assert names.resolve(name, {"loop": 1}) == second
        if template is not None:
            assert names.template(name, {"loop": "time"}) == template
    level.lag = 1
    assert names.template(f"y_{t + 10}", {"loop": "time"}) == "y_{time+9}"


def test_states_kept_in_a_dictionary(level) -> None:
    states = {FirstStep(0): "a", FirstStep(1): "b"}
    previous = TimeIndex(level, (1, 2, 3, 4), (1, 2, 3, 4))
    assert states[previous - 1] == "a"
    states[previous] = "c"
    current = TimeIndex(level, VALUES, VALUES)
    assert states[current - 1] == "c"
    assert current not in states


def test_a_level_knows_what_differs_between_its_steps(level) -> None:
    x = level.batch(torch.ones(4, 2))
    assert level.holds(x) and level.holds(x + torch.zeros(3, 2))
    assert not level.holds(torch.zeros(2))
    with pytest.raises(NotVectorisable, match="float"):
        float(TimeIndex(level, VALUES, VALUES))
