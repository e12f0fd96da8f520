import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.fitting import fit
from symhmm.infer import svi
from symhmm.infer.bound import evaluate_bound
from symhmm.infer.minibatch import Minibatches, minibatches, with_members
from symhmm.infer.objective import objective


def switching(y, size):
    """Two states; each of the N individuals has its own logit of staying; ``size`` of them are taken at a time."""
    mu = pyro.sample("mu", dist.Normal(cf.real(1.0), 2.0))
    tau = pyro.param("tau", cf.real(0.5), constraint=constraints.positive)
    loc = pyro.param("loc", cf.real([-1.0, 1.0]))
    with pyro.plate("individual", y.shape[1], subsample_size=size, dim=-1) as i:
        d = pyro.sample("d", dist.Normal(mu, tau))
        stay = torch.sigmoid(d)
        z = torch.tensor(0)
        for t in pyro.markov(range(len(y))):
            p = torch.where(z == 1, stay, 1 - stay)
            z = pyro.sample(f"z_{t}", dist.Bernoulli(p)).long()
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t][i])


def intercepts(y, size):
    """`closed_forms.random_intercept` by minibatches of its groups."""
    loc = pyro.param("loc", cf.real(0.0))
    tau = pyro.param("tau", cf.real(1.0), constraint=constraints.positive)
    with pyro.plate("group", len(y), subsample_size=size, dim=-1) as i:
        d = pyro.sample("d", dist.Normal(cf.real(0.0), tau))
        with pyro.plate("repeat", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(loc + d, 2.0), obs=y[i].T)


@pytest.fixture(scope="module")
def chains():
    generator = cf.generator(4)
    z = (torch.rand(7, 6, generator=generator) < 0.5).long()
    return 2.0 * z - 1 + torch.randn(7, 6, generator=generator, dtype=cf.REAL)


def built(density):
    goal = svi.target(density, {}, "svi")
    state = svi.assemble(goal, svi.Options(), torch.full_like(goal.start, 0.3), svi.Optima(), 0)
    return goal, state


@pytest.mark.parametrize("draws", [1, 2])
def test_mean_over_a_partition_is_the_full_estimate(chains, draws):
    goal, state = built(compile(switching, chains, 2))
    whole_goal, _ = built(compile(switching, chains, None))
    assert minibatches(whole_goal.density) is None
    batches = minibatches(goal.density)
    assert (batches.plate, batches.full, batches.size) == ("individual", 6, 2)
    phi = 0.3 * torch.randn(state.guide.size, generator=cf.generator(1), dtype=cf.REAL)
    noise = torch.randn(draws, state.guide.noise_size, generator=cf.generator(2), dtype=cf.REAL)
    part = objective(goal, state.guide, draws, weighted=False, batches=batches)
    full = objective(whole_goal, state.guide, draws, weighted=False, batches=None)
    shuffled = cf.generator(3)
    order = torch.randperm(6, generator=shuffled)
    found = [part(phi, noise, order[k : k + 2]) for k in (0, 2, 4)]
    value, gradient = full(phi, noise)
    torch.testing.assert_close(torch.stack([v for v, _ in found]).mean(), value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.stack([g for _, g in found]).mean(0), gradient, rtol=1e-10, atol=1e-10)


def test_only_the_latents_of_members_in_the_batch_move(chains):
    _, state = built(compile(switching, chains, 2))
    options = svi.Options()
    before = state.phi.clone()
    chosen = state.batches.draw(torch.Generator().set_state(_after_noise(state, options)))
    svi.step(state, options)
    moved = (state.phi != before).nonzero()[:, 0]
    block = next(k for k, b in enumerate(state.guide.blocks) if b.plates)
    owners = state.owners
    assert set(owners[owners >= 0].tolist()) == set(range(6))
    assert set(owners[moved].tolist()) == {-1, *chosen.tolist()}
    assert bool((state.phi[owners == -1] != before[owners == -1]).all())
    assert state.guide.blocks[block].members == (6,)


