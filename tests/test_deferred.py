"""Log-factors of steps run one by one are evaluated together, and nothing that a single step would show is missed."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Normal

from symhmm.capture import deferred
from symhmm.capture.program import capture
from symhmm.errors import DataError, SymhmmWarning
from symhmm.testing import enumerate_joint

LOC = torch.tensor([-1.0, 1.0])
STEPS = 40


def warnings_of(program, *args) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SymhmmWarning)
        capture(program, args)
    return [str(w.message) for w in caught if issubclass(w.category, SymhmmWarning)]


def chain(emission):
    """A program of two states with ``emission(t, z)``."""

    def program(y):
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.tensor([[0.9, 0.1], [0.2, 0.8]])[z]))
            pyro.sample(f"y_{t}", emission(t, z), obs=y[t])

    return program


def three(z):
    loc = LOC[z].unsqueeze(-1)
    return loc.expand(*loc.shape[:-1], 3)


FAMILIES = {
    "normal": (lambda t, z: dist.Normal(LOC[z], 1.0), torch.randn),
    "vector": (lambda t, z: dist.MultivariateNormal(three(z), torch.eye(3)), lambda n: torch.randn(n, 3)),
    "event": (lambda t, z: dist.Normal(three(z), 1.0).to_event(1), lambda n: torch.randn(n, 3)),
    "transformed": (lambda t, z: dist.LogNormal(LOC[z], 1.0), lambda n: torch.rand(n) + 0.1),
    "masked": (lambda t, z: dist.Normal(LOC[z], 1.0).mask(torch.tensor(True)), torch.randn),
    "discrete": (lambda t, z: dist.Poisson(LOC[z].exp()), lambda n: torch.randint(0, 5, (n,)).float()),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_thousands_of_steps_cost_a_few_log_probabilities(family, monkeypatch) -> None:
    emission, draw = FAMILIES[family]
    seen = []
    evaluated = deferred.log_factor
    monkeypatch.setattr(deferred, "log_factor", lambda *args: seen.append(args) or evaluated(*args))
    assert not warnings_of(chain(emission), draw(STEPS))
    # The first step is made differently, and dimensions of states alternate.
    assert len(seen) <= 30


class Clocked(dist.TorchDistribution):
    """Whose log-probability knows more than its attributes show."""

    arg_constraints = {}
    support = dist.constraints.real
    clock = 0

    def __init__(self, loc):
        super().__init__(loc.shape, validate_args=False)
        self.loc = loc

    def log_prob(self, value):
        return Normal(self.loc, 1.0 if type(self).clock < STEPS // 2 else 2.0).log_prob(value)


def test_a_family_of_the_user_is_asked_at_every_step() -> None:
    def program(y):
        Clocked.clock = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
            pyro.sample(f"y_{t}", Clocked(LOC[z]), obs=y[t])
            Clocked.clock += 1

    said = warnings_of(program, torch.randn(STEPS))
    assert len(said) == 1
    assert "differs from the program's own" in said[0]


@pytest.mark.parametrize("late", [3, STEPS // 3, STEPS - 1])
def test_a_python_number_that_changes_late_is_noticed(late) -> None:
    scales = [1.0] * late + [2.0] * (STEPS - late)

    def program(y):
        count = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
            pyro.sample(f"y_{t}", dist.Normal(LOC[z], scales[count]), obs=y[t])
            count += 1  # noqa: SIM113

    said = warnings_of(program, torch.randn(STEPS))
    assert len(said) == 1
    assert "differs from the program's own" in said[0]


def test_an_argument_written_to_after_its_use_is_noticed() -> None:
    def program(y):
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Bernoulli(0.3)).long()
            loc = LOC[z].clone()
            pyro.sample(f"y_{t}", dist.Normal(loc, torch.ones(2)), obs=y[t])
            loc += 1.0

    y = torch.randn(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SymhmmWarning)
        graph = capture(program, (y,))
    wanted = torch.stack([torch.tensor([0.7, 0.3]).log() + dist.Normal(LOC, 1.0).log_prob(v) for v in y])
    torch.testing.assert_close(enumerate_joint(graph), wanted.logsumexp(-1).sum())


def test_an_argument_out_of_range_at_a_late_step_is_refused() -> None:
    scale = torch.ones(STEPS)
    scale[STEPS - 5] = -1.0
    with pytest.raises(ValueError, match="scale"):
        capture(chain(lambda t, z: dist.Normal(LOC[z], scale[t])), (torch.randn(STEPS),))


def test_an_observation_outside_a_support_made_of_others_is_refused() -> None:
    def program(y):
        for t in pyro.markov(range(len(y))):
            pyro.sample(
                f"y_{t}", dist.MaskedMixture(torch.tensor(True), dist.Gamma(1.0, 1.0), dist.Gamma(2.0, 1.0)), obs=y[t]
            )

    y = torch.rand(STEPS) + 0.1
    y[STEPS - 3] = -1.0
    with pytest.raises((DataError, ValueError)):
        capture(program, (y,))
