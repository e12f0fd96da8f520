"""The k best states against the whole joint table of random plated graphs, and against masked and padded programs."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, assume, given, note, settings
from joint_tables import groups, keys_of, log_weight, state_of, table
from torch.testing import assert_close

import symhmm
from symhmm.compiler.plan import plan
from symhmm.errors import GraphError
from symhmm.graph import FactorGraph
from symhmm.posterior.decode import viterbi
from symhmm.posterior.ends import Ends
from symhmm.posterior.kbest import best_states
from symhmm.testing import enumerate_joint, random_graphs

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def all_scores(graph: FactorGraph, most: int) -> torch.Tensor:
    """Log-densities of the best joint states, by listing those of each connected group."""
    keys = keys_of(graph)
    best = torch.zeros(1, dtype=torch.float64)
    for group in groups(graph):
        joint = table(graph, group, keys).log().reshape(-1)
        best = (best[:, None] + joint).reshape(-1).sort(descending=True).values[:most]
    return best + enumerate_joint(graph).detach()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(graph=random_graphs(scales=False, max_joint=500))
def test_best_states_are_the_best_of_all(graph: FactorGraph) -> None:
    note(repr(graph))
    assume(graph.variables and enumerate_joint(graph).isfinite())
    scores, states = best_states(graph, plan(graph), 7, Ends(graph, {}))
    wanted = all_scores(graph, 7)
    wanted = wanted[wanted > -torch.inf]
    assert_close(scores, wanted[: len(scores)], **EXACT)
    assert len(scores) == len(wanted)
    assert_close(log_weight(graph, states), scores, **EXACT)
    every = torch.stack([state_of(k, states, graph) for k in keys_of(graph)], -1)
    assert len(every.unique(dim=0)) == len(scores)


def chain(y, mask, p):
    with pyro.plate("animal", y.shape[1]):
        kind = pyro.sample("kind", dist.Bernoulli(0.5)).long()
        z = None
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else p[z]))
            with pyro.poutine.mask(mask=mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(z + kind, 1.0), obs=y[t])


def test_ties_are_all_found_once():
    even = torch.full((2, 2), 0.5, dtype=torch.float64)
    y, mask = torch.full((3, 1), 1.0, dtype=torch.float64), torch.zeros(3, 1).bool()
    mask[2] = True
    density = symhmm.compile(chain, y, mask, even)
    found = viterbi(density, {}, k=100)
    paths = torch.cat([found["z_{time}"].values[..., 0], found["kind"].values], -1)
    assert paths.shape == (16, 4) and len(paths.unique(dim=0)) == 16
    direct = (
        dist.Normal(paths[:, 2] + paths[:, 3].double(), 1.0).log_prob(torch.tensor(1.0)) - 4 * torch.tensor(2.0).log()
    )
    assert_close(found.log_prob, direct.double(), rtol=1e-6, atol=1e-6)


def test_padding_adds_no_paths():
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)
    y = torch.randn(5, 2, generator=generator, dtype=torch.float64)
    mask = torch.arange(5)[:, None] < torch.tensor([5, 3])
    found = viterbi(symhmm.compile(chain, y, mask, p), {}, k=20)
    alone = [viterbi(symhmm.compile(chain, y[:n, [i]], mask[:n, [i]], p), {}, k=20) for i, n in enumerate((5, 3))]
    sums = (alone[0].log_prob[:, None] + alone[1].log_prob).reshape(-1).sort(descending=True).values[:20]
    assert_close(found.log_prob, sums, **EXACT)
    z = found["z_{time}"]
    assert z.dims == ("rank", "time", "animal")
    assert (z.values[:, 3:, 1] == -1).all() and (z.values[:, :3] >= 0).all()
    first = viterbi(symhmm.compile(chain, y, mask, p), {})
    assert torch.equal(first["z_{time}"].values, z.values[0])
    assert_close(first.log_prob, found.log_prob[0], **EXACT)


def test_errors():
    density = symhmm.compile(chain, torch.zeros(2, 1), torch.ones(2, 1).bool(), torch.eye(2))
    with pytest.raises(GraphError, match="k = 0"):
        viterbi(density, {}, k=0)
    found = viterbi(density, {}, k=50)
    assert found["kind"].values.shape == (8, 1)  # no more than there are: four paths, two kinds
    assert repr(found).startswith("the 8 most probable states, log-density -")
