"""Where the numbers of a tensor lie in memory, chain by chain and lane by lane."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from symhmm.chains.layout import Layout

Array = NDArray[Any]
# A number that tells a kernel in which precision to read the memory it is given.
LIKE = {torch.float32: np.float32(0), torch.float64: np.float64(0)}


@dataclass(frozen=True)
class Places:
    """Where the kernels find the numbers of one tensor, counted from its first.

    Args:
        extent: numbers between its first and its last.
        chains: where each chain starts, in row-major order of the broadcast batch.
        lanes: where each lane starts; the last vector is filled up by repetition.
        time: distance from one step to the next, 0 if it is constant over time.
        inner: the strides of the states.
        one_for_all: whether all lanes read the same numbers at the same time.
    """

    extent: int
    chains: NDArray[np.int64]
    lanes: NDArray[np.int64]
    time: int
    inner: tuple[int, ...]
    one_for_all: bool


@lru_cache(maxsize=64)
def places(size: torch.Size, stride: tuple[int, ...], timed: bool, layout: Layout, copies: int) -> Places:
    """Places in a tensor of some size and stride, every lane ``copies`` times in a row; worked out once per shape."""
    lead = len(layout.batch)
    chains: NDArray[np.int64] = np.zeros((), dtype=np.int64)
    for d, n in enumerate(layout.batch):
        chains = chains[..., None] + np.arange(n, dtype=np.int64) * (stride[d] if size[d] > 1 else 0)
    chains = chains.reshape(-1)
    time = stride[lead] if timed and size[lead] > 1 else 0
    starts = chains[:, None] + np.array(layout.starts[:-1]) * time
    extent = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True)) if 0 not in size else 0
    one_for_all = bool((chains == chains[0]).all()) and (layout.blocks == 1 or time == 0)
    lanes = _filled_up(np.repeat(starts.reshape(-1), copies), layout)
    return Places(extent, chains, lanes, time, stride[lead + timed :], one_for_all)


@lru_cache(maxsize=64)
def idle(layout: Layout, copies: int) -> NDArray[np.bool_]:
    """The lanes whose blocks have one step less than the longest."""
    short = np.diff(layout.starts) < layout.steps
    return _filled_up(np.repeat(np.tile(short, layout.chains), copies), layout)


def _filled_up(lanes: NDArray[Any], layout: Layout) -> NDArray[Any]:
    return np.pad(lanes, (0, -len(lanes) % layout.width), "edge")


def terms(x: Tensor, event: int, layout: Layout, copies: int = 1) -> tuple[Array, Places]:
    """The memory of a tensor (*batch, [time,] ..) with ``event`` dimensions after the batch, and places in it."""
    found = places(x.shape, x.stride(), event > 1, layout, copies)
    return memory(x, found.extent), found


def memory(x: Tensor, count: int) -> Array:
    """The first ``count`` numbers from where ``x`` starts."""
    return x.detach().as_strided((count,), (1,), x.storage_offset()).numpy()
