"""The kernel that plays tapes: functions that it works out by itself, against forty digits."""

import numpy as np
import pytest
import torch
from mpmath import mp
from torch.testing import assert_close

from symhmm.chains import tape_steps
from symhmm.chains.places import LIKE
from symhmm.chains.tape_steps import NAMES, replay


def play(word, x):
    """One word of one operand, through the kernel itself."""
    memory = torch.cat([x, torch.zeros_like(x)])
    code = np.array([(NAMES.index(word), len(x), len(x), 1, 0, 0, 0)], dtype=np.int32)
    none = np.zeros(1, dtype=np.int32)
    inputs = np.zeros(1, dtype=np.int64)
    replay(1, code.ctypes.data, none.ctypes.data, inputs, memory.data_ptr(), LIKE[x.dtype])
    return memory[len(x) :]


@pytest.mark.parametrize("word, exact", [("digamma", mp.digamma), ("lgamma", lambda x: mp.log(abs(mp.gamma(x))))])
def test_functions_of_gamma_against_forty_digits(word, exact):
    x = torch.cat(
        [
            torch.logspace(-8, 8, 60),
            torch.linspace(-7.7, 20, 301),
            torch.tensor([1.4616321449683622, 2.0, 9.9999, 10.0]),
            -torch.logspace(-12, -2, 30),
        ]
    ).double()
    with mp.workdps(40):
        wanted = torch.tensor([float(exact(mp.mpf(v))) for v in x.tolist()], dtype=torch.float64)
    assert_close(play(word, x), wanted, rtol=1e-13, atol=2e-14)


@pytest.mark.parametrize("word", ["digamma", "lgamma"])
def test_poles_and_ends_are_those_of_torch(word):
    x = torch.tensor([0.0, -0.0, -1.0, -5.0, torch.inf, torch.nan, 1e300, -1e30, -torch.inf], dtype=torch.float64)
    assert_close(play(word, x), getattr(torch, word)(x), equal_nan=True)


def test_words_and_numbers_go_together():
    assert [getattr(tape_steps, word.upper()) for word in NAMES] == list(range(len(NAMES)))


def test_an_empty_tape_leaves_the_memory_alone():
    memory = torch.arange(3.0)
    none = np.zeros(1, dtype=np.int32)
    replay(0, none.ctypes.data, none.ctypes.data, np.zeros(1, dtype=np.int64), memory.data_ptr(), LIKE[memory.dtype])
    assert_close(memory, torch.arange(3.0))
