"""How every test and doctest starts: one thread per process, a fixed seed, nothing left over from before."""

import os

# The suite runs in two processes on small machines; threads inside each of them would only queue for the same cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator

import hypothesis
import numpy as np
import pyro
import pytest
import torch

torch.set_num_threads(1)
DTYPE = torch.get_default_dtype()  # fixtures of a whole module set another one before the first test of theirs

# Drawn examples are the same in every run, so that a red test is red for everyone; deadlines would measure the machine.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True, print_blob=True, max_examples=40)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """Seeds the generators, empties Pyro's parameter store, and gives back the default dtype afterwards."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    np.random.seed(0)
    yield
    torch.set_default_dtype(DTYPE)
    pyro.clear_param_store()


# Triton's interpreter stands in for a device that is not there; Triton looks at this when it is first imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
