"""Steps with tapes: the numbers of the step, fewer operations, and a way out for whoever looks at the operations."""

import random
import subprocess
import sys
import threading

import pyro
import pyro.distributions as dist
import pytest
import torch
from test_arithmetic import at_random
from torch.distributions import constraints
from torch.testing import assert_close

import symhmm
from symhmm.compiler.step import trace
from symhmm.compiler.taped import TapedStep, quick, taped
from symhmm.recorder import record

X, Y = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)


def operations(step):
    return [n.name for n in step.body.graph.nodes if n.op == "call_function" and "getitem" not in n.name]


def between(x, y):
    """Small operations before, beside and after two that a tape leaves to others."""
    beside = (x.exp() * y).sum(0).sin().cos().tanh()
    order = (x - y).tanh().argsort(1)
    moved = x.gather(1, order)
    return moved.cos() + beside, (moved * 2 > x) & (x < 3), beside


def test_parts_before_and_after_what_is_left():
    step = taped(trace(between, [X], [Y]), 1, fewest=-99)
    assert isinstance(step, TapedStep)
    assert operations(step) == ["play", "sort_default", "gather_default", "play_1", "ne"]
    other, given = X.flip(0), Y.flip(0)
    for seen, wanted in zip(step.numbers([other], step.constants([given])), between(other, given), strict=True):
        assert_close(seen, wanted)
        assert seen.dtype == wanted.dtype


def test_parts_of_few_operations_are_left_to_torch():
    plain = trace(between, [X], [Y])
    assert taped(plain, 1, fewest=100) is plain
    step = taped(plain, 1, fewest=4)
    assert operations(step).count("play") == 1 and "play_1" not in operations(step)
    assert_close(step.numbers([X], step.constants([Y])), between(X, Y))


@pytest.mark.parametrize("inputs", [(X, Y.float()), (X.long(), Y.long()), (X.half(), Y.half())])
def test_numbers_of_several_or_other_types_are_left_to_torch(inputs):
    plain = trace(lambda x, y: (x * y + 1) * y - x, inputs, [])
    assert taped(plain, 2, fewest=-99) is plain


def test_numbers_without_dimensions_take_the_type_of_what_they_meet():
    step = taped(trace(lambda x, y: x * y + 1, [X.float()], [torch.tensor(0.1).double()]), 1, fewest=-99)
    (seen, constants) = X.float(), step.constants([torch.tensor(0.3).double()])
    assert_close(step.numbers([seen], constants), X.float() * 0.3 + 1)


def test_results_are_nobody_elses():
    step = taped(trace(lambda x: (x.exp(), x.exp().mT), [X], []), 1, fewest=-99)
    first = step.numbers([X], step.constants([]))
    kept = [x.clone() for x in first]
    second = step.numbers([X + 1], step.constants([]))
    second[0].zero_()
    assert_close(list(first), kept)


def test_who_looks_at_operations_sees_them():
    step = taped(trace(lambda x, y: (x * y).exp().sum(), [X], [Y]), 1, fewest=-99)
    constants = step.constants([Y])
    wanted = torch.stack([(x * Y).exp().sum() for x in (X, X + 1)])
    assert_close(torch.func.vmap(lambda x: step.numbers([x], constants))(torch.stack([X, X + 1])), wanted)
    again = record(lambda v, d: [step.numbers(v, d)], [X], constants)
    assert_close(again(X + 1, *constants)[0], wanted[1])
    free = X.clone().requires_grad_()
    assert_close(torch.autograd.grad(step.plain.body(free, *constants[:-1]), free)[0], (X * Y).exp() * Y)


def test_another_default_device_changes_nothing():
    step = taped(trace(between, [X], [Y]), 1, fewest=-99)
    constants = step.constants([Y])
    with torch.device("meta"):
        seen = step.numbers([X], constants)
    assert_close(seen, between(X, Y))


def test_threads_have_memories_of_their_own():
    step = taped(trace(lambda x: ((x.exp() * 2).sum(0) - x).cumsum(0), [X], []), 1, fewest=-99)
    inputs, seen = [X + i for i in range(8)], {}

    def repeat(i):
        seen[i] = [step.numbers([inputs[i]], step.constants([])) for _ in range(200)]

    threads = [threading.Thread(target=repeat, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for i, x in enumerate(inputs):
        wanted = ((x.exp() * 2).sum(0) - x).cumsum(0)
        assert len(seen[i]) == 200
        assert_close(torch.stack(seen[i]), wanted.expand(200, 3, 4))


@pytest.mark.parametrize("seed", range(60))
def test_any_order_of_operations(seed):
    def f(*values):
        free = [x.detach().requires_grad_() for x in values]
        value = at_random(random.Random(seed), free, 4 + seed % 26)
        if seed % 3 == 0:  # something in the middle that is left to torch
            value = value + free[0].sort(-1).values.square().sum() * value
        return value.detach(), *torch.autograd.grad(value, free, materialize_grads=True)

    inputs, other = ([torch.randn(s, dtype=torch.float64) for s in ((3, 4), (4,), (3, 1), ())] for _ in range(2))
    step = taped(trace(f, inputs[:3], inputs[3:], gradients=True), 3, fewest=seed % 4 * 3 - 9)
    assert isinstance(step, TapedStep)
    assert_close(step.numbers(other[:3], step.constants(other[3:])), f(*other), rtol=1e-10, atol=1e-10)


def model(y):
    logits = pyro.param("logits", lambda: torch.zeros(3, 3))
    loc = pyro.param("loc", lambda: torch.linspace(-1, 1, 3))
    rate = pyro.param("rate", lambda: torch.ones(3), constraints.positive)
    with pyro.plate("sequence", y.shape[1], dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(y.shape[0])):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits[z]))
            pyro.sample(f"y_{t}", dist.StudentT(3.0, loc[z], rate[z]), obs=y[t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_programs_are_played(dtype):
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        density = symhmm.compile(model, torch.randn(30, 4))
        at = density.pack(density.initial()) + 0.1
        value, gradient = density.value_and_grad(at)
    finally:
        torch.set_default_dtype(default)
    step, _ = density._captured(("gradient",))
    assert isinstance(step, TapedStep) and step.nodes < step.plain.nodes / 2
    free = at.clone().requires_grad_()
    wanted = density.log_prob(density.unpack(free))
    (slope,) = torch.autograd.grad(wanted, free)
    close = {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    assert_close(value, wanted.detach(), **close)
    assert_close(gradient, slope, **close)


def test_long_graphs_are_one_operation():
    def f(x):
        for i in range(600):
            x = (x.sin() + i).cos()
        return x.sum(0) - x

    step = quick(trace(f, [X], []), 1)
    assert operations(step) == ["play"]
    assert_close(step.numbers([X], step.constants([])), f(X), rtol=1e-10, atol=1e-10)


def test_programs_without_kernels_do_not_import_numba():
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


WITHOUT = """
import sys, pyro, pyro.distributions as dist, symhmm, torch

def model(y):
    loc = pyro.param("loc", lambda: torch.zeros(()))
    with pyro.plate("rows", 30):
        pyro.sample("y", dist.StudentT(3.0, loc, loc.exp()), obs=y)

density = symhmm.compile(model, torch.linspace(-1, 1, 30))
density.value_and_grad(density.pack(density.initial()))
sys.exit("numba" in sys.modules)
"""
