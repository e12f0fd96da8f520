"""Marks: what a tensor was computed from, in the run that is going on."""

import torch

from symhmm.capture.marks import Mark, find_mark, get_mark, set_mark, union


def test_marks_of_another_run_mean_nothing():
    run, x = object(), torch.zeros(2)
    assert find_mark(run, x) is None and get_mark(run, x) == Mark(run)
    mark = Mark(run, frozenset({"z"}))
    set_mark(x, mark)
    assert find_mark(run, x) is mark
    assert find_mark(object(), x) is None


def test_views_share_what_is_known_of_their_base():
    run, x = object(), torch.zeros(2, 2)
    set_mark(x, Mark(run, frozenset({"a"}), frozenset({"loop"})))
    view = x[0]
    assert get_mark(run, view).sites == {"a"}
    set_mark(view, Mark(run, frozenset({"b"})))
    assert get_mark(run, view) == Mark(run, frozenset({"a", "b"}), frozenset({"loop"}))
    assert get_mark(run, x).sites == {"a"}
    # What a former run said of the base is forgotten, what this one says of the view is not.
    later = object()
    set_mark(view, Mark(later, frozenset({"c"})))
    assert get_mark(later, view).sites == {"c"}


def test_unions_keep_everything():
    run, level = object(), object()
    parts = [Mark(run, frozenset({"a"})), Mark(run), Mark(run, carried=frozenset({"loop"})), Mark(run, level=level)]
    whole = Mark(run, frozenset({"a"}), frozenset({"loop"}), level)
    assert union(run, parts) == union(run, reversed(parts)) == whole
    assert union(run, []) == union(run, [Mark(run)]) == Mark(run)
    assert union(run, [union(run, parts[:2]), union(run, parts[2:])]) == whole
    # The inner level is the one that was seen last.
    inner = object()
    assert union(run, [Mark(run, level=level), Mark(run, level=inner)]).level is inner
