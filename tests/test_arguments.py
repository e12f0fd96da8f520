"""Program arguments are taken apart into tensors and structure, and put together again."""

from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from symhmm.compiler.arguments import take_apart

Pair = namedtuple("Pair", "a b")


@dataclass(frozen=True)
class Table:
    y: torch.Tensor
    names: tuple[str, ...]


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize(
    "value, read",
    [
        (torch.ones(2), lambda x: x),
        ([torch.ones(2), 3], lambda x: x[0]),
        ((torch.ones(2), "a"), lambda x: x[0]),
        ({"y": torch.ones(2), "n": None}, lambda x: x["y"]),
        (Pair(torch.ones(2), 1), lambda x: x.a),
        (Table(torch.ones(2), ("u", "v")), lambda x: x.y),
        (SimpleNamespace(y=torch.ones(2)), lambda x: x.y),
        ({"deep": [SimpleNamespace(y=(torch.ones(2),))]}, lambda x: x["deep"][0].y[0]),
    ],
    ids=lambda v: type(v).__name__,
)
def test_tensors_are_replaced_wherever_they_are(value, read):
    parts = take_apart((value,), {"k": value})
    assert len(parts.tensors) == 2
    args, kwargs = parts.rebuild((torch.zeros(2), torch.full((2,), 5.0)))
    assert type(args[0]) is type(value)
    assert torch.equal(read(args[0]), torch.zeros(2))
    assert torch.equal(read(kwargs["k"]), torch.full((2,), 5.0))
    assert torch.equal(read(value), torch.ones(2))  # the user's own object is untouched


def test_signature_is_shape_dtype_and_static_values():
    key = take_apart((torch.zeros(3), 5), {}).signature
    assert key == take_apart((torch.ones(3), 5), {}).signature
    assert key != take_apart((torch.zeros(4), 5), {}).signature
    assert key != take_apart((torch.zeros(3, dtype=torch.float64), 5), {}).signature
    assert key != take_apart((torch.zeros(3), 6), {}).signature
    assert key != take_apart((torch.zeros(3), 5.0), {}).signature
    assert hash(key) == hash(take_apart((torch.ones(3), 5), {}).signature)


def test_stateful_objects_are_keyed_by_identity():
    a, b = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    assert take_apart((a,), {}).signature == take_apart((a,), {}).signature
    assert take_apart((a,), {}).signature != take_apart((b,), {}).signature


def test_repeated_memory_is_written_out():
    parts = take_apart((Table(torch.ones(1, 3).expand(4, 3), ()),), {})
    assert 0 not in parts.tensors[0].stride()
