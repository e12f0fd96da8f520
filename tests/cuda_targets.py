"""Compiles the kernels for devices that are not there, with the arguments that the operator gives them; prints what came out.

A process of its own, since Triton decides when it is imported whether it interprets. Run as
``python tests/cuda_targets.py 90 constant "64 states"``, compute capability and some of `SHAPES` or none for all: one line
of JSON for each kernel, with the bytes that a thread keeps outside of registers where Triton has brought ``cuobjdump``.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from symhmm.chains import cuda

# Transition, emission, terminal, steps: constant, of every step shared by all, by some, by none; from one to 64 states.
SHAPES = {
    "constant, one state": ((1, 1, 1, 1), (3, 5, 1), (1, 1), 5),
    "constant": ((1, 1, 3, 3), (20, 50, 3), (1, 3), 50),
    "many chains": ((1, 1, 3, 3), (20_000, 2, 3), (1, 3), 2),
    "many chains of eight states": ((1, 1, 8, 8), (20_000, 2, 8), (1, 8), 2),
    "many chains, of every step": ((20_000, 2, 3, 3), (1, 1, 3), (1, 3), 2),
    "one step": ((1, 1, 3, 3), (20, 1, 3), (1, 3), 1),
    "many steps": ((1, 1, 3, 3), (1, 3000, 3), (1, 3), 3000),
    "of every step, shared by all": ((1, 9, 5, 5), (20, 9, 5), (20, 5), 9),
    "of every step, shared by some": ((1, 4, 9, 5, 5), (20, 1, 9, 5), (1, 1, 5), 9),
    "of every step": ((20, 9, 5, 5), (20, 9, 5), (20, 5), 9),
    "16 states": ((1, 1, 16, 16), (20, 9, 16), (1, 16), 9),
    "64 states": ((1, 1, 64, 64), (2, 9, 64), (1, 64), 9),
    "64 states, of every step": ((2, 9, 64, 64), (2, 9, 64), (1, 64), 9),
}


class Elsewhere:
    """A device as far as Triton's compiler asks for one."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # results are kept for each device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: object) -> None:
        self.kernel, self.found = kernel, {}

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        def launch(*args: object, **options: object) -> None:
            made = self.kernel.warmup(*args, grid=grid, **options)
            self.found[made.hash] = made

        return launch


def local_bytes(cubin: bytes) -> int | None:
    """Memory that a thread has beside its registers."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", shown.stdout)[1])


def main(capability: int, names: list[str]) -> None:
    """Compile value and gradient of some shapes in both precisions."""
    driver.set_active(Elsewhere(capability))
    forward, backward = cuda.lanes_forward, cuda.lanes_backward
    for name in names or SHAPES:
        *shapes, length = SHAPES[name]
        for dtype in (torch.float32, torch.float64):
            inputs = [torch.zeros(shape, dtype=dtype) for shape in shapes]
            kernels = cuda.lanes_forward, cuda.lanes_backward = Compiled(forward), Compiled(backward)
            message, *kept = cuda.forward(*inputs, length)
            cuda.backward(message, *inputs, *kept, length)
            for made in (made for kernel in kernels for made in kernel.found.values()):
                found = {
                    "name": name,
                    "dtype": str(dtype)[6:],
                    "kernel": made.metadata.name,
                    "target": made.metadata.target.arch,
                    "bytes": len(made.asm["cubin"]),
                    "local": local_bytes(made.asm["cubin"]),
                    "shared": made.metadata.shared,
                    "shuffles": made.asm["ptx"].count("shfl."),
                    "narrow": re.findall(r"arith\.muli .* : (?:tensor<\S*xi32>|i32)", made.asm["ttir"]),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    warnings.simplefilter("error")
    main(int(sys.argv[1]), sys.argv[2:])
