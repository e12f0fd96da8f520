"""Tied and ordered values: against the program written with one value in the first place, in values, errors and counts."""

import closed_forms as cf
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs_em import lumps, plain_hmm, touching
from torch.distributions import constraints

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.fitting import fit
from symhmm.infer import em, mle
from symhmm.infer.pooled import Search, starts
from symhmm.infer.restrict import Restriction
from symhmm.infer.starts import units
from symhmm.infer.target import target
from symhmm.infer.warm import warm_start

DRIVERS = pytest.mark.parametrize("method", ["mle", "em"])


def with_one_scale(y):
    weights = pyro.param("weights", lambda: cf.real([0.5, 0.5]), constraint=constraints.simplex)
    loc = pyro.param("loc", lambda: cf.real([-1.0, 1.0]))
    scale = pyro.param("scale", lambda: cf.real(1.0), constraint=constraints.positive)
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(weights))
        pyro.sample("y", dist.Normal(loc[z], scale), obs=y)


@DRIVERS
def test_tied_scales_are_one_scale(method):
    y = touching()
    tied = fit(lumps, y, method=method, tie=[("scale[0]", "scale[1]")], tolerance=1e-9)
    one = fit(with_one_scale, y, method=method, tolerance=1e-9)
    assert tied.values["scale"][0].item() == tied.values["scale"][1].item()
    assert tied.objective == pytest.approx(one.objective, abs=1e-6)
    assert tied.estimate.counts == {"weights": 1, "loc": 2, "scale": 1}
    assert tied.aic == pytest.approx(one.aic, abs=1e-5)
    error, wanted = tied.standard_errors["scale"], one.standard_errors["scale"]
    torch.testing.assert_close(error, wanted.expand(2), rtol=1e-3, atol=0)
    torch.testing.assert_close(tied.standard_errors["weights"], one.standard_errors["weights"], rtol=1e-3, atol=0)


def test_whole_names_and_rows_of_a_simplex_may_be_tied():
    def model(y):
        rows = pyro.param("rows", lambda: cf.real([[0.2, 0.8], [0.5, 0.5]]), constraint=constraints.simplex)
        other = pyro.param("other", lambda: cf.real([0.6, 0.4]), constraint=constraints.simplex)
        for k in range(2):
            pyro.sample(f"y_{k}", dist.Categorical(rows[k]).expand([8]).to_event(1), obs=y[8 * k : 8 * k + 8])
        pyro.sample("z", dist.Categorical(other).expand([4]).to_event(1), obs=y[16:])

    y = torch.tensor([0] * 5 + [1] * 3 + [0] * 2 + [1] * 6 + [1] * 4)
    estimate = mle.run(compile(model, y), tie=[("rows[0]", "rows[1]", "other")])
    wanted = cf.real([7 / 20, 13 / 20])
    for value in (*estimate.values["rows"], estimate.values["other"]):
        torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-4)
    assert estimate.n_parameters == 1


@DRIVERS
def test_ordered_locations_increase_whatever_the_start(method):
    y = touching()
    start = {"loc": cf.real([2.0, -2.0])}
    free = fit(lumps, y, method=method, start=start, restarts=1)
    ordered = fit(lumps, y, method=method, start=start, restarts=1, order="loc")
    assert free.values["loc"][0] > free.values["loc"][1]
    assert ordered.values["loc"][0] < ordered.values["loc"][1]
    assert ordered.objective == pytest.approx(free.objective, abs=1e-4)
    # The same number of values, and the same errors as without the order, since its edge is far.
    assert ordered.estimate.counts == free.estimate.counts
    errors = free.standard_errors["loc"].flip(0)
    torch.testing.assert_close(ordered.standard_errors["loc"], errors, rtol=1e-2, atol=0)


