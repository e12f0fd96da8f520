"""Tapes being written: where numbers lie, and when they have to be gathered."""

from symhmm.compiler.tape import Tape


def words(tape, part=0):
    return [row[0] for row in tape.rows.get(part, [])]


def test_numbers_in_a_row_are_read_where_they_lie():
    tape = Tape(size=8)
    x = tape.new(6).reshape(2, 3)
    y = tape.add("exp", (2, 3), x)
    assert y.tolist() == [[14, 15, 16], [17, 18, 19]]
    tape.add("neg", (3,), y[1])
    assert words(tape) == ["exp", "neg"] and tape.rows[0][1][1:5] == (20, 3, 1, 17)


def test_others_are_gathered_once():
    tape = Tape(size=8)
    x = tape.new(6).reshape(2, 3)
    for word in ("exp", "log"):
        tape.add(word, (3, 2), x.mT)
    assert words(tape) == ["gather", "exp", "log"]
    assert tape.places[0].tolist() == [8, 11, 9, 12, 10, 13]


def test_what_is_gathered_in_a_later_part_is_not_there_in_an_earlier_one():
    tape = Tape(size=8)
    x = tape.new(4).reshape(2, 2)
    for part, seen in ((2, 1), (1, 1), (3, 0)):
        tape.part = part
        tape.add("exp", (2, 2), x.mT)
        assert words(tape, part).count("gather") == seen


def test_literals_have_one_place_each():
    tape = Tape(size=8)
    assert [tape.literal(x) for x in (1.0, 0.0, 2, 1, -0.0, float("inf"))] == [1, 0, 2, 1, 3, 4]
    assert tape.constants == [0.0, 1.0, 2.0, -0.0, float("inf")]


def test_reductions_have_their_numbers_side_by_side():
    tape = Tape(size=8)
    x = tape.new(6).reshape(2, 3)
    assert tape.add("sum", (2,), x, reduced=3).shape == (2,)
    assert tape.rows[0] == [("sum", 14, 2, 3, 8, 0, 0)]
    assert tape.scan("cumsum", x, 0).shape == (2, 3)
    assert words(tape) == ["sum", "gather", "cumsum"]
