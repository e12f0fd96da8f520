"""Test programs with random effects, several emission streams and capture histories: what ecologists write."""

import pyro
import pyro.distributions as dist
import torch
from program_table import Rows, binary, normal, row, uniform
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch.distributions import constraints

ROWS: Rows = []

STATES, KINDS = 2, 3


def animals(group_effect: str, individual_effect: str):
    """Two groups of three individuals, five steps; one individual is padding and some ends of tracks are missing."""

    def arguments():
        shape = (3, 2, 5)
        length = uniform(*shape, seed=3) * 2.0
        length[0, 0, 1] = length[1, 1, 0] = length[2, 0, 4] = 0.0
        dive = uniform(*shape, seed=4)
        dive[0, 1, 2] = dive[2, 1, 3] = 0.0
        present = torch.ones(3, 2, dtype=torch.bool)
        present[2, 1] = False
        track = torch.ones(shape, dtype=torch.bool)
        track[1, 0, 3:] = False
        track[2, 1] = False
        data = {"length": length, "turn": normal(*shape, seed=5).clamp(-3, 3), "dive": dive}
        return data, {"group": group_effect, "individual": individual_effect}, present, track

    return arguments


def effect(kind: str, name: str, plate_shape: tuple[int, ...]):
    """A shift of the transition logits: none, one of a few discrete values, or normal."""
    if kind == "discrete":
        weights = pyro.param(f"{name}_weights", lambda: torch.rand(KINDS), constraint=constraints.simplex)
        values = pyro.param(f"{name}_values", lambda: torch.randn(KINDS, STATES * STATES))
        return Vindex(values)[pyro.sample(name, dist.Categorical(weights)), :]
    if kind == "continuous":
        spread = pyro.param(f"{name}_spread", lambda: torch.ones(STATES * STATES), constraint=constraints.positive)
        return pyro.sample(name, dist.Normal(torch.zeros(STATES * STATES), spread).to_event(1))
    return torch.zeros(STATES * STATES)


def zero_inflated(name, logits, density, value):
    """A stream that is exactly zero with some probability, as two sites: is it zero, and how large is it if not."""
    zero = value == 0.0
    pyro.sample(f"{name}_zero", dist.Categorical(logits=logits), obs=zero.long())
    pyro.sample(name, dist.MaskedMixture(zero, density, dist.Delta(torch.zeros(()))), obs=value)


def mixed_effects(data, kinds, present, track):
    base = pyro.param("base", lambda: torch.randn(STATES * STATES))
    positive = constraints.positive
    step_shape = pyro.param("step_shape", lambda: torch.rand(STATES) + 0.5, constraint=positive)
    step_rate = pyro.param("step_rate", lambda: torch.rand(STATES) + 0.5, constraint=positive)
    turn_focus = pyro.param("turn_focus", lambda: torch.rand(STATES) + 0.5, constraint=positive)
    dive_up = pyro.param("dive_up", lambda: torch.rand(STATES) + 0.5, constraint=positive)
    dive_down = pyro.param("dive_down", lambda: torch.rand(STATES) + 0.5, constraint=positive)
    no_step = pyro.param("no_step", lambda: torch.randn(STATES, 2))
    no_dive = pyro.param("no_dive", lambda: torch.randn(STATES, 2))
    with pyro.plate("group", 2, dim=-1):
        logits = base + effect(kinds["group"], "of_group", (2,))
        with pyro.plate("individual", 3, dim=-2), poutine.mask(mask=present):
            logits = logits + effect(kinds["individual"], "of_individual", (3, 2))
            z = torch.tensor(0)
            for t in pyro.markov(range(data["length"].shape[-1])):
                with poutine.mask(mask=track[..., t]):
                    table = logits.reshape((*logits.shape[:-1], STATES, STATES))
                    z = pyro.sample(f"z_{t}", dist.Categorical(logits=Vindex(table)[..., z, :]))
                    gamma = dist.Gamma(Vindex(step_shape)[..., z], Vindex(step_rate)[..., z])
                    zero_inflated(f"length_{t}", Vindex(no_step)[..., z, :], gamma, data["length"][..., t])
                    turn = dist.VonMises(torch.zeros(()), Vindex(turn_focus)[..., z])
                    pyro.sample(f"turn_{t}", turn, obs=data["turn"][..., t])
                    beta = dist.Beta(Vindex(dive_up)[..., z], Vindex(dive_down)[..., z])
                    zero_inflated(f"dive_{t}", Vindex(no_dive)[..., z, :], beta, data["dive"][..., t])


for group in ("none", "discrete", "continuous"):
    for individual in ("none", "discrete", "continuous"):
        name = f"mixed effects: group {group}, individual {individual}"
        # Three individuals share their group's effect: too many joint states for brute force.
        row(ROWS, name, animals(group, individual), nesting=2, small=group != "discrete")(mixed_effects)


def histories(*shape: int):
    def arguments():
        caught = binary(*shape, seed=7, probability=0.45)
        caught[0, 0] = 1.0
        return (caught,)

    return arguments


