"""States that a fit does not use, and states that it cannot tell apart, are said in its status."""

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_em import lumps, touching
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.fitting import fit
from symhmm.infer.occupied import unused_states

SPREAD = cf.real([1.0, 1.0])


def values(weights, loc):
    return {"weights": cf.real(weights), "loc": cf.real(loc), "scale": SPREAD}


def test_all_states_in_use_is_no_remark():
    assert unused_states(compile(lumps, touching()), values([0.5, 0.5], [-1.5, 1.5])) == ()


def test_empty_state_is_named_with_its_count():
    (remark,) = unused_states(compile(lumps, touching()), values([0.999, 0.001], [0.0, 60.0]))
    assert remark.startswith("state 1 of 'z' is empty: ")
    assert remark.endswith(" of 200 expected")


def test_states_alike_are_named():
    (remark,) = unused_states(compile(lumps, touching()), values([0.4, 0.6], [0.3, 0.3]))
    assert remark == "states 0 and 1 of 'z' are alike: no site tells them apart"


def chain(y, mask):
    """Ragged sequences of three states, the last of which cannot be reached."""
    loc = pyro.param("loc", lambda: cf.real([-1.0, 1.0, 3.0]))
    rows = cf.real([[0.8, 0.2, 0.0], [0.3, 0.7, 0.0], [0.1, 0.1, 0.8]]).log()
    with pyro.plate("n", y.shape[1], dim=-1):
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=rows[z]))
            with pyro.poutine.mask(mask=mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def test_loops_are_counted_with_their_first_steps():
    y = torch.randn(6, 4, generator=cf.generator(0), dtype=cf.REAL)
    mask = torch.arange(6)[:, None] < torch.tensor([6, 3, 5, 2])
    density = compile(chain, y, mask)
    (remark,) = unused_states(density, density.initial())
    assert remark == "state 2 of 'z_{time}' is empty: 0 of 24 expected"


def test_nothing_to_say_without_states_or_without_a_finite_density():
    assert unused_states(compile(cf.gaussian, cf.sample()), {"loc": cf.real(0.0), "sd": cf.real(1.0)}) == ()
    assert unused_states(compile(lumps, touching()), values([0.5, 0.5], [np.inf, np.inf])) == ()


@pytest.mark.parametrize("method", ["mle", "em"])
def test_one_component_too_many_is_in_the_status(method):
    def model(y):
        weights = pyro.param("weights", lambda: cf.real([0.9, 0.1]), constraint=constraints.simplex)
        loc = pyro.param("loc", lambda: cf.real([0.0, 9.0]))
        with pyro.plate("n", len(y)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("y", dist.Normal(loc[z], 1.0), obs=y)

    y = torch.linspace(-1.5, 1.5, 60, dtype=cf.REAL)
    status = fit(model, y, method=method, restarts=1, jitter=0.0).status
    assert "is empty" in repr(status) or "are alike" in repr(status)
