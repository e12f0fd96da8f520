import closed_forms as cf
import torch

from symhmm.infer.points import points
from symhmm.infer.restrict import Restriction


def test_parameters_move_by_their_units():
    origin, unit = cf.real([3.0, 5.0, 7.0]), cf.real([1.0, 2.0, 0.5])
    moved = points(origin, torch.tensor([2, 0]), unit)
    assert moved.size == 2
    assert moved(cf.real([1.0, -1.0, 99.0])).tolist() == [7.5, 2.0]


def test_tied_and_ordered_parameters_keep_their_restriction_and_their_pace():
    # Two that are equal, then two of which the second is larger; the start has the latter in the wrong order.
    both = Restriction(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 2, 3]), (torch.tensor([1, 2]),))
    origin, unit = cf.real([1.0, 4.0, 3.0, 2.0]), torch.full((4,), 0.1, dtype=cf.REAL)
    moved = points(origin, torch.arange(4), unit, both)
    assert moved.size == 3
    start = moved(torch.zeros(3, dtype=cf.REAL))
    torch.testing.assert_close(start, cf.real([1.0, 1.0, 2.0, 3.0]))
    slope = torch.func.jacrev(moved)(torch.zeros(3, dtype=cf.REAL))
    wanted = [[0.1, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.1, 0.1]]
    torch.testing.assert_close(slope, cf.real(wanted))
