"""Warm starts: Ctrl-C anywhere in them and after them returns what there was, and nothing goes on."""

import closed_forms as cf
import numpy as np
import pytest
import torch
from interrupts import stopped_at

from symhmm.compiler.density import compile
from symhmm.infer import laplace_fit, svi
from symhmm.infer.target import Target
from symhmm.infer.warm import Interrupted, warm_start

OPTIONS = {svi: {"steps": 120, "cooldown": 40, "evaluate": 20, "restarts": 3, "seed": 1}, laplace_fit: {"restarts": 3}}


def interrupted(monkeypatch, when, run):
    """What ``run`` returns if Ctrl-C is pressed at the evaluation number ``when``, and the number of evaluations."""
    return stopped_at(monkeypatch, Target, "evaluate", when, run)


@pytest.mark.parametrize("driver", [svi, laplace_fit], ids=["svi", "laplace"])
def test_ctrl_c_at_any_evaluation_returns_the_fit_so_far(monkeypatch, driver):
    y = cf.balanced()
    density = compile(cf.random_intercept, y)
    whole, total = interrupted(monkeypatch, 0, lambda: driver.run(density, **OPTIONS[driver]))
    assert whole.status.ok or driver is svi
    warm, before = 0, -np.inf
    for when in range(1, total + 1):
        found, count = interrupted(monkeypatch, when, lambda: driver.run(density, **OPTIONS[driver]))
        assert count == when
        assert found.status.reason == "stopped by Ctrl-C"
        assert not found.status.ok
        assert all(bool(torch.isfinite(v).all()) for v in found.values.values())
        assert "checkpoint" not in found.status.try_
        if found.status.causes[0].startswith("before the first step"):
            warm += 1
            assert found.objective == -np.inf
            assert found.values["tau"].item() == 1.0  # held
            seen = [o for o in found.optima.objectives if np.isfinite(o)]
            alike = {"loc": found.values["loc"], "tau": cf.real(1.0), "d": torch.zeros(len(y), dtype=cf.REAL)}
            assert not seen or density.log_prob(alike).item() == pytest.approx(max(seen), abs=1e-9)
        else:
            assert np.isfinite(found.objective)
            assert before - 1e-9 <= found.objective <= whole.objective + 1e-9
            before = found.objective
    assert 5 < warm <= total
    assert (warm < total) == (driver is laplace_fit)


def test_what_there_was_is_the_best_ascent(monkeypatch):
    goal = svi.target(compile(cf.random_intercept, cf.balanced()), {}, "svi")

    def run():
        with pytest.raises(Interrupted) as caught:
            warm_start(goal, seed=1, restarts=3)
        return caught.value

    (whole, ascents, evaluations), total = interrupted(monkeypatch, 0, lambda: warm_start(goal, seed=1, restarts=3))
    assert total == evaluations
    first, _ = interrupted(monkeypatch, 1, run)
    assert torch.equal(first.goal.start, goal.start)
    assert first.ascents == []
    last, _ = interrupted(monkeypatch, total, run)
    assert last.evaluations == total
    assert len(last.ascents) == len(ascents)
    assert last.ascents[-1].interrupted
    assert max(a.value for a in last.ascents) == max(a.value for a in ascents)
    assert torch.equal(last.goal.start, whole.start)