def alive_from(caught):
    """Whether an animal was caught at an earlier occasion; shape (animals, occasions)."""
    earlier = caught.cumsum(-1) - caught
    return earlier > 0


@row(ROWS, "capture-recapture", histories(4, 6), nesting=1)
def capture_recapture(caught):
    survive = pyro.sample("survive", dist.Beta(2.0, 2.0))
    detect = pyro.sample("detect", dist.Uniform(0.0, 1.0))
    known = alive_from(caught)
    with pyro.plate("animals", len(caught), dim=-1):
        alive = torch.ones(len(caught))
        for t in pyro.markov(range(caught.shape[-1])):
            with poutine.mask(mask=known[:, t]):
                now = known[:, t].to(survive.dtype)
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(now * survive * alive + 1.0 - now))
                pyro.sample(f"caught_{t}", dist.Bernoulli(detect * alive), obs=caught[:, t])


@row(ROWS, "capture-recapture, survival per occasion", histories(3, 5), nesting=1, tier="vector")
def capture_recapture_occasions(caught):
    detect = pyro.sample("detect", dist.Uniform(0.0, 1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    known = alive_from(caught)
    plate = pyro.plate("animals", len(caught), dim=-1)
    alive = torch.ones(len(caught))
    for t in pyro.markov(range(caught.shape[-1])):
        logit = pyro.sample(f"logit_{t}", dist.Normal(level, 0.5)) if t > 0 else torch.tensor(0.0)
        with plate, poutine.mask(mask=known[:, t]):
            now = known[:, t].to(logit.dtype)
            alive = pyro.sample(f"alive_{t}", dist.Bernoulli(now * logit.sigmoid() * alive + 1.0 - now))
            pyro.sample(f"caught_{t}", dist.Bernoulli(detect * alive), obs=caught[:, t])


@row(ROWS, "capture-recapture, effect of each animal", histories(4, 5), nesting=1)
def capture_recapture_animals(caught):
    base = pyro.param("base", torch.tensor(0.5))
    spread = pyro.param("spread", torch.tensor(0.7), constraint=constraints.positive)
    detect = pyro.param("detect", torch.tensor(0.6), constraint=constraints.unit_interval)
    known = alive_from(caught)
    with pyro.plate("animals", len(caught), dim=-1):
        own = pyro.sample("own", dist.Normal(base, spread))
        alive = torch.ones(len(caught))
        for t in pyro.markov(range(caught.shape[-1])):
            with poutine.mask(mask=known[:, t]):
                now = known[:, t].to(own.dtype)
                alive = pyro.sample(f"alive_{t}", dist.Bernoulli(now * own.sigmoid() * alive + 1.0 - now))
                pyro.sample(f"caught_{t}", dist.Bernoulli(detect * alive), obs=caught[:, t])


@row(ROWS, "three states of life and death", histories(3, 6), nesting=1, per="animals")
def multistate(caught):
    move = pyro.param("move", lambda: torch.rand(2, 3), constraint=constraints.simplex)
    detect = pyro.param("detect", lambda: torch.rand(2), constraint=constraints.unit_interval)
    dead = torch.tensor([[0.0, 0.0, 1.0]])
    table, seen = torch.cat([move, dead]), torch.cat([detect, torch.zeros(1)])
    with pyro.plate("animals", len(caught), dim=-1):
        state = torch.tensor(0)
        for t in pyro.markov(range(caught.shape[-1])):
            state = pyro.sample(f"state_{t}", dist.Categorical(Vindex(table)[state]))
            pyro.sample(f"caught_{t}", dist.Bernoulli(Vindex(seen)[state]), obs=caught[:, t])


@row(ROWS, "occupancy of sites", lambda: (binary(4, 3, probability=0.3),), nesting=2, tier="none")
def occupancy(found):
    slope = pyro.param("slope", lambda: torch.randn(2))
    with pyro.plate("site", len(found), dim=-2):
        occupied = pyro.sample("occupied", dist.Bernoulli(logits=slope[0]))
        with pyro.plate("visit", found.shape[-1], dim=-1):
            pyro.sample("found", dist.Bernoulli(slope[1].sigmoid() * occupied), obs=found)


@row(ROWS, "zero-inflated Poisson counts", lambda: (torch.tensor([0.0, 3, 0, 1, 0, 7, 2]),))
def zero_inflated_counts(y):
    initial = pyro.param("initial", lambda: torch.rand(2), constraint=constraints.simplex)
    transition = pyro.param("transition", lambda: torch.rand(2, 2), constraint=constraints.simplex)
    rate = pyro.param("rate", lambda: torch.rand(2) + 1.0, constraint=constraints.positive)
    gate = pyro.param("gate", lambda: torch.rand(2), constraint=constraints.unit_interval)
    z = None
    for t in pyro.markov(range(len(y))):
        z = pyro.sample(f"z_{t}", dist.Categorical(initial if z is None else transition[z]))
        pyro.sample(f"y_{t}", dist.ZeroInflatedPoisson(rate[z], gate=gate[z]), obs=y[t])