def test_ordered_values_start_as_far_apart_as_the_data():
    """Whatever lies between them where the program starts: all of its states start at zero, the data at 500."""
    y = 500.0 + 100.0 * torch.randn(20, 50, generator=cf.generator(0), dtype=cf.REAL)
    density = compile(plain_hmm, y)
    for seed in range(3):
        goal = target(density, {}, "mle", order="loc")
        found = starts(goal, Search(seed=seed))
        for u in found.points:
            loc = goal.values(goal.embed(torch.from_numpy(u)))["loc"]
            assert bool((loc.diff() > 0).all())
            assert 20.0 < loc[-1] - loc[0] < 600.0
            assert 300.0 < loc.mean() < 700.0
        assert found.scale.shape == (goal.size,)


def test_tied_values_start_tied_and_warm_starts_keep_to_restrictions():
    goal = target(compile(lumps, touching()), {}, "mle", tie=[("scale[0]", "scale[1]")])
    for u in starts(goal, Search()).points:
        scale = goal.values(goal.embed(torch.from_numpy(u)))["scale"]
        assert scale[0] == scale[1]
    goal = target(compile(lumps, touching()), {}, "nuts", order="loc")
    warm, ascents, _ = warm_start(goal, seed=0, restarts=3)
    assert len(ascents) == 3
    assert bool((goal.density.unpack(warm.start)["loc"].diff() > 0).all())


def test_the_length_of_a_logarithm_is_at_most_one():
    goal = target(compile(lumps, touching()), {}, "mle", order="loc")
    found = units(goal, np.full(goal.size, 5.0))
    name = [next(e.name for e in goal.entries if e.start <= i < e.stop) for i in goal.moved.tolist()]
    assert found[[i for i, n in enumerate(name) if n == "loc"]].tolist() == [5.0, 1.0]
    assert found[[i for i, n in enumerate(name) if n != "loc"]].max() == 1.0


def test_an_order_that_the_data_contradict_ends_at_its_edge():
    def model(y):
        loc = pyro.param("loc", lambda: cf.real([0.0, 1.0]))
        pyro.sample("a", dist.Normal(loc[0], 1.0).expand([3]).to_event(1), obs=y[:3])
        pyro.sample("b", dist.Normal(loc[1], 1.0).expand([3]).to_event(1), obs=y[3:])

    y = cf.real([2.0, 2.5, 3.0, 0.0, 0.5, 1.0])
    estimate = mle.run(compile(model, y), order=["loc"], restarts=1)
    # Both at the common mean, as near as the rise of the likelihood can be seen.
    torch.testing.assert_close(estimate.values["loc"], y.mean().expand(2), rtol=0, atol=0.01)


def test_order_along_another_axis_and_of_positive_values():
    def model(y):
        rate = pyro.param("rate", lambda: torch.full((2, 3), 2.0, dtype=cf.REAL), constraint=constraints.positive)
        with pyro.plate("n", y.shape[0], dim=-1):
            pyro.sample("y", dist.Poisson(rate).to_event(2), obs=y)

    y = torch.tensor([[[4.0, 2.0, 7.0], [5.0, 1.0, 9.0]], [[3.0, 2.0, 6.0], [6.0, 4.0, 8.0]]], dtype=cf.REAL)
    estimate = mle.run(compile(model, y), order={"rate": 0}, restarts=1)
    assert bool((estimate.values["rate"][0] < estimate.values["rate"][1]).all())
    torch.testing.assert_close(estimate.values["rate"], y.mean(0), rtol=1e-2, atol=0)


def test_fixed_tied_and_ordered_together():
    y, held = touching(), cf.real([0.3, 0.7])
    estimate = em.run(compile(lumps, y), fix={"weights": held}, tie=[("scale[0]", "scale[1]")], order="loc")
    assert torch.equal(estimate.values["weights"], held)
    assert estimate.values["scale"][0] == estimate.values["scale"][1]
    assert estimate.values["loc"][0] < estimate.values["loc"][1]
    assert estimate.counts == {"loc": 2, "scale": 1}


