"""Saved fits answer as before; folders that are foreign, changed or incomplete are refused with the reason."""

import json

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints
from torch.testing import assert_close

import symhmm
from symhmm.datasets import simulate_mixed_hmm
from symhmm.errors import DataError
from symhmm.models.gaussian import GaussianHMM


def program(data):
    loc = pyro.param("loc", lambda: torch.tensor([-1.0, 1.0]))
    spread = pyro.param("spread", lambda: torch.tensor(0.5), constraints.positive)
    with pyro.plate("individual", data.num_sequences, dim=-1):
        own = pyro.sample("own", dist.Normal(-1.0, spread))
        p = own.sigmoid()
        table = torch.stack([torch.stack([1 - p, p], -1), torch.stack([p, 1 - p], -1)], -2)
        z = torch.zeros(data.num_sequences, dtype=torch.long)
        for t in pyro.markov(range(data.num_steps)):
            z = pyro.sample(f"z_{t}", dist.Categorical(pyro.ops.indexing.Vindex(table)[..., z, :]))
            with pyro.poutine.mask(mask=data.mask[t]):
                pyro.sample(f"y_{t}", dist.Normal(loc[z], 1.0), obs=data.y[t])


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return simulate_mixed_hmm(5, 20, 2, shortest=10, missing=0.1, dtype=torch.float64, generator=generator)[0]


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def answers(fit):
    path = fit.viterbi()["z_{time}"].values
    return fit.smooth()["z_{time}"].values, path, fit.summary().text, fit.random_effects().rows


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("map", {}),
        ("laplace", {}),
        ("svi", {"steps": 40, "cooldown": 10}),
        pytest.param("nuts", {"chains": 2, "draws": 10, "tune": 20}, marks=pytest.mark.slow),
    ],
)
@pytest.mark.filterwarnings("ignore::symhmm.errors.SymhmmWarning")
def test_a_loaded_fit_answers_as_before(method, options, data, tmp_path):
    fit = symhmm.fit(
        program, data, method=method, fix={"spread": torch.tensor(0.4)} if method == "map" else None, **options
    )
    fit.save(tmp_path / "fit")
    again = symhmm.load(tmp_path / "fit", program, data)
    assert_close(again.values, fit.values, rtol=0, atol=0)
    assert again.objective == fit.objective and again.status == fit.status and again.optima == fit.optima
    for old, new in zip(answers(fit), answers(again), strict=True):
        assert_close(new, old, rtol=1e-12, atol=1e-12) if isinstance(old, torch.Tensor) else None
        assert str(old) == str(new)


@pytest.mark.filterwarnings("ignore::symhmm.errors.SymhmmWarning")
def test_models_are_loaded_with_their_data(data, tmp_path):
    models = [
        symhmm.MixedHMM(2, {"y": "gaussian"}, transitions="~ 1 + (1 | id)"),
        symhmm.MixedHMM(["rest", "move"], {"y": "gaussian"}),
        GaussianHMM(2, ["y"]),
    ]
    for i, model in enumerate(models):
        fit = model.fit(data)
        fit.save(tmp_path / str(i))
        again = symhmm.load(tmp_path / str(i), model, data)
        assert type(again) is type(fit) and str(again.summary()) == str(fit.summary())
        new, old = again.smooth()["z_{time}"], fit.smooth()["z_{time}"]
        assert new.labels == old.labels
        assert_close(new.values, old.values, rtol=1e-12, atol=1e-12)
    with pytest.raises(DataError, match="another model"):
        symhmm.load(tmp_path / "1", models[0], data)


def test_other_data_and_programs_are_refused(data, tmp_path):
    symhmm.fit(program, data, method="map", max_evaluations=5).save(tmp_path)
    with pytest.raises(DataError, match=r"(?s)other sizes.*own: saved \[5\], here \[2\]"):
        symhmm.load(tmp_path, program, data.head(2))
    changed = data.take([4, 0, 1, 2, 3])
    with pytest.raises(DataError, match="was made of other data"):
        symhmm.load(tmp_path, program, changed)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("fit.json", lambda b: b.replace(b'"method": "map"', b'"method": "mle"'), "fit.json has been changed"),
        ("fit.json", lambda b: b[:-40], "no JSON"),
        ("fit.json", lambda b: b"[1]", "not written by symhmm"),
        ("fit.json", lambda b: b.replace(b'"version": 1', b'"version": 2'), "has format 2, and this version reads 1"),
        ("fit.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "fit.safetensors has been changed"),
        ("fit.safetensors", lambda b: b"", "fit.safetensors has been changed"),
    ],
)
def test_changed_folders_are_refused(name, change, words, data, tmp_path):
    fit = symhmm.fit(program, data, method="map", max_evaluations=3)
    fit.save(tmp_path)
    before = (tmp_path / name).read_bytes()
    after = change(before)
    assert after != before
    (tmp_path / name).write_bytes(after)
    with pytest.raises(DataError, match=words):
        symhmm.load(tmp_path, program, data)


def test_no_folder_and_no_code(data, tmp_path):
    with pytest.raises(DataError, match=r"(?s)no saved fit .*missing: fit.json"):
        symhmm.load(tmp_path / "nowhere", program, data)
    fit = symhmm.fit(program, data, method="map", max_evaluations=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        fit.save(tmp_path / "file")
    fit.save(tmp_path / "fit")
    content = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert {p.name for p in (tmp_path / "fit").iterdir()} == {"fit.json", "fit.safetensors"}
    named = {x["$class"] for x in every(content) if "$class" in x}
    assert named <= {"Estimate", "Status", "Optima", "Posterior", "Normal", "Draws"}


def every(x):
    """All mappings inside of a structure."""
    if isinstance(x, dict):
        yield x
        x = list(x.values())
    if isinstance(x, list):
        for v in x:
            yield from every(v)
