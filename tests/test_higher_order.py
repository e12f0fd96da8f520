"""A chain of higher order costs K^(h + 1) a step, by count and by the clock: no matrix of its joint states is made."""

import math
import time

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

import symhmm
from symhmm.chains.operator import chain_message
from symhmm.compiler.steps import ChainContract


@pytest.fixture
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def terms(states, history, rows, steps):
    generator = torch.Generator().manual_seed(0)
    transition = torch.randn(1, 1, states**history, states, generator=generator).log_softmax(-1)
    return [transition.requires_grad_(), torch.randn(rows, steps, states, generator=generator).requires_grad_()]


def seconds(states, history, rows=16, steps=60):
    """Least time of this thread for value and gradient."""
    inputs, best = terms(states, history, rows, steps), math.inf
    for _ in range(12):
        start = time.thread_time()
        torch.autograd.grad(chain_message(*inputs, history=history).sum(), inputs)
        best = min(best, time.thread_time() - start)
    return best


@pytest.mark.parametrize("history", [2, 3])
def test_the_joint_states_as_one_chain_give_the_same(history):
    transition, emission = (x.detach() for x in terms(3, history, 2, 7))
    states, rest = 3**history, 3 ** (history - 1)
    whole = torch.full((1, 1, states, states), -torch.inf)
    for s in range(states):
        for j in range(3):
            whole[0, 0, s, (s % rest) * 3 + j] = transition[0, 0, s, j]
    wanted = chain_message(whole, emission[..., torch.arange(states) % 3])
    assert_close(chain_message(transition, emission, history=history), wanted)


@pytest.mark.parametrize(("history", "small", "large"), [(2, 4, 16), (3, 3, 9)])
@pytest.mark.usefixtures("_one_thread")
def test_time_grows_as_the_products_do(history, small, large):
    seconds(small, history), seconds(large, history)  # compiled, and in the caches
    grown = seconds(large, history) / seconds(small, history)
    power = math.log(grown) / math.log(large / small)
    assert power < history + 1.3, f"K^{power:.1f} instead of K^{history + 1}; K^{2 * history} without structure"


@pytest.mark.parametrize("states", [2, 5])
def test_the_plan_counts_them(states):
    def second(y, moves):
        a = b = torch.tensor(0)
        for t in pyro.markov(range(len(y)), history=2):
            a, b = b, pyro.sample(f"z_{t}", dist.Categorical(moves[a, b]))
            pyro.sample(f"y_{t}", dist.Normal(1.0 * b, 1.0), obs=y[t])

    density = symhmm.compile(second, torch.zeros(12), torch.full([states] * 3, 1 / states))
    (chain,) = (s for s in density.plan.steps if isinstance(s, ChainContract))
    assert chain.history == 2 and chain.flops == chain.length * states**3 and chain.strategy == "kernel"