def test_coordinates_and_back():
    goal = target(compile(lumps, touching()), {}, "mle", tie=[("scale[0]", "scale[1]")], order="loc")
    assert goal.size == 4
    u = torch.randn(4, generator=cf.generator(0), dtype=cf.REAL)
    torch.testing.assert_close(goal.coordinates(goal.embed(u)), u)
    # The gradient over the coordinates is that of the composed function.
    _, gradient = goal.evaluate(u.numpy())
    for i in range(4):
        step = 1e-6 * (torch.arange(4) == i)
        rise = goal.evaluate((u + step).numpy())[0] - goal.evaluate((u - step).numpy())[0]
        assert rise / 2e-6 == pytest.approx(gradient[i], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tie": [("loc[0]", "lock[1]")]}, "names 'lock', which is not fitted(.|\n)*fitted: weights, loc, scale"),
        ({"tie": [("loc[0]", "loc[2]")]}, r"'loc\[2\]', which has no such part(.|\n)*shape \(2,\)"),
        ({"tie": [("loc[0]", "scale[0]")]}, r"cannot make 'loc\[0\]' and 'scale\[0\]' equal(.|\n)*one support"),
        ({"tie": [("loc", "weights")]}, "cannot make 'loc' and 'weights' equal"),
        ({"tie": [("weights[0]", "weights[1]")]}, "no such part(.|\n)*whole rows of a simplex"),
        ({"tie": ["loc"]}, "group of one"),
        ({"order": "weights"}, "cannot order 'weights'"),
        ({"order": {"loc": 3}}, "along axis 3"),
        ({"order": "z"}, "order= names 'z'"),
        ({"order": "loc", "tie": [("loc[0]", "loc[1]")]}, "both tied and ordered"),
        ({"order": "loc", "fix": {"loc": torch.zeros(2).double()}}, "order= names 'loc', which is not fitted"),
    ],
)
def test_what_cannot_be_restricted_is_refused_before_any_work(options, text):
    with pytest.raises(FitError, match=text):
        fit(lumps, touching(), method="mle", **options)


def test_delta_method_of_what_is_tied():
    tied = fit(lumps, touching(), method="mle", tie=[("scale[0]", "scale[1]")], tolerance=1e-9)
    twice = tied.delta(lambda v: v["scale"].sum())
    assert twice.item() == pytest.approx(2 * tied.standard_errors["scale"][0].item(), rel=1e-6)


def test_a_restriction_among_some_of_the_coordinates():
    # Coordinates 0 and 3 are equal, 1 and 2 increase.
    whole = Restriction(torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 2]), (torch.tensor([1, 2]),))
    assert whole.limited.tolist() == [0, 1, 2, 3]
    part = whole.among(torch.tensor([1, 2, 3]))
    u = part.inverse(torch.tensor([1.0, 3.0, 7.0]))
    assert u.numel() == 3
    assert part(u).tolist() == pytest.approx([1.0, 3.0, 7.0])
    assert (part(u + torch.tensor([0.0, 0.0, 9.0])).diff() > 0).tolist()[0]
    assert whole.among(torch.tensor([0, 2])) is None
    tied = whole.among(torch.tensor([0, 3]))
    assert tied(torch.tensor([5.0])).tolist() == [5.0, 5.0]
    assert tied.limited.tolist() == [0, 1]


def test_whether_vectors_keep_to_a_restriction():
    """Coordinates 0 and 2 are tied, and those read at 1 and 3 increase."""
    limits = Restriction(torch.tensor([0, 1, 0, 2]), torch.tensor([0, 1, 3]), (torch.tensor([1, 2]),))
    x = torch.stack(
        [limits(u) for u in torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]
    )
    assert limits.holds(x)
    assert not limits.holds(x + torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert not limits.holds(x[:, [0, 3, 2, 1]])


def test_volume_of_ordered_coordinates_is_that_of_the_jacobian():
    limits = Restriction(torch.arange(4), torch.arange(4), (torch.tensor([0, 2, 3]),))
    u = torch.tensor([0.3, -1.0, 0.7, -0.4], dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(limits, u)
    torch.testing.assert_close(limits.log_abs_det_jacobian(u), torch.linalg.slogdet(jacobian).logabsdet)