def _after_noise(state, options):
    generator = torch.Generator().set_state(state.generator.get_state())
    svi._noise(options.draws[0], state.guide.noise_size, generator, state.phi.dtype)
    return generator.get_state()


def test_batches_of_a_plate_that_is_no_multiple():
    batches = Minibatches("i", 5, 2)
    every = torch.cat(batches.partition())
    assert set(every.tolist()) == set(range(5))
    drawn = torch.stack([batches.draw(cf.generator(s)) for s in range(300)])
    assert bool((drawn[:, 0] < drawn[:, 1]).all())
    assert torch.bincount(drawn.reshape(-1)).min() > 80


def test_other_members_of_the_compiled_step(chains):
    density = compile(switching, chains, 2)
    values = density.initial()
    whole = compile(switching, chains, None)
    for chosen in (torch.tensor([0, 1]), torch.tensor([5, 2])):
        own = with_members(density, "individual", chosen).per("individual", values)
        torch.testing.assert_close(own, whole.per("individual", values)[chosen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [3, 5])
def test_final_bound_is_that_of_all_members(size):
    y = cf.balanced(12, 4)
    phi = None
    found = []
    for s in (size, None):
        goal, state = built(compile(intercepts, y, s))
        if phi is None:
            phi = 0.2 * torch.randn(state.guide.size, generator=cf.generator(1), dtype=cf.REAL)
        found.append(evaluate_bound(goal, state.guide, phi, 40, 3, state.batches))
    part, full = found
    assert part.bound == pytest.approx(full.bound, abs=1e-9)
    assert part.marginal == pytest.approx(full.marginal, abs=1e-9)


def test_minibatches_reach_the_marginal_maximum():
    y = cf.balanced(12, 8)
    f = fit(intercepts, y, 4, method="svi", steps=2000, cooldown=600, lr=0.03)
    loc, tau = cf.random_intercept_maximum(y)
    assert f.values["loc"].item() == pytest.approx(loc, abs=0.15)
    assert f.values["tau"].item() == pytest.approx(tau, rel=0.1)
    exact = cf.random_intercept_marginal(y, f.values["loc"].item(), f.values["tau"].item())
    assert f.estimate.marginal[0] == pytest.approx(exact, abs=0.1)
    assert f.objective <= exact + 3 * f.estimate.error


def test_weighted_bounds_need_everybody():
    with pytest.raises(FitError, match=r"objective='elbo'"):
        fit(intercepts, cf.balanced(12, 4), 4, method="svi", objective="iwelbo")


def test_two_subsampled_plates_are_refused():
    def model(y):
        rows = pyro.plate("row", 4, subsample_size=2, dim=-2)
        columns = pyro.plate("column", 4, subsample_size=2, dim=-1)
        with rows as i, columns as j:
            d = pyro.sample("d", dist.Normal(cf.real(0.0), 1.0))
            pyro.sample("y", dist.Normal(d, 1.0), obs=y[i][:, j])

    with pytest.raises(FitError, match=r"2 plates at once(.|\n)*row, column|column, row"):
        svi.run(compile(model, torch.zeros(4, 4, dtype=cf.REAL)))


def stop_after(n):
    def listener(progress):
        if progress.done == n:
            raise KeyboardInterrupt

    return listener


def test_an_interrupted_fit_by_minibatches_continues_to_the_same_numbers(tmp_path):
    density = compile(intercepts, cf.balanced(12, 4), 4)
    options = {"seed": 3, "steps": 60, "cooldown": 30, "restarts": 1, "evaluate": 10}
    path = tmp_path / "fit.npz"
    part = svi.run(density, **options, checkpoint=path, progress=stop_after(25))
    assert len(part.trace) == 25
    resumed, whole, again = svi.run(density, **options, checkpoint=path), *(svi.run(density, **options) for _ in "ab")
    for other in (resumed, again):
        assert torch.equal(other.trace, whole.trace)
        assert torch.equal(other.vector, whole.vector)
        assert other.objective == whole.objective
        assert other.marginal == whole.marginal
