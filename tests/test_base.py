"""What all models promise: the printed program is the one that runs, sessions are chains of their own, padding counts nothing."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close

import symhmm
from symhmm.errors import SpecError
from symhmm.models import (
    ContinuousTimeHMM,
    CormackJollySeber,
    GaussianHMM,
    HierarchicalRegression,
    LatentClass,
    Mixture,
    MixtureHMM,
    MixtureOfRegressions,
    PoissonHMM,
    SemiMarkovHMM,
)
from symhmm.models.base import first_state, made, source, sticky
from symhmm.tables.data import SequenceData


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


MODELS = {
    "Poisson": PoissonHMM(2, "count"),
    "Gaussian": GaussianHMM(2, ["x", "v"]),
    "diagonal": GaussianHMM(2, ["x", "v"], "diagonal", initial="free"),
    "semi-Markov": SemiMarkovHMM(2, {"x": "gaussian", "count": "negative_binomial"}, longest=3),
    "continuous": ContinuousTimeHMM(2, {"x": "gaussian", "share": "beta"}, time="time"),
    "kinds": MixtureHMM(2, 2, {"length": "zero_inflated_gamma", "angle": "wrapped_cauchy"}),
    "mixture": Mixture(2, {"x": "gaussian", "angle": "vonmises"}),
    "classes": LatentClass(2, {"yes": "bernoulli", "count": "categorical"}),
}
CHAINS = [n for n in MODELS if n not in ("kinds", "mixture", "classes")]


def data(sessions=3, steps=6, individuals=4):
    g = torch.Generator().manual_seed(0)
    shape = (steps, sessions, individuals)
    lengths = torch.randint(2, steps + 1, shape[1:], generator=g)
    lengths[0, 0] = steps
    number = torch.randn(shape, generator=g)
    number[torch.rand(shape, generator=g) < 0.2] = torch.nan
    length = torch.rand(shape, generator=g)
    streams = {
        "x": number,
        "v": torch.randn(shape, generator=g),
        "count": torch.randint(4, shape, generator=g).double(),
        "share": torch.rand(shape, generator=g) * 0.9 + 0.05,
        "length": torch.where(length < 0.2, 0.0, length),
        "angle": torch.rand(shape, generator=g) * 6 - 3,
        "yes": torch.randint(2, shape, generator=g).double(),
    }
    time = torch.rand(shape, generator=g).cumsum(0)
    return SequenceData.from_tensors(streams, lengths=lengths, covariates={"time": time})


def reshaped(d, change):
    return SequenceData.from_tensors(
        {n: change(x) for n, x in d.streams.items()},
        observed={n: change(x) for n, x in d.observed.items()},
        lengths=change(d.lengths[None])[0],
        covariates={n: change(x) for n, x in d.covariates.items()},
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_printed_program_is_the_one_that_runs(name):
    model, d = MODELS[name], data()
    space = {}
    exec(model.program_source(), space)
    density = model.log_density(d)
    copied = symhmm.compile(space["program"], *model.arguments(d, model.start(d)))
    values = density.unpack(density.pack(density.initial()) + 0.1 * torch.randn(density.size))
    assert_close(copied.log_prob(values), density.log_prob(values), rtol=1e-13, atol=0)
    assert density.log_prob(values).isfinite()
    assert density.compiled.mode == "captured" and all(n.tier == "vector" for n in density.graph.loops.values())
    assert model.program is model.program


@pytest.mark.parametrize("name", CHAINS)
def test_sessions_are_chains_of_their_own(name):
    model, d = MODELS[name], data()
    flat = reshaped(d, lambda x: x.flatten(1, 2))
    start = model.start(d)
    values = model.log_density(d, start=start).initial()
    assert_close(
        model.log_density(d, start=start).log_prob(values),
        model.log_density(flat, start=start).log_prob(values),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("name", MODELS)
def test_padding_counts_nothing(name):
    model, d = MODELS[name], data()
    longer = reshaped(d, lambda x: torch.cat([x, x[-1:].clone(), x[:1] + x[:1]]) if len(x) > 1 else x)
    start = model.start(d)
    values = model.log_density(d, start=start).initial()
    found = model.log_density(longer, start=start).log_prob(values)
    assert_close(found, model.log_density(d, start=start).log_prob(values), rtol=1e-12, atol=0)


def test_programs_of_regressions_and_captures_are_those_that_run():
    frame = pd.DataFrame({"id": np.arange(12) // 3, "x": np.linspace(-1, 1, 12), "y": np.sin(np.arange(12.0))})
    seen = SequenceData.from_tensors({"seen": torch.tensor([[1.0, 0, 1], [0, 1, 0]]).T})
    for model, d in [
        (HierarchicalRegression("y ~ x + (1 + x | id)"), frame),
        (MixtureOfRegressions(2, "y ~ x", by="id"), frame),
        (CormackJollySeber("time"), seen),
    ]:
        space = {}
        exec(model.program_source(), space)
        start = model.start(d)
        density, copied = (symhmm.compile(p, *model.arguments(d, start)) for p in (model.program, space["program"]))
        values = density.initial()
        assert_close(copied.log_prob(values), density.log_prob(values), rtol=1e-13, atol=0)


def test_data_of_the_same_shape_reuse_the_compiled_step():
    model, d = PoissonHMM(2, "count"), data()
    first = model.log_density(d)
    other = reshaped(d, lambda x: x.flip(-1))
    assert model.log_density(other).compiled is first.compiled
    assert PoissonHMM(2, "count").log_density(other).compiled is first.compiled


def test_lines_of_a_program_show_in_tracebacks_and_a_function_of_a_file_has_its_imports():
    program = made("def program(data):\n    return data['nothing']\n")
    with pytest.raises(KeyError) as caught:
        program({})
    assert "return data['nothing']" in str(caught.traceback[-1].statement)
    assert source(program).startswith("def program")
    text = source(sticky)
    assert "import torch" in text and "def sticky" in text and "import pyro" not in text
    assert inspect.getsource(first_state) in source(first_state) and "SpecError" in source(first_state).splitlines()[0]


def test_first_states():
    assert first_state((0.25, 0.75), 2) == "first = transition.new_tensor([0.25, 0.75]).expand(transition.shape[:-1])"
    for wrong in ("start", (0.5, 0.5, 0.5), (1.5, -0.5), (0.5,)):
        with pytest.raises(SpecError, match="initial state cannot be"):
            first_state(wrong, 2)
