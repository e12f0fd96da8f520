"""The one tree of errors, and how their messages read."""

import inspect
import pickle

import pytest

from symhmm import errors
from symhmm.errors import ShapeError, StructureDependsOnInput, SymhmmError, SymhmmWarning

CLASSES = [thing for _, thing in inspect.getmembers(errors, inspect.isclass) if thing.__module__ == errors.__name__]


@pytest.mark.parametrize("kind", CLASSES)
def test_one_tree_and_every_branch_says_when_it_is_raised(kind):
    assert issubclass(kind, UserWarning if kind is SymhmmWarning else SymhmmError)
    assert inspect.getdoc(kind)


def test_message_is_problem_details_suggestion():
    error = ShapeError("mask of site 'y' does not fit.", details=["seen (3,)", "wanted (4,)"], suggestion="mask[:4]")
    assert str(error).splitlines() == [
        "mask of site 'y' does not fit.",
        "  seen (3,)",
        "  wanted (4,)",
        "  Try: mask[:4]",
    ]
    assert str(ShapeError("short.")) == "short."


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind.__init__ is SymhmmError.__init__])
def test_errors_survive_a_trip_between_processes(kind):
    error = kind("problem.", details=("one",), suggestion="two")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_structure_depends_on_input_names_the_traced_input():
    error = StructureDependsOnInput("the loop reads a value.", placeholder="tau", suggestion="use torch.where")
    assert error.placeholder == "tau" and str(error).endswith("Try: use torch.where")
