"""Mixtures and latent classes: closed sums, the published likelihood, and components found again."""

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from symhmm.errors import SpecError
from symhmm.models.mixture import LatentClass, Mixture
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def test_latent_classes_of_the_balance_scale_task(data_file):
    """Jansen and van der Maas 2002, two classes from four items."""
    table = pd.read_csv(data_file("balance.csv")).assign(child=lambda x: range(len(x)))
    items = ["d1", "d2", "d3", "d4"]
    data = SequenceData.from_frame(table, id="child", streams=items)
    fit = LatentClass(2, items).fit(data, restarts=2)
    assert fit.objective == pytest.approx(-1083.0363, abs=1e-4)
    assert fit.estimate.n_parameters == 9 and fit.status.ok


@pytest.mark.parametrize("rows", [1, 4])
def test_the_component_is_summed_for_all_rows_of_an_individual(rows):
    g = torch.Generator().manual_seed(1)
    y = torch.randn(rows, 6, generator=g)
    y[0, 0] = torch.nan
    c = torch.randint(3, (rows, 6), generator=g).double()
    data = SequenceData.from_tensors({"y": y, "c": c})
    density = Mixture(2, {"y": "gaussian", "c": "categorical"}).log_density(data)
    values = density.initial() | {"weights": torch.tensor([0.3, 0.7])}
    by_row = torch.distributions.Normal(values["y.mean"], values["y.sd"]).log_prob(data.y[..., None])
    by_row = by_row * data.observed["y"][..., None] + values["c.prob"].log()[:, c.long()].movedim(0, -1)
    wanted = (by_row.sum(0) + values["weights"].log()).logsumexp(-1).sum()
    assert_close(density.log_prob(values), wanted, rtol=1e-12, atol=0)


def test_three_components_of_angles_and_lengths_are_found_again():
    g = torch.Generator().manual_seed(0)
    z = torch.randint(3, (600,), generator=g)
    length = torch.tensor([1.0, 4.0, 12.0])[z] * (0.7 + 0.6 * torch.rand(600, generator=g))
    data = SequenceData.from_tensors({"length": length[None]})
    fit = Mixture(3, {"length": "gamma"}).fit(data, restarts=1)
    assert_close(fit.values["length.mean"], torch.tensor([1.0, 4.0, 12.0]), rtol=0.05, atol=0)
    assert (fit.viterbi()["component"].values == z).all()


def test_refused():
    with pytest.raises(SpecError, match="classes=0"):
        LatentClass(0, ["a"])
    with pytest.raises(SpecError, match="no emission family 'normul'"):
        Mixture(2, {"y": "normul"})
