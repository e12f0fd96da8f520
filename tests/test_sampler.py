"""Chains over a plain function: moments, seeds, interruption."""

import os
import signal
import sys
import threading

import numpy as np
import pytest

from symhmm.errors import FitError
from symhmm.infer.sampler import chain_from, require_nutpie, sample
from symhmm.infer.whiten import Whitening

pytest.importorskip("nutpie")
OPTIONS = {"target_accept": 0.8, "max_depth": 8}
WHERE = Whitening(np.array([1.0, -2.0]), np.array([[2.0, 0.0], [1.0, 0.5]]))


def normal(x):
    z = np.linalg.solve(WHERE.root, x - WHERE.centre)
    return -0.5 * float(z @ z), -np.linalg.solve(WHERE.root.T, z)


def test_moments_of_a_normal():
    found, stopped = sample(normal, WHERE, [np.ones(2)] * 2, [1, 2], tune=200, draws=2000, **OPTIONS)
    x = np.concatenate([found[0].points, found[1].points])
    wanted = WHERE.root @ WHERE.root.T
    assert not stopped
    assert np.allclose(x.mean(0), WHERE.centre, atol=5 * np.sqrt(np.diag(wanted) / 1500))
    assert np.allclose(np.cov(x.T), wanted, rtol=0.15)
    z = np.linalg.solve(WHERE.root, (found[0].points - WHERE.centre).T)
    assert np.allclose(found[0].value, -0.5 * (z * z).sum(0))


def test_a_chain_depends_on_its_seed_and_start_alone():
    kept = {}
    alone, _ = sample(normal, WHERE, [np.ones(2)], [7], tune=50, draws=60, **OPTIONS)
    beside, _ = sample(
        normal, WHERE, [-np.ones(2), np.ones(2), np.ones(2)], [1, 7, 8], tune=50, draws=60, cores=2, done=kept.__setitem__,
        **OPTIONS,
    )  # fmt: skip
    assert np.array_equal(alone[0].points, beside[1].points)
    assert not np.array_equal(beside[2].points, beside[1].points)
    assert set(kept) == {0, 1, 2}
    assert np.array_equal(chain_from(beside[1].arrays("a."), "a.").points, beside[1].points)


def test_ctrl_c_returns_what_there_is():
    draws = 0

    def tick():
        nonlocal draws
        draws += 1
        if draws == 350:  # in the second chain, after its warm-up
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    def slow(x):
        event = threading.Event()
        event.wait(0.001)
        return normal(x)

    found, stopped = sample(slow, WHERE, [np.ones(2)] * 3, [1, 2, 3], tune=50, draws=200, tick=tick, **OPTIONS)
    assert stopped
    assert len(found[0].points) == 200
    assert 0 < len(found[1].points) < 200
    assert 2 not in found


@pytest.mark.parametrize("pause", [0.02, 5.0])
@pytest.mark.parametrize("when", [1, 30, 400, 1500])
def test_what_is_raised_in_a_chain_ends_all_of_them(when, pause, monkeypatch):
    """Ctrl-C gives the draws before it, which are those of an undisturbed chain; anything else is raised.

    With a long pause the sampler itself is the first to say that a chain has failed.
    """
    monkeypatch.setattr("symhmm.infer.sampler.PAUSE", pause)
    starts, seeds = [np.ones(2)] * 2, [1, 2]
    whole, _ = sample(normal, WHERE, starts, seeds, tune=50, draws=200, **OPTIONS)

    def density(what):
        count = 0

        def evaluate(x):
            nonlocal count
            count += 1
            if count == when:
                raise what
            return normal(x)

        return evaluate

    found, stopped = sample(density(KeyboardInterrupt()), WHERE, starts, seeds, tune=50, draws=200, **OPTIONS)
    assert stopped
    assert sum(len(c.points) for c in found.values()) < 400
    for i, chain in found.items():
        assert np.array_equal(chain.points, whole[i].points[: len(chain.points)])
    assert bool(found) == (when > 200)
    with pytest.raises(ZeroDivisionError):
        sample(density(ZeroDivisionError()), WHERE, starts, seeds, tune=50, draws=200, **OPTIONS)


def test_what_a_listener_raises_is_raised():
    def tick():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sample(normal, WHERE, [np.ones(2)], [1], tune=20, draws=20, tick=tick, **OPTIONS)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nutpie", None)
    with pytest.raises(FitError, match=r"needs the package nutpie.*\n.*pip install 'symhmm\[nuts\]'"):
        require_nutpie()
