from dataclasses import replace

import closed_forms as cf
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import MultivariateNormal

from symhmm.compiler.density import compile
from symhmm.errors import FitError
from symhmm.infer.guide import FAMILIES, blocks_by_role, guide
from symhmm.infer.points import points

NONE = torch.zeros(0).long()


def crossed(y):
    """Latents of two plates, of their crossing, with events, and outside of all plates."""
    b = pyro.sample("b", dist.Normal(torch.zeros(2, dtype=cf.REAL), 1.0).to_event(1))
    rows, columns = pyro.plate("row", 3, dim=-2), pyro.plate("column", 4, dim=-1)
    with rows:
        r = pyro.sample("r", dist.Normal(torch.zeros(2, dtype=cf.REAL), 1.0).to_event(1))
        s = pyro.sample("s", dist.LogNormal(cf.real(0.0), 1.0))
    with columns:
        c = pyro.sample("c", dist.Normal(cf.real(0.0), 1.0))
    with rows, columns:
        i = pyro.sample("i", dist.Normal(cf.real(0.0), 1.0))
        pyro.sample("y", dist.Normal(b.sum() + r.sum(-1) + s + c + i, 1.0), obs=y)


@pytest.fixture
def density():
    return compile(crossed, torch.zeros(3, 4, dtype=cf.REAL))


def test_one_block_per_set_of_plates(density):
    blocks = {b.plates: b for b in blocks_by_role(density.layout.entries, density.graph, "full")}
    sizes = {plates: tuple(b.index.shape) for plates, b in blocks.items()}
    assert sizes == {(): (1, 2), ("row",): (3, 3), ("column",): (4, 1), ("column", "row"): (12, 1)}
    together = torch.cat([b.index.reshape(-1) for b in blocks.values()])
    assert together.sort().values.tolist() == list(range(density.size))


def test_rows_of_a_block_are_the_members(density):
    values = density.initial()
    values["r"] = torch.arange(6, dtype=cf.REAL).reshape(values["r"].shape)
    values["s"] = torch.arange(1, 4, dtype=cf.REAL).reshape(values["s"].shape)
    block = next(b for b in blocks_by_role(density.layout.entries, density.graph, "full") if b.plates == ("row",))
    members = density.pack(values)[block.index]
    torch.testing.assert_close(members[:, 2].exp(), cf.real([1.0, 2.0, 3.0]))
    torch.testing.assert_close(members[:, :2], torch.arange(6, dtype=cf.REAL).reshape(3, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_draw_and_log_density_are_those_of_the_normal(density, family):
    blocks = tuple(replace(b, bent=False) for b in blocks_by_role(density.layout.entries, density.graph, family))
    origin, unit = torch.zeros(density.size, dtype=cf.REAL), torch.full((density.size,), 0.3).double()
    g = guide(origin, points(origin, NONE, unit), blocks, unit)
    phi = 0.5 * torch.randn(g.size, generator=cf.generator(1), dtype=cf.REAL)
    noise = torch.randn(4000, g.noise_size, generator=cf.generator(2), dtype=cf.REAL)
    vectors = torch.func.vmap(g.draw, in_dims=(None, 0))(phi, noise)
    posterior = g.posterior(phi)
    for b, normal, own in zip(g.blocks, posterior.blocks, g.log_densities(phi, vectors[0]), strict=True):
        exact = MultivariateNormal(normal.loc, scale_tril=normal.scale_tril)
        torch.testing.assert_close(own, exact.log_prob(vectors[0][b.index]))
        # Drawn as it is evaluated: whitened draws have mean zero and covariance one.
        away = vectors[:, b.index] - normal.loc
        white = torch.linalg.solve_triangular(normal.scale_tril, away[..., None], upper=False)[..., 0]
        assert white.mean(0).abs().max() < 0.08
        covariance = torch.einsum("smi,smj->mij", white, white) / len(white)
        assert (covariance - torch.eye(b.index.shape[1])).abs().max() < 0.12
    torch.testing.assert_close(posterior.vector, g.mean(phi))


def test_a_family_for_each_plate(density):
    chosen = {"row": "low_rank", "column": "meanfield", "": "full"}
    blocks = {b.plates: b.family for b in blocks_by_role(density.layout.entries, density.graph, chosen)}
    assert blocks == {
        (): "full",
        ("row",): "low_rank",
        ("column",): "meanfield",
        ("column", "row"): "meanfield",
    }


def test_start_has_the_given_mean_and_standard_deviation(density):
    unit = torch.linspace(0.1, 1.0, density.size, dtype=cf.REAL)
    origin = torch.randn(density.size, dtype=cf.REAL)
    g = guide(origin, points(origin, NONE, unit), blocks_by_role(density.layout.entries, density.graph, "full"), unit)
    posterior = g.posterior(g.initial())
    torch.testing.assert_close(posterior.vector, origin)
    torch.testing.assert_close(posterior.sd, unit)


def test_points_and_resting_positions_keep_their_places():
    density = compile(cf.random_intercept, cf.balanced(3, 2))
    entries = [e for e in density.layout.entries if e.name != "tau"]
    origin = density.pack(density.initial()) + torch.arange(density.size)
    place = density.layout["loc"].start
    one = torch.ones_like(origin)
    moved = points(origin, torch.tensor([place]), one)
    g = guide(origin, moved, blocks_by_role(entries, density.graph, "full"), one)
    phi = g.initial()
    phi[0] = 7.0
    vector = g.draw(phi, torch.zeros(g.noise_size, dtype=cf.REAL))
    changed = origin.clone()
    changed[place] += 7.0
    torch.testing.assert_close(vector, changed)


def test_gradient_has_no_noise_where_the_guide_is_the_posterior():
    y = cf.balanced(4, 6)
    density = compile(cf.random_intercept, y)
    mean, sd = cf.random_intercept_posterior(y, 5.0, 1.3)
    origin = density.pack({"loc": cf.real(5.0), "tau": cf.real(1.3), "d": mean})
    blocks = blocks_by_role(density.layout.entries, density.graph, "full")
    unit = torch.full_like(origin, sd)
    g = guide(origin, points(origin, NONE, unit), blocks, unit)
    phi = g.initial().requires_grad_()
    vector = g.draw(phi, torch.randn(g.noise_size, dtype=cf.REAL))
    value = density.log_prob(density.unpack(vector)) - g.log_densities(phi.detach(), vector)[0].sum()
    (gradient,) = torch.autograd.grad(value, phi)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)
    assert value.item() == pytest.approx(cf.random_intercept_marginal(y, 5.0, 1.3), abs=1e-10)


def test_unknown_family():
    density = compile(cf.random_intercept, cf.balanced(3, 2))
    with pytest.raises(FitError, match="no guide 'flow'"):
        blocks_by_role(density.layout.entries, density.graph, "flow")
