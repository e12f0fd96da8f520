"""Importing symhmm is quick, needs no extras, and what it offers is documented."""

import inspect
import subprocess
import sys

import pytest

import symhmm

HEAVY = ("arviz", "jax", "matplotlib", "numba", "pandas", "scipy.optimize", "triton")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_symhmm_after_pyro_takes_less_than_a_third_of_a_second():
    # Processor time, and the smallest of several runs: what other processes do only ever adds to it.
    code = "import pyro, time; start = time.process_time(); import symhmm; print(time.process_time() - start)"
    seconds = []
    for _ in range(10):
        seconds.append(float(python(code)))
        if seconds[-1] < 0.3:
            break
    assert min(seconds) < 0.3, f"took {min(seconds):.2f} s beyond pyro"


def test_importing_symhmm_leaves_heavy_packages_alone():
    code = (
        f"import pyro, sys; before = set(sys.modules); import symhmm; print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_works_without_optional_extras():
    extras = "arviz, formulae, jax, matplotlib, narwhals, nutpie, pandas, triton"
    block = f"import sys; sys.modules.update(dict.fromkeys('{extras}'.split(', ')))"
    assert python(f"{block}; import symhmm; print(symhmm.__name__)") == "symhmm"


@pytest.mark.parametrize("name", symhmm.__all__)
def test_public_names_are_documented(name):
    thing = getattr(symhmm, name)
    assert inspect.getdoc(thing), f"symhmm.{name} has no docstring"


def test_public_names_are_sorted_and_unique():
    assert list(symhmm.__all__) == sorted(set(symhmm.__all__))
