"""Capture-recapture: dippers have their published likelihoods, and every history its probability by hand."""

import pandas as pd
import pytest
import torch
from torch.testing import assert_close

from symhmm.errors import DataError, SpecError
from symhmm.models.recapture import CormackJollySeber
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@pytest.mark.parametrize(
    ("survival", "capture", "deviance"),
    [
        ("constant", "constant", 666.8377),
        ("time", "constant", 659.7301),
        ("constant", "time", 664.4802),
        ("time", "time", 656.9502),
    ],
)
def test_dippers_have_their_published_likelihoods(data_file, survival, capture, deviance):
    """Lebreton et al. 1992: 255 and 39 birds marked on seven occasions; -2 log-likelihood of the four models."""
    wide = pd.read_csv(data_file("dipper.csv"))
    long = wide.melt(["id", "sex01"], var_name="year", value_name="seen").assign(
        year=lambda x: x.year.str[1:].astype(int)
    )
    data = SequenceData.from_frame(long, id="id", time="year", streams=["seen"])
    fit = CormackJollySeber(survival, capture).fit(data, restarts=1)
    assert -2 * fit.objective == pytest.approx(deviance, abs=1e-3)
    if (survival, capture) == ("constant", "constant"):
        assert fit.objective == pytest.approx(-333.4188, abs=1e-4)
        assert (fit.values["phi"].item(), fit.values["p"].item()) == pytest.approx((0.5602, 0.9026), abs=1e-4)


def test_histories_by_hand():
    data = SequenceData.from_tensors(
        {"seen": torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).T.double()}
    )
    density = CormackJollySeber("time", "time").log_density(data)
    phi, p = torch.tensor([0.8, 0.6, 0.7]), torch.tensor([0.5, 0.9, 0.3])
    one = phi[0] * (1 - p[0]) * phi[1] * p[1] * (1 - phi[2] * p[2])
    two = 1 - phi[1] + phi[1] * (1 - p[1]) * (1 - phi[2] * p[2])
    three = (phi * p).prod()
    assert_close(density.log_prob({"phi": phi, "p": p}), (one * two * three).log(), rtol=1e-13, atol=0)
    # An occasion without search counts nothing, and an animal that is never seen neither.
    gap = data.seen.clone()
    gap[2, 0] = torch.nan
    found = CormackJollySeber("time", "time").log_density(SequenceData.from_tensors({"seen": gap}))
    q = phi[1] * phi[2] * p[2]
    unseen = 1 - phi[0] + phi[0] * (1 - p[0]) * (1 - q)
    assert_close(found.log_prob({"phi": phi, "p": p}), (unseen * two * three).log(), rtol=1e-13, atol=0)


def test_refused():
    with pytest.raises(SpecError, match="survival='sex'"):
        CormackJollySeber("sex")
    with pytest.raises(DataError, match=r"CormackJollySeber\(stream='y'\)"):
        CormackJollySeber().fit(SequenceData.from_tensors({"y": torch.ones(3, 2)}))
    with pytest.raises(DataError, match="the first is 2"):
        CormackJollySeber().fit(SequenceData.from_tensors({"seen": torch.full((3, 2), 2.0)}))
