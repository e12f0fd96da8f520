"""Normal forms of traced graphs: fewer operations, the same numbers and derivatives."""

import pytest
import torch
from torch import fx
from torch.testing import assert_close

from symhmm.compiler.laws import simplified
from symhmm.recorder import record


def both(f, *inputs):
    """The recorded function, and the same in normal form."""
    before = record(lambda v, d: [f(*v)], inputs, [])
    return before, fx.GraphModule(before, simplified(before.graph, before, inputs_of(before)))


def inputs_of(module):
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def operations(module):
    return [str(n.target) for n in module.graph.nodes if n.op == "call_function"]


def shorter(f, *inputs, left):
    """That ``left`` operations remain, which make the same value and gradients; returns their names."""
    _, after = both(f, *inputs)
    free = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    again = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
    wanted, (seen,) = f(*free), after(*again)
    assert_close(seen, wanted)
    if wanted.requires_grad:
        weight = torch.randn_like(wanted)
        for x, y in zip(free, again, strict=True):
            (g,) = torch.autograd.grad(wanted, x, weight, retain_graph=True, allow_unused=True)
            (h,) = torch.autograd.grad(seen, y, weight, retain_graph=True, allow_unused=True)
            assert_close(h, g)
    assert len(operations(after)) == left, operations(after)
    return operations(after)


X, Y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)


@pytest.mark.parametrize(
    "f",
    [
        lambda x: x * 1,
        lambda x: x + 0.0,
        lambda x: x / 1,
        lambda x: x**1,
        lambda x: x - 0,
        lambda x: x.reshape(3, 4).clone(),
        lambda x: x.unsqueeze(0).squeeze(0),
        lambda x: x.mT.mT,
        lambda x: x.expand(3, 4)[:, :],
        lambda x: x[torch.arange(3)],
        lambda x: x.index_select(1, torch.arange(4)),
        lambda x: x.reshape(12).reshape(2, 6).reshape(3, 4),
        lambda x: x.expand(5, 3, 4)[:1].squeeze(0),
    ],
)
def test_what_changes_nothing_is_left_out(f):
    # A returned copy stays a copy; it is the only operation that may remain.
    assert set(shorter(lambda x: f(x).exp(), X, left=1)) == {"aten.exp.default"}


def test_what_only_looks_like_nothing_stays():
    whole = torch.arange(3)
    shorter(lambda x: x * 1.5, whole, left=1)  # another dtype
    shorter(lambda x: x.double() * 1, whole, left=1)
    shorter(lambda x: x[torch.tensor([0, 2, 1])] + 0, X, left=1)
    shorter(lambda x: x.index_select(0, torch.tensor([2, 1])), X, left=1)
    shorter(lambda x: x.flip(0).flip(1), X, left=2)


def test_equal_operations_are_made_once():
    shorter(lambda x: x.exp() + x.exp().sin() + x.exp().sin(), X, left=4)
    # One as an integer and one as a float are two numbers.
    _, after = both(lambda x: torch.stack([x * 2, x * 2.0]), torch.arange(3))
    assert [x.dtype for x in after(torch.arange(3))] == [torch.float32]


def test_repeated_numbers_are_computed_once():
    def f(x, y):
        wide = x[:, :1].expand(3, 4)
        return (wide.lgamma() + wide.exp() * 3) * y

    _, after = both(f, X.abs() + 1, Y)
    sizes = {str(n.target): tuple(n.meta["val"].shape) for n in after.graph.nodes if n.op == "call_function"}
    assert sizes["aten.lgamma.default"] == sizes["aten.exp.default"] == (3, 1)
    assert not any("expand" in name for name in sizes)
    shorter(f, X.abs() + 1, Y, left=6)


@pytest.mark.parametrize("keep", [True, False])
def test_sums_over_other_dimensions_come_before_repetition(keep):
    def f(x):
        return x[:, None, :].expand(3, 5, 4).logsumexp(-1, keepdim=keep).sum(0)

    # The repetition itself is what is left last.
    assert shorter(f, X, left=4)[-1] == "aten.expand.default"


