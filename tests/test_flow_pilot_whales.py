"""Pilot whales: the same log-likelihood as another program at its parameters, per whale and by component, and its maxima."""

import importlib.util
import json
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import symhmm
from symhmm.posterior.marginals import smooth

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "pilot_whales.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("pilot_whales", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["pilot_whales"] = module
    spec.loader.exec_module(module)
    return module


def parameters(reference, example):
    """The reference's parameters under the names of our program."""
    components = len(reference["pi"])
    stream = {name: torch.tensor(rows, dtype=torch.float64) for name, rows in reference["obs"].items()}
    values = {
        "dive.dur shape": stream["dive.dur"][0],
        "dive.dur scale": stream["dive.dur"][1],
        "dive.pitchvar2 alpha": stream["dive.pitchvar2"][0],
        "dive.pitchvar2 beta": stream["dive.pitchvar2"][1],
        "breath.headchange kappa": stream["breath.headchange"][1],
        "GR.size rate": stream["GR.size"][0],
        "weights": torch.tensor(reference["pi"], dtype=torch.float64),
        "transition": torch.tensor(reference["beta"], dtype=torch.float64).reshape(components, 4, 3),
    }
    values |= {f"{s} {p}": stream[s][i] for s in ("dive.depth", "GR.speed2") for i, p in enumerate(("mean", "sd"))}
    return values | {f"{s} prob": stream[s][0] for s in example.BINARY}


@pytest.fixture
def case(data_file, example):
    torch.set_default_dtype(torch.float64)
    data = example.load(str(data_file("pilot_whales.csv")))
    reference = json.loads(data_file("pilot_whales_reference.json").read_text())

    def build(components, program=example.model):
        density = symhmm.compile(program, data, 4, components, example.starts(data, 4))
        mine = reference[f"fitmix{components}"]
        return density, mine, parameters(mine, example)

    return build


@pytest.mark.parametrize("components", [1, 2, 3])
def test_equal_at_the_reference_parameters(case, components):
    density, reference, values = case(components)
    assert density.compiled.mode == "captured"
    assert {note.tier for note in density.graph.loops.values()} == {"vector"}
    assert density.size == reference["npar"]
    assert density.log_prob(values).item() == pytest.approx(reference["loglik"], abs=1e-6)
    whales = torch.tensor(list(reference["per_id_loglik"].values()))
    torch.testing.assert_close(density.per("whale", values), whales, rtol=0, atol=1e-6)
    # The reference prints six digits.
    posterior = smooth(density, values, ["component"]).only.values
    torch.testing.assert_close(
        posterior, torch.tensor(list(reference["component_posterior"].values())), rtol=0, atol=1e-6
    )
    # It is a maximum: no gradient is left, to the precision of its printed parameters.
    _, gradient = density.value_and_grad(density.pack(values))
    assert gradient.abs().max() < 0.05


def test_components_of_a_fit_are_those_of_the_reference(case, data_file, example):
    """Asked of a fit, held at the reference but for the weights: the maximum, and who belongs to which component."""
    _, reference, values = case(2)
    data = example.load(str(data_file("pilot_whales.csv")))
    held = {n: x for n, x in values.items() if n != "weights"}
    fit = symhmm.fit(example.model, data, 4, 2, example.starts(data, 4), restarts=1, fix=held)
    assert fit.status.ok and fit.objective == pytest.approx(reference["loglik"], abs=1e-6)
    torch.testing.assert_close(fit.values["weights"], values["weights"], rtol=0, atol=1e-3)
    found = fit.smooth(["component"]).relabelled({"whale": data.ids})["component"]
    assert set(found.labels["whale"]) == set(reference["component_posterior"])
    for whale, wanted in reference["component_posterior"].items():
        torch.testing.assert_close(found.sel(whale=whale).values, torch.tensor(wanted), rtol=0, atol=1e-5)


def test_torch_von_mises_is_good_to_a_ten_thousandth(case, example, monkeypatch):
    monkeypatch.setattr(example, "VonMises", dist.VonMises)
    # Another program for the compiler, which has seen the example's own with the exact normaliser.
    density, reference, values = case(2, lambda *args: example.model(*args))
    off = abs(density.log_prob(values).item() - reference["loglik"])
    assert 1e-6 < off < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("components, wanted, within", [(1, -18510.4012, 0.01), (3, -18445.1438, 0.1)])
def test_maximum_from_own_starts(data_file, example, components, wanted, within):
    torch.set_default_dtype(torch.float64)
    fit = example.main(str(data_file("pilot_whales.csv")), 4, components, 3 if components > 1 else 1, 0)
    assert fit.objective > wanted - within
