"""Formulas as text: the fixed part, each kind of random part, and what is refused with the place named."""

import pytest

from symhmm.errors import SpecError
from symhmm.tables.formula import Formula, Group, parse


@pytest.mark.parametrize(
    "text, fixed, groups",
    [
        ("~ 1", "1", []),
        ("temp", "temp", []),
        ("~ temp*sex + bs(temp, df=4)", "temp*sex + bs(temp, df=4)", []),
        ("~ 0 + temp - 1", "0 + temp - 1", []),
        ("~ (1 | ID)", "1", [("1", ("ID",), True)]),
        ("~ temp + (temp | ID)", "temp", [("temp", ("ID",), True)]),
        ("~ temp + (temp || ID)", "temp", [("temp", ("ID",), False)]),
        ("~ (1 | a/b/c)", "1", [("1", ("a",), True), ("1", ("a", "b"), True), ("1", ("a", "b", "c"), True)]),
        ("~ (1|a:b) + x + (0+x|c)", "x", [("1", ("a", "b"), True), ("0+x", ("c",), True)]),
        ("~ (1 | a + b)", "1", [("1", ("a",), True), ("1", ("b",), True)]),
        ("~ (a + b):c + (1 | `my id`)", "(a + b):c", [("1", ("my id",), True)]),
    ],
)
def test_taken_apart(text, fixed, groups):
    assert parse(text) == Formula(fixed, tuple(Group(*g) for g in groups))
    # What is printed is read back as the same.
    if "`" not in text:
        assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    "text, says",
    [
        ("", "empty"),
        ("~ ", "empty"),
        ("y ~ x", "has a response"),
        ("~ x + + z", "empty term"),
        ("~ x +", "empty term"),
        ("~ 1 | ID", "bar outside brackets"),
        ("~ (1 | ID", "do not match"),
        ("~ x)", "do not match"),
        ("~ (1 | ID | b)", "not '(effects | group)'"),
        ("~ ( | ID)", "not '(effects | group)'"),
        ("~ (1 | 2*ID)", "not the name of a column"),
        ("~ (1 | ID) + (1 | ID)", "twice"),
    ],
)
def test_refused(text, says):
    with pytest.raises(SpecError, match="the formula of transitions") as error:
        parse(text, "formula of transitions")
    assert says in str(error.value)
    assert "Try: " in str(error.value)