def test_a_sum_over_what_is_repeated_counts_it():
    shorter(lambda x: x[:, :, None].expand(3, 4, 5).sum(-1), X, left=3)


def test_repetition_does_not_change_the_dtype():
    number, row = torch.tensor(2.0, dtype=torch.float64), torch.ones(3)
    _, after = both(lambda x, y: x.expand(3) + y, number, row)
    assert after(number, row)[0].dtype == torch.float64


def test_indices_in_order_are_views():
    table = torch.randn(4, 3, 2, dtype=torch.float64)
    k, z, w = torch.arange(4).reshape(4, 1, 1), torch.arange(3).reshape(3, 1, 1, 1, 1), torch.arange(2)
    names = shorter(lambda x: x[k, z, w].exp(), table, left=3)
    assert not any("index" in name for name in names)
    shorter(lambda x: x[torch.arange(4).reshape(4, 1)].exp(), table, left=2)
    # The same place twice is no permutation.
    names = shorter(lambda x: x[torch.arange(3), torch.arange(3)].exp(), X[:, :3], left=3)
    assert any("index" in name for name in names)


def test_sums_are_taken_before_what_they_share():
    mask = torch.tensor([True, False, True])[:, None]

    def f(x, y):
        a, b = (torch.where(mask, z, 0.0).mT.reshape(2, 6) for z in (x.exp(), y.sin()))
        return a - b

    names = shorter(f, X, Y, left=7)
    assert all(sum(word in name for name in names) == 1 for word in ("where", "permute", "reshape"))


def test_a_condition_with_another_filler_stays():
    mask = torch.tensor([True, False, True])[:, None]
    shorter(lambda x, y: torch.where(mask, x, 1.0) + torch.where(mask, y, 1.0), X, Y, left=4)


def test_views_of_what_lies_in_another_order():
    def f(x):
        return (x[:, :1].expand(3, 4) * 2).reshape(12) + x.mT.reshape(12)

    shorter(f, X, left=7)


def test_graphs_that_look_at_memory_are_left_alone():
    before, after = both(lambda x: x.mT.clone().as_strided((2, 2), (1, 2)) * 1, X)
    assert operations(before) == operations(after)


def test_operations_that_make_several_tensors_are_made_once():
    names = shorter(lambda x: x.sort(0).values * 1 + x.sort(0).values.exp(), X, left=4)
    assert names.count("aten.sort.default") == 1


@pytest.mark.parametrize(
    "f, left",
    [
        (lambda x, y: (x[:, :, None].exp() * y[:, :, None]).squeeze(-1), 2),
        (lambda x, y: x[:, None].exp().sum(1).cos(), 2),
        (lambda x, y: (x[None] + y).square().sum(-1)[0], 3),
        (lambda x, y: x.sum(0, keepdim=True).reshape(4), 1),
        (lambda x, y: (x[0][:, None] * y[0][None, :, None]).reshape(4).exp(), 4),
        (lambda x, y: torch.where(x[:, None] > 0, y[:, None], 0.0).sum((0, 1)), 4),
        (lambda x, y: (x[None].sum(2, keepdim=True) + y[None])[0], 2),
    ],
)
def test_dimensions_of_one_entry_are_left_out(f, left):
    names = shorter(lambda x, y: f(x, y) * 3, X, Y, left=left + 1)
    assert not any("reshape" in name for name in names)


def test_data_are_reshaped_once_instead_of_what_varies():
    before = record(lambda v, d: [(v[0][:, None] - d[0][:, None, None]).exp()[..., 0]], [X[0]], [Y[0]])
    after = simplified(before.graph, before, inputs_of(before)[:1])
    reshaped = [n.all_input_nodes[0].name for n in after.nodes if "reshape" in str(n.target)]
    assert reshaped == ["data_0"]


def test_graphs_of_any_depth():
    def f(x):
        for _ in range(1500):
            x = x.sin()
        return x + torch.zeros_like(x)

    _, after = both(f, X)
    assert len(operations(after)) == 1500
