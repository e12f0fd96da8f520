"""Discrete latents get dimensions of their own, which are used again and never mistaken."""

import pyro.distributions as dist
import pytest
import torch
from torch.testing import assert_close

from symhmm.capture.enumeration import Enumeration
from symhmm.capture.tracking import Position, Tracker
from symhmm.errors import ProgramError


def site(name, fn, depth=None, scope=()):
    """A message as Pyro makes it: in a `pyro.markov` context of some depth, with what is in its sight."""
    infer = {} if depth is None else {"_markov_depth": depth, "_markov_scope": dict.fromkeys(scope, depth)}
    return {"name": name, "fn": fn, "infer": infer}


class Run:
    def __init__(self, nesting=0):
        position = Position()
        self.tracker = Tracker(position, fresh=False)
        self.all = Enumeration(nesting, self.tracker, position)

    def sample(self, name, fn, depth=None, scope=()):
        msg = site(name, fn, depth, (*scope, name))
        self.all.enter(msg)
        self.all.enumerate(msg)
        return msg["value"]


def coin():
    return dist.Bernoulli(torch.tensor(0.5))


def test_values_lie_to_the_left_of_the_plates():
    run = Run(nesting=2)
    assert run.sample("a", dist.Categorical(torch.ones(3))).shape == (3, 1, 1)
    assert run.sample("b", coin()).shape == (2, 1, 1, 1)
    assert run.all.dims == {"a": -3, "b": -4} and run.all.sizes == {"a": 3, "b": 2}
    assert run.all.supports["a"].tolist() == [0, 1, 2]
    assert run.sample("c", dist.OneHotCategorical(torch.ones(3))).shape == (3, 1, 1, 1, 1, 3)


def test_dimensions_are_used_again_out_of_sight():
    run = Run()
    for t in range(4):
        run.sample(f"z_{t}", coin(), 0, [f"z_{t - 1}"] if t else [])
    assert list(run.all.dims.values()) == [-1, -2, -1, -2]
    run.sample("outside", coin())
    run.sample("z_4", coin(), 0, ["z_3"])
    assert run.all.dims["outside"] not in (run.all.dims["z_4"], run.all.dims["z_3"])


def test_a_site_never_shares_a_dimension_with_what_its_distribution_depends_on():
    run = Run()
    with run.tracker:
        a = run.sample("a", coin(), 0)
        # Out of sight, but its value was kept.
        run.sample("b", dist.Bernoulli(0.2 + 0.5 * a), 0)
    assert run.all.dims["b"] != run.all.dims["a"]


def test_a_dimension_of_a_factor_belongs_to_the_site_it_was_computed_from():
    run = Run()
    with run.tracker:
        a = run.sample("a", coin(), 0)
        b = run.sample("b", coin(), 0)
        assert run.all.dims["a"] == run.all.dims["b"] == -1
        reader = site("y", coin(), 0, ["b"])
        run.all.enter(reader)
        assert run.all.name_of(-1, 2, reader, 3 * b) == "b"
        assert run.all.name_of(-1, 2, reader, torch.zeros(2)) == "b"  # nothing is known: what is in sight
        assert run.all.name_of(-1, 3, reader, torch.zeros(3)) is None
        with pytest.raises(ProgramError, match="'y' reads discrete latent 'a', which is out of its sight"):
            run.all.name_of(-1, 2, reader, a + b)
    assert run.all.sites_of(a, "b") == {"a", "b"}


def test_what_cannot_be_listed_is_refused():
    with pytest.raises(ProgramError, match=r"'n' cannot be summed out[\s\S]*Poisson"):
        Run().sample("n", dist.Poisson(torch.tensor(2.0)))


def test_values_that_pyro_may_read_as_indices_say_so():
    value = Run().sample("a", dist.Categorical(torch.ones(4)))
    fn = dist.Categorical(logits=torch.randn(4))
    assert_close(fn.log_prob(value), fn.logits)
