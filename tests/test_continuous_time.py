"""Continuous time: transition matrices are those of scipy, and regular times make an ordinary chain."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch.autograd import gradcheck
from torch.testing import assert_close

from symhmm.distributions import generator_matrix, stationary_of_generator, transition_after
from symhmm.errors import DataError
from symhmm.models.continuous_time import ContinuousTimeHMM
from symhmm.models.hmm import PoissonHMM
from symhmm.tables.data import Labels, SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def test_transitions_are_those_of_scipy():
    rates = torch.tensor([[0.5, 2.0], [1e-3, 4.0], [0.7, 30.0]], requires_grad=True)
    elapsed = torch.tensor([[0.0, 0.1], [3.0, 1e3]])
    p = transition_after(generator_matrix(rates), elapsed)
    for i, dt in enumerate(elapsed.flatten()):
        wanted = expm(generator_matrix(rates).detach().numpy() * dt.item())
        assert_close(p.flatten(0, 1)[i], torch.tensor(wanted), rtol=1e-10, atol=1e-12)
    assert_close(p[1, 1], stationary_of_generator(generator_matrix(rates)).expand(3, 3), rtol=1e-10, atol=1e-12)
    assert (p >= 0).all()
    assert gradcheck(lambda r: transition_after(generator_matrix(r), elapsed[:, 1].clamp(max=2.0)), rates)
    assert gradcheck(lambda r: stationary_of_generator(generator_matrix(r)), rates)


def test_regular_times_make_an_ordinary_chain():
    y = torch.poisson(torch.full((12, 3), 4.0))
    lengths = torch.tensor([12, 9, 5])
    time = torch.arange(12.0)[:, None].expand(12, 3) * 0.5
    data = SequenceData.from_tensors({"y": y}, lengths=lengths, covariates={"t": time})
    rates = torch.tensor([[0.3], [0.8]])
    plain = PoissonHMM(2, "y").log_density(data)
    transition = torch.tensor(expm(generator_matrix(rates).numpy() * 0.5))
    rate = torch.tensor([2.0, 6.0])
    density = ContinuousTimeHMM(2, {"y": "poisson"}, time="t").log_density(data)
    assert {note.tier for note in density.graph.loops.values()} == {"vector"}
    assert density.compiled.mode == "captured"
    found = density.log_prob({"y.rate": rate, "rates": rates})
    assert_close(found, plain.log_prob({"y.rate": rate, "transition": transition}), rtol=1e-12, atol=0)


@pytest.mark.parametrize("initial", ["stationary", "uniform", "free", (0.1, 0.9)])
def test_irregular_times_by_hand_and_gradients(initial):
    g = torch.Generator().manual_seed(0)
    y = torch.randn(7, 2, generator=g)
    y[3, 0] = torch.nan
    time = torch.rand(7, 2, generator=g).cumsum(0)
    data = SequenceData.from_tensors({"y": y}, covariates={"t": time})
    density = ContinuousTimeHMM(2, {"y": "gaussian"}, time="t", initial=initial).log_density(data)
    vector = density.pack(density.initial()) + 0.1

    def by_hand(vector):
        v = density.unpack(vector)
        generator, total = generator_matrix(v["rates"]), 0.0
        first = {
            "stationary": stationary_of_generator(generator),
            "uniform": torch.ones(2) / 2,
            "free": v.get("initial"),
        }
        for n in range(2):
            alpha = first.get(initial, torch.tensor([0.1, 0.9]))
            for t in range(7):
                if t:
                    alpha = alpha @ torch.linalg.matrix_exp(generator * (time[t, n] - time[t - 1, n]))
                if data.observed["y"][t, n]:
                    alpha = alpha * torch.distributions.Normal(v["y.mean"], v["y.sd"]).log_prob(y[t, n]).exp()
            total = total + alpha.sum().log()
        return total

    value, gradient = density.value_and_grad(vector)
    x = vector.clone().requires_grad_()
    wanted = by_hand(x)
    assert_close(value, wanted, rtol=1e-12, atol=0)
    assert_close(gradient, torch.autograd.grad(wanted, x)[0], rtol=1e-9, atol=1e-10)


def test_rates_are_found_again():
    g = torch.Generator().manual_seed(1)
    rates, n = torch.tensor([[0.2], [0.5]]), 8
    time = (torch.rand(250, n, generator=g) * 2).cumsum(0)
    p = transition_after(generator_matrix(rates), time.diff(dim=0))
    z = [torch.zeros(n, dtype=torch.long)]
    for step in p:
        z.append(torch.multinomial(step[torch.arange(n), z[-1]], 1, generator=g).squeeze(-1))
    y = torch.tensor([-2.0, 2.0])[torch.stack(z)] + torch.randn(250, n, generator=g)
    data = SequenceData.from_tensors({"y": y}, covariates={"t": time})
    fit = ContinuousTimeHMM(2, {"y": "gaussian"}, time="t").fit(data, restarts=1)
    assert_close(fit.values["rates"], rates, rtol=0.25, atol=0)


def test_times_of_the_table_dates_and_what_is_refused():
    y = torch.randn(3, 1)
    days = np.array([["2024-01-01"], ["2024-01-02"], ["2024-01-04T12"]], dtype="datetime64[s]")
    data = SequenceData.from_tensors({"y": y}, labels=Labels([0], time="when", times=days))
    model = ContinuousTimeHMM(2, {"y": "gaussian"})
    assert model.elapsed(data).flatten().tolist() == pytest.approx([0, 1, 2.5])
    back = SequenceData.from_tensors({"y": y}, covariates={"t": torch.tensor([[0.0], [2.0], [1.0]])})
    with pytest.raises(DataError, match=r"'t' go back.*\n.*step 2 of individual 0"):
        ContinuousTimeHMM(2, {"y": "gaussian"}, time="t").log_density(back)
    with pytest.raises(DataError, match="no times"):
        model.log_density(SequenceData.from_tensors({"y": y}))
    assert math.isfinite(model.log_density(data).log_prob(model.start(data)).item())
