"""The Triton kernels are compiled for devices that need not be there; what they compute is tested in `test_cuda`."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

pytestmark = pytest.mark.cuda
TARGETS = Path(__file__).with_name("cuda_targets.py")


def compiled(folder, capability, *names):
    """What `cuda_targets` prints."""
    triton = pytest.importorskip("triton", reason="Triton is not installed (the gpu extra)")
    if not (Path(triton.__file__).parent / "backends/nvidia/bin/ptxas").exists():
        pytest.skip("this Triton has no assembler for CUDA with it")
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, str(TARGETS), str(capability), *names]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TARGETS.parents[1])
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def check(kernels, capability):
    assert all(k["target"] == capability and k["bytes"] > 0 for k in kernels)
    # A place in memory is a product of 64 bits; the first lane of a program is the only one of 32.
    assert [k for k in kernels if len(k["narrow"]) > 1] == []
    # Every multiprocessor has room for several programs.
    assert max(k["shared"] for k in kernels) <= 4096
    if tuple(map(int, version("triton").split(".")[:2])) >= (3, 7):  # older ones lay threads out otherwise
        # Numbers are in registers, but for a few at most: memory beside them is ten times slower.
        assert [k for k in kernels if (k["local"] or 0) > 32] == []
        # A thread holds all of a chain of few states.
        assert [k for k in kernels if k["name"] == "many chains" and k["shuffles"]] == []


def test_every_kernel_compiles_for_a_device(tmp_path):
    kernels = compiled(tmp_path, 90, "many chains", "of every step, shared by all", "of every step, shared by some")
    assert {(k["kernel"], k["dtype"]) for k in kernels} == {
        (kernel, dtype) for kernel in ("lanes_forward", "lanes_backward") for dtype in ("float32", "float64")
    }
    check(kernels, 90)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_every_shape_compiles_for_every_device(tmp_path, capability):
    check(compiled(tmp_path, capability), capability)
