"""Every program of the table, compiled, against Pyro's own `TraceEnum_ELBO` and against brute force, in float64."""

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from program_table import Program
from programs import PROGRAMS
from reference import Values, double_precision, draw_values, reference
from torch import Tensor
from torch.testing import assert_close

import symhmm
from symhmm.errors import SymhmmWarning
from symhmm.testing import enumerate_joint

EXACT = {"rtol": 1e-10, "atol": 1e-10}
TIERS = ("none", "vector", "stacked", "unrolled")


@dataclass(frozen=True)
class Compiled:
    """A program, compiled once for all tests, with Pyro's numbers."""

    density: Any
    values: Values
    expected: Tensor
    gradients: Values
    warnings: tuple[str, ...]


@cache
def compiled(program: Program) -> Compiled:
    with double_precision():
        values = draw_values(program)
        expected, gradients = reference(program, values)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", SymhmmWarning)
            # A program of its own: another test may have compiled the model, and warnings come once.
            density = symhmm.compile(lambda *args: program.model(*args), *program.arguments())
    said = tuple(str(w.message) for w in caught if issubclass(w.category, SymhmmWarning))
    return Compiled(density, values, expected, gradients, said)


each_program = pytest.mark.parametrize("program", PROGRAMS, ids=str)


@pytest.fixture(autouse=True)
def _double():
    with double_precision():
        yield


@each_program
def test_value_and_gradients_equal_pyro(program: Program) -> None:
    case = compiled(program)
    leaves = {name: value.clone().requires_grad_() for name, value in case.values.items()}
    assert set(case.density.initial()) == set(leaves)
    actual = case.density.log_prob(leaves)
    assert_close(actual.detach(), case.expected, **EXACT)
    names = [name for name in leaves if leaves[name].numel()]
    if not actual.requires_grad:
        assert not names
        return
    found = torch.autograd.grad(actual, [leaves[name] for name in names], allow_unused=True)
    for name, gradient in zip(names, found, strict=True):
        gradient = torch.zeros_like(leaves[name]) if gradient is None else gradient
        assert_close(gradient, case.gradients[name], **EXACT, msg=lambda text, name=name: f"gradient of {name}: {text}")


@each_program
def test_vector_gradient_is_the_chain_rule(program: Program) -> None:
    case = compiled(program)
    vector = case.density.pack(case.values)
    value, gradient = case.density.value_and_grad(vector)
    assert_close(value, case.expected, **EXACT)
    free = vector.clone().requires_grad_()
    unpacked = case.density.unpack(free)
    for name, tensor in unpacked.items():
        assert_close(tensor.detach(), case.values[name], **EXACT)
    along = sum(((case.gradients[name] * tensor).sum() for name, tensor in unpacked.items()), torch.zeros(()))
    if free.numel():
        (expected,) = torch.autograd.grad(along, free)
        assert_close(gradient, expected, **EXACT)


@each_program
def test_tier_is_as_stated_and_said_once(program: Program) -> None:
    case = compiled(program)
    notes = case.density.graph.loops.values()
    slowest = max((note.tier for note in notes), key=TIERS.index, default="none")
    assert slowest == program.tier, [f"{note.tier}: {note.reason}" for note in notes]
    slow = [note for note in notes if note.tier != "vector" and note.reason]
    assert len(case.warnings) <= 1
    assert bool(case.warnings) == bool(slow), case.warnings


@each_program
def test_graph_equals_brute_force(program: Program) -> None:
    if not program.small:
        pytest.skip("too many joint states for brute force")
    case = compiled(program)
    assert_close(enumerate_joint(case.density.graph_at(case.values)).detach(), case.expected, **EXACT)


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p.per], ids=str)
def test_members_of_a_plate_add_up(program: Program) -> None:
    case = compiled(program)
    terms = case.density.per(program.per, case.values)
    assert terms.dim() == 1 and len(terms) == case.density.graph.plates[program.per].size
    assert_close(terms.sum().detach(), case.expected, **EXACT)


def reversed_tensors(x: Any) -> Any:
    """The same structure of arguments with every tensor reversed along all of its dimensions."""
    if isinstance(x, Tensor):
        return x.flip(list(range(x.dim())))
    if isinstance(x, dict):
        return {key: reversed_tensors(value) for key, value in x.items()}
    return type(x)(map(reversed_tensors, x)) if isinstance(x, list | tuple) else x


@each_program
def test_other_data_of_the_same_shape(program: Program) -> None:
    case = compiled(program)
    arguments = reversed_tensors(program.arguments())
    expected, _ = reference(program, case.values, arguments)
    # What depends on data may be captured anew, and then says again why it is slow.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SymhmmWarning)
        density = case.density.bind(*arguments)
        assert_close(density.log_prob(case.values).detach(), expected, **EXACT)


def test_one_capture_serves_all_data_of_a_shape() -> None:
    program = next(p for p in PROGRAMS if p.name == "hmm")
    calls: list[int] = []

    def counted(y: Tensor) -> None:
        calls.append(1)
        program.model(y)

    (y,) = program.arguments()
    density = symhmm.compile(counted, y)
    values = draw_values(program)
    density.log_prob(values)
    before = len(calls)
    for shift in range(3):
        density.bind(y + shift).log_prob(values)
    assert len(calls) == before
