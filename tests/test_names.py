"""Tokens in names: written as templates of an axis, and read at each step."""

from symhmm.capture.names import Names, Token


def test_equal_pieces_are_one_token():
    names = Names()
    a, b = names.text("loop", ("1", "2"), 0), names.text("loop", ("1", "2"), 0)
    assert a == b and len(names.tokens) == 1
    other = {names.text("loop", ("2", "3"), 1), names.text("inner", ("1", "2"), 0)}
    assert a not in other and len(other) == 2
    digits = names.text("loop", ("1", "2"), 0, digits=True)
    assert digits.isdigit() and digits != a


def test_each_loop_is_resolved_by_itself():
    names = Names()
    outer, inner = names.text("outer", ("3", "4"), 0), names.text("inner", ("a", "b"), None)
    name = f"y_{outer}_{inner}"
    assert [t.loop for t in names.of(name)] == ["outer", "inner"]
    assert names.resolve(name, {"outer": 1, "inner": 0}) == "y_4_a"
    half = names.resolve(name, {"outer": 1})
    assert half.startswith("y_4_") and names.resolve(half, {"inner": 1}) == "y_4_b"


def test_templates_name_axis_and_shift():
    names = Names()
    now, before, odd = (names.text("loop", texts, s) for texts, s in ((("1",), 0), (("0",), -1), (("x",), None)))
    name = f"z_{now}_{before}_{odd}"
    assert names.template(name, {"loop": "time"}) == "z_{time}_{time-1}_{time:2}"
    assert names.template(name, {"other": "time"}) == name
    assert names.readable(f"site {now!r} of {before}") == "site '{time}' of {time-1}"


def test_nine_digits_that_are_no_token_stay():
    names = Names()
    text = names.text("loop", ("5", "6"), 0, digits=True)
    assert names.resolve(f"y_{int(text):d}_912345678", {"loop": 0}) == "y_5_912345678"
    assert names.of("y_912345678") == []


def test_shifts_ahead_have_a_sign():
    assert Token("loop", ("2",), 1, 0).written("time") == "{time+1}"
