"""The density in which chains move: flat priors on the natural scale, each counted once, and restrictions with their volume."""

from concurrent.futures import ThreadPoolExecutor

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

import symhmm
from symhmm.compiler.taped import TapedStep
from symhmm.errors import FitError
from symhmm.infer.moving import Moving, log_density, require_volumes
from symhmm.infer.noncentred import noncentred
from symhmm.infer.target import target, value_and_gradient

Y = torch.tensor([[0.3, -1.2, 2.0], [1.1, 0.4, -0.6]], dtype=torch.float64)


def model(y):
    one = torch.ones((), dtype=y.dtype)
    loc = pyro.sample("loc", dist.Normal(torch.zeros(3, dtype=y.dtype), 2 * one).to_event(1))
    scale = pyro.param("scale", torch.ones(2, dtype=y.dtype), constraints.positive)
    rows = pyro.param("rows", torch.full((2, 3), 1 / 3, dtype=y.dtype), constraints.simplex)
    tau = pyro.param("tau", one, constraints.positive)
    with pyro.plate("n", 2, dim=-1):
        d = pyro.sample("d", dist.Normal(0 * one, tau))
        mean = (rows * loc).sum(-1) + d
        pyro.sample("y", dist.Normal(mean[..., None], scale[:, None]).expand([2, 3]).to_event(1), obs=y)


@pytest.fixture(scope="module")
def density():
    return symhmm.compile(model, Y)


def natural_density(values):
    """Log-density of the values by hand, nats."""
    zero = torch.zeros((), dtype=torch.float64)
    total = dist.Normal(zero, zero + 2).log_prob(values["loc"]).sum()
    total = total + dist.Normal(zero, values["tau"]).log_prob(values["d"]).sum()
    mean = (values["rows"] * values["loc"]).sum(-1) + values["d"]
    return total + dist.Normal(mean[:, None], values["scale"][:, None]).log_prob(Y).sum()


def volume(natural, x):
    """Log volume change of a map to as many numbers, by its Jacobian."""
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(natural, x)).logabsdet


def assert_is(goal, x, values, natural):
    """The density at ``x`` is that of ``values``, times the volume of the numbers that are free to move."""
    at = noncentred(goal, False)
    wanted = natural_density(values) + volume(natural, x)
    value, gradient = Moving(goal, at, native=False)(x.numpy())
    assert value == pytest.approx(float(wanted), rel=1e-10)
    again, slope = value_and_gradient(lambda x: log_density(at, x), x)
    assert torch.allclose(again, wanted, rtol=1e-10)
    assert torch.allclose(torch.from_numpy(gradient), slope, rtol=1e-10)


def parts(goal, x):
    return goal.values(goal.embed(x))


def row(values):
    """The two free numbers of each row of a simplex."""
    return values["rows"][..., :-1]


