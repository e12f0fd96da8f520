"""Programs that a vectorised body would get wrong are captured another way, or refused; never silently wrong."""

import re
import warnings
from typing import Any

import pyro
import pytest
from negative_programs import NEGATIVE, Negative
from reference import Values, double_precision, draw_values, reference
from torch import Tensor
from torch.testing import assert_close

import symhmm
from symhmm.errors import SymhmmError, SymhmmWarning

EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def _double():
    with double_precision():
        yield


def oracle(program: Negative, values: Values, arguments: tuple[Any, ...]) -> tuple[Tensor, Values]:
    """Pyro's numbers. Without `pyro.markov`, no enumeration dimension is used twice, however far back a state is."""
    with pytest.MonkeyPatch.context() as patch:
        if program.plain:
            patch.setattr(pyro, "markov", lambda steps, **_: steps)
        return reference(program, values, arguments)


def compile_and_listen(program: Negative) -> tuple[symhmm.Density, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SymhmmWarning)
        density = symhmm.compile(program.model, *program.arguments())
    return density, [str(w.message) for w in caught if issubclass(w.category, SymhmmWarning)]


@pytest.mark.parametrize("program", [p for p in NEGATIVE if p.outcome == "equal"], ids=str)
def test_equal_to_pyro_on_these_data_and_later_ones(program: Negative) -> None:
    values = draw_values(program)
    density, said = compile_and_listen(program)
    expected, gradients = oracle(program, values, program.arguments())
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    actual = density.log_prob(leaves)
    assert_close(actual.detach(), expected, **EXACT)
    actual.backward()
    for name, leaf in leaves.items():
        gradient = leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad
        assert_close(gradient, gradients[name], **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")
    assert program.later is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymhmmWarning)
        later = density.bind(*program.later()).log_prob(values)
    assert_close(later.detach(), oracle(program, values, program.later())[0], **EXACT)
    if program.warns:
        assert len(said) == 1, said
        assert re.search(program.reason, said[0]), said


@pytest.mark.parametrize("program", [p for p in NEGATIVE if p.outcome == "refused"], ids=str)
def test_refused_by_name(program: Negative) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymhmmWarning)
        with pytest.raises(SymhmmError, match=program.reason):
            symhmm.compile(program.model, *program.arguments())
