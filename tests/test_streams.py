"""Streams: starts lie inside every family's ranges, however poor the data, and clusters are numbered by the first stream."""

import pytest
import torch
from torch.distributions import biject_to, constraints

from symhmm.errors import DataError, SpecError
from symhmm.models import Mixture, PoissonHMM
from symhmm.models.emissions import FAMILIES
from symhmm.models.streams import Streams, variable
from symhmm.tables.data import SequenceData

RANGES = {"identity": constraints.real, "log": constraints.positive, "logit": constraints.unit_interval}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def values(name, rows):
    u = torch.rand(rows, 20, generator=torch.Generator().manual_seed(0))
    if name in ("bernoulli", "categorical"):
        return (u * (2 if name == "bernoulli" else 3)).floor()
    if name.endswith(("poisson", "negative_binomial")):
        return (u * 9).floor()
    if name in ("vonmises", "wrapped_cauchy", "gaussian"):
        return u * 6 - 3
    if name.startswith(("zero", "hurdle")):
        return torch.where(u < 0.2, 0.0, u)
    return u.clamp(0.01, 0.99)


@pytest.mark.parametrize("poor", ["rich", "constant", "few"])
@pytest.mark.parametrize("name", FAMILIES)
def test_starts_are_inside_and_finite(name, poor):
    y = values(name, 5)
    if poor == "constant":
        y = torch.full_like(y, y[y > 0][0].item())
    if poor == "few":
        y[1:] = torch.nan
        y[0, 2:] = torch.nan
    data = SequenceData.from_tensors({"y": y})
    model = Mixture(3, {"y": name})
    density = model.log_density(data)
    assert density.log_prob(density.initial()).isfinite()
    value, gradient = density.value_and_grad(density.pack(density.initial()))
    assert value.isfinite() and gradient.isfinite().all()
    for p in FAMILIES[name].parameters:
        if p.link in RANGES and f"y.{p.name}" in density.initial():
            x = density.initial()[f"y.{p.name}"]
            assert RANGES[p.link].check(x).all() and biject_to(RANGES[p.link]).inv(x).isfinite().all()


def test_clusters_are_numbered_by_the_first_stream():
    y = torch.tensor([[9.0, 1.0, 5.0, 9.5, 1.5, 5.5, torch.nan]])
    data = SequenceData.from_tensors({"y": y})
    label = Streams.of({"y": "gaussian"}).clustered(data, 3)
    assert label.tolist() == [[2, 0, 1, 2, 0, 1, -1]]


def test_missing_parts_take_the_middle_and_other_streams_decide():
    y = torch.tensor([[0.0, 0.1, 9.0, 9.1, torch.nan, torch.nan]])
    w = torch.tensor([[1.0, 1.1, 5.0, 5.1, 1.05, 5.05]])
    label = Streams.of({"y": "gaussian", "w": "gaussian"}).clustered(SequenceData.from_tensors({"y": y, "w": w}), 2)
    assert label.tolist() == [[0, 0, 1, 1, 0, 1]]


def test_names_for_python_and_refusals():
    assert variable("2nd", "mean") == "_2nd_mean" and variable("a b", "sd") == "a_b_sd"
    with pytest.raises(SpecError, match="no emissions"):
        Streams.of([])
    vectors = SequenceData.from_tensors({"y": torch.zeros(3, 2, 4)}, lengths=torch.tensor([3, 3]))
    with pytest.raises(DataError, match="'y' is of vectors"):
        PoissonHMM(2, "y").log_density(vectors)