def test_nothing_restricted(density):
    goal = target(density, {}, "nuts")
    x = torch.randn(goal.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def natural(x):
        v = parts(goal, x)
        return torch.cat([v["rows"][:, :-1].reshape(-1), v["scale"], v["tau"][None], v["loc"], v["d"]])

    assert_is(goal, x, parts(goal, x), natural)


def test_tied_parameters_have_one_flat_prior_together(density):
    goal = target(density, {}, "nuts", tie=[("scale[0]", "tau"), ("rows[0]", "rows[1]")])
    x = torch.randn(goal.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = parts(goal, x)
    assert values["scale"][0] == values["tau"]
    assert torch.equal(values["rows"][0], values["rows"][1])

    def natural(x):
        v = parts(goal, x)
        return torch.cat([v["rows"][0, :-1], v["scale"], v["loc"], v["d"]])

    assert_is(goal, x, values, natural)


def test_ordered_values_have_the_volume_of_their_steps(density):
    goal = target(density, {}, "nuts", order=["loc", "scale"])
    x = torch.randn(goal.size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = parts(goal, x)
    assert bool((values["loc"].diff() > 0).all() and (values["scale"].diff() > 0).all())

    def natural(x):
        v = parts(goal, x)
        return torch.cat([v["rows"][:, :-1].reshape(-1), v["scale"], v["tau"][None], v["loc"], v["d"]])

    assert_is(goal, x, values, natural)


def test_fixed_values_are_no_coordinates(density):
    goal = target(density, {"tau": 0.5, "loc": torch.zeros(3, dtype=torch.float64)}, "nuts", order="scale")
    x = torch.randn(goal.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def natural(x):
        v = parts(goal, x)
        return torch.cat([v["rows"][:, :-1].reshape(-1), v["scale"], v["d"]])

    assert_is(goal, x, parts(goal, x), natural)


def test_one_capture_serves_all_data_of_a_shape(density):
    """The gradient of other data, from the same captured step."""
    other = symhmm.compile(model, Y + 1.0)
    goals = [target(d, {}, "nuts") for d in (density, other)]
    ways = [Moving(g, noncentred(g), native=False) for g in goals]
    x = 0.1 * torch.arange(goals[0].size, dtype=torch.float64)
    kept = len(density.compiled.kept)
    for goal, way in zip(goals, ways, strict=True):
        value, gradient = value_and_gradient(lambda x, g=goal: log_density(noncentred(g), x), x)
        found, slope = way(x.numpy())
        assert found == pytest.approx(float(value), rel=1e-10)
        assert torch.allclose(torch.from_numpy(slope), gradient, rtol=1e-10)
        assert way.calls == 1
    assert density.compiled is other.compiled
    assert len(density.compiled.kept) == kept


def test_a_support_without_a_volume_is_named():
    def correlated(y):
        root = pyro.param("root", torch.eye(2, dtype=y.dtype), constraints.lower_cholesky)
        with pyro.plate("n", 3):
            pyro.sample("y", dist.MultivariateNormal(torch.zeros(2, dtype=y.dtype), scale_tril=root), obs=y)

    goal = target(symhmm.compile(correlated, Y.T), {}, "nuts")
    with pytest.raises(FitError, match=r"'root' cannot be sampled: its support .* has no volume element"):
        require_volumes(goal)


def switching(y):
    """A program with steps."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0], dtype=y.dtype), 1.0).to_event(1))
    rows = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=y.dtype)
    with pyro.plate("n", y.shape[1], dim=-1):
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=y[t])


def test_other_data_of_a_shape_are_read_by_one_capture():
    """Terms are sums of functions of the data that are made once for each data set."""
    y = torch.linspace(-2.0, 3.0, 4000, dtype=torch.float64).reshape(400, 10)
    x = torch.tensor([-0.5, 0.7], dtype=torch.float64)
    for data in (y, y.flip(0) + 1.0, y.square()):
        goal = target(symhmm.compile(switching, data), {}, "nuts")
        moving = Moving(goal, noncentred(goal, False), native=False)
        value, gradient = moving(x.numpy())
        wanted, slope = goal.density.value_and_grad(x)
        assert value == pytest.approx(wanted.item(), rel=1e-12)
        assert torch.allclose(torch.from_numpy(gradient), slope, rtol=1e-10)
    assert len([k for k in goal.density.compiled.kept if k[0] == "nuts"]) == 1


def drifting(y):
    """Steps whose means have an effect of each chain."""
    loc = pyro.sample("loc", dist.Normal(torch.tensor([-1.0, 1.0], dtype=y.dtype), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(torch.zeros((), dtype=y.dtype), 0.5))
    rows = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=y.dtype)
    with pyro.plate("n", y.shape[1], dim=-1):
        d = pyro.sample("d", dist.Normal(loc[0], tau))
        z = 0
        for t in pyro.markov(range(len(y))):
            z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
            pyro.sample(f"y_{t}", dist.Normal(loc[z] + d, 1.0), obs=y[t])


def test_chains_of_several_threads_play_one_tape_and_move_to_other_coordinates():
    goal = target(
        symhmm.compile(drifting, torch.linspace(-2.0, 3.0, 120, dtype=torch.float64).reshape(30, 4)), {}, "nuts"
    )
    plain, n = noncentred(goal, True), goal.start.numel()
    precision, peak = torch.linspace(0.5, 2.0, n), torch.linspace(-0.3, 0.4, n)
    informed = plain.informed(precision.double(), peak.double())
    points = torch.randn(8, goal.size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    moving = Moving(goal, plain, native=False)
    slopes = []
    for at in (plain, informed, plain):
        moving.move(at)
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(moving, [x.numpy() for x in points.repeat(25, 1)]))
        for x, (value, gradient) in zip(points.repeat(25, 1), found, strict=True):
            wanted, slope = value_and_gradient(lambda x, at=at: log_density(at, x), x)
            assert value == pytest.approx(float(wanted), rel=1e-10)
            assert torch.allclose(torch.from_numpy(gradient), slope, rtol=1e-10, atol=1e-10)
        slopes.append(found[0][1])
    assert abs(slopes[0] - slopes[1]).max() > 0.01
    ((step, _),) = [v for k, v in goal.density.compiled.kept.items() if k[0] == "nuts"]
    assert isinstance(step, TapedStep)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, where its compiler is imported
def test_a_compiler_takes_the_step_whole(monkeypatch):
    """What inductor is given has no part that only Python can run."""
    own = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: own(f, backend="eager", **options))
    y = torch.linspace(-2.0, 3.0, 4000, dtype=torch.float64).reshape(400, 10)
    goal = target(symhmm.compile(switching, y), {}, "nuts")
    x = torch.tensor([-0.5, 0.7], dtype=torch.float64)
    value, gradient = Moving(goal, noncentred(goal, False), native=True)(x.numpy())
    ((step, _),) = [v for k, v in goal.density.compiled.kept.items() if k[0] == "nuts" and k[-1]]
    assert not isinstance(step, TapedStep)
    wanted, slope = goal.density.value_and_grad(x)
    assert value == pytest.approx(wanted.item(), rel=1e-12)
    assert torch.allclose(torch.from_numpy(gradient), slope, rtol=1e-10)
