"""Transforms: what a caller has wrapped around a call, and how to make what is kept outside of it."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad


@contextmanager
def outside() -> Iterator[None]:
    """What is made here belongs to no transform (``vmap``, ``grad``) and no inference mode of the caller.

    What the caller records (`symhmm.recorder.record`, ``make_fx``) is still written down.

    >>> def twice(x):
    ...     with outside():
    ...         kept.append(torch.ones(2))
    ...     return x * kept[-1]
    >>> kept = []
    >>> torch.func.vmap(twice)(torch.arange(6.0).reshape(3, 2)).shape, kept[0] + 1
    (torch.Size([3, 2]), tensor([2., 2.]))
    """
    with temporarily_clear_interpreter_stack(), torch.inference_mode(False):
        yield


def differentiated() -> bool:
    """Whether a transform of ``torch.func`` or forward mode takes derivatives here, which operators with a kernel lack.

    >>> torch.func.grad(lambda x: x * differentiated())(torch.tensor(2.0)), differentiated()
    (tensor(1.), False)
    """
    kinds = (TransformType.Grad, TransformType.Jvp)
    return forward_ad._current_level >= 0 or any(level.key() in kinds for level in get_interpreter_stack() or ())


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage in cycles: many small objects are made here and kept, and each search visits all of torch's."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
