"""The chain operator on a CUDA device: absolute times, their share of the memory's bandwidth, and JAX libraries beside it.

The log-likelihood of B hidden Markov chains with one transition matrix, T steps and K states from given log-likelihoods of
the observations, and its gradient with respect to both, in float32: `benchmarks.chains` on a device. Times are of the
host's clock up to the end of the work on the device; those of a replayed CUDA graph leave out what Python and the launches
take. Bytes are counted, not measured. Dynamax and NumPyro run in a process of their own, one after the other, and only
where JAX has a GPU, too. Run as

    python -m benchmarks.device --seconds 2
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.chains import SIZES as OF_THE_TABLE
from benchmarks.chains import tensors
from symhmm.chains.layout import device_layout_between, device_layout_of
from symhmm.chains.operator import chain_evidence

Size = tuple[int, int, int]
Step = Callable[[], object]
SIZES: list[Size] = [*OF_THE_TABLE, (100_000, 1, 8), (1_000, 10_000, 4), (100_000, 100, 3)]
COPY = 2**30  # bytes whose copy says how fast the memory is
LONGEST = 600  # seconds that all other libraries may take for one size


def nothing_to_measure() -> str:
    """Why there is no table to be had here; empty where there is."""
    if not torch.cuda.is_available():
        built = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built for CPU only"
        return f"torch sees no CUDA device (torch {torch.__version__} {built}): nothing was measured"
    try:
        import triton as _  # noqa: F401
    except ImportError:
        return "Triton is not installed (the gpu extra): nothing was measured"
    return ""


def ours(matrix: Tensor, emission: Tensor) -> Step:
    """Value and gradients by the chain operator, where its inputs are."""
    initial = torch.full_like(matrix[0], 1 / matrix.shape[0]).log()
    inputs = [x.detach().requires_grad_() for x in (matrix, emission)]

    def step() -> tuple[Tensor, ...]:
        value = chain_evidence(initial, inputs[0][None], inputs[1]).sum()
        return value.detach(), *torch.autograd.grad(value, inputs)

    return step


def replayed(step: Step) -> Step:
    """The same work as a CUDA graph."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def finished(device: str) -> None:
    """Wait until the device has done its work."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def milliseconds(step: Step, seconds: float, wait: Callable[[], None], fewest: int = 5) -> list[float]:
    """Of the step, again and again, each from a device at rest to a device at rest."""
    for _ in range(2):  # the first one compiles
        step()
        wait()
    found: list[float] = []
    end = time.perf_counter() + seconds
    while len(found) < fewest or time.perf_counter() < end:
        start = time.perf_counter()
        step()
        wait()
        found.append((time.perf_counter() - start) * 1e3)
    return found


def bandwidth(device: str, count: int = COPY) -> float:
    """Bytes that the device's memory reads and writes in a second, in a copy within it."""
    source = torch.ones(count // 4, device=device)
    target = torch.empty_like(source)
    least = min(milliseconds(lambda: target.copy_(source), 0.0, lambda: finished(device), fewest=10))
    return 2 * count / least * 1e3


def traffic(length: int, batch: int, states: int, itemsize: int = 4) -> int:
    """Bytes that value and gradient read and write, each number once per pass over it.

    Of every step emission terms are read and messages written, both read again, and gradients written. Chains that are cut
    have their terms read once more for the products of blocks; these are made in float64, and are passed over like steps.
    """
    layout = device_layout_of((batch,), length, states)
    numbers = batch * length * states
    if layout.blocks == 1:
        return 5 * numbers * itemsize
    between = device_layout_between(layout)
    products = layout.lanes * states**2 * (1 + (between.blocks > 1))
    return 6 * numbers * itemsize + products * (4 * 8 + 4 * itemsize)


def peers(size: Size, seconds: float, device: str) -> dict[str, dict]:
    """Milliseconds and values that the other libraries find, or why they are left out, by their names."""
    command = [sys.executable, "-m", "benchmarks.device", "--peers", *map(str, size)]
    command += ["--seconds", str(seconds), "--device", device]
    # Without this JAX takes most of the device's memory at once.
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, stdout=said, stderr=errors, env=environment)
        try:
            why = "" if child.wait(LONGEST) == 0 else f"exit code {child.returncode}"
        except subprocess.TimeoutExpired:
            child.kill()
            why = f"left out after {LONGEST} s"
        said.seek(0)
        errors.seek(0)
        found = dict(json.loads(line) for line in said)
        if why and not found:
            sys.stderr.write(errors.read())
    return {name: found.get(name, {"left": why}) for name in PEERS}


def dynamax(matrix: Tensor, emission: Tensor, parallel: bool = False) -> Callable[[], tuple]:
    """Dynamax's filter, jitted; the parallel one is a scan over steps."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import inference, parallel_inference

    run = parallel_inference.hmm_filter if parallel else inference.hmm_filter

    def value(matrix: object, emission: object) -> object:
        initial = matrix.mean(0)  # ours has a step before the first observation
        return jax.vmap(lambda e: run(initial, matrix, e).marginal_loglik)(emission).sum()

    step = jax.jit(jax.value_and_grad(value, (0, 1)))
    arrays = jnp.asarray(matrix.exp().numpy()), jnp.asarray(emission.numpy())
    return lambda: jax.block_until_ready(step(*arrays))


def numpyro(matrix: Tensor, emission: Tensor) -> Callable[[], tuple]:
    """NumPyro's scan with enumeration, which multiplies the steps in a tree, jitted."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as nd
    from numpyro.contrib.control_flow import scan
    from numpyro.contrib.funsor import config_enumerate, enum, log_density

    batch = emission.shape[0]

    def model(matrix: object, emission: object) -> None:
        def body(z: object, now: object) -> tuple[object, None]:
            with numpyro.plate("sequence", batch, dim=-1):
                weights = matrix.mean(0) if z is None else matrix[z]
                z = numpyro.sample("z", nd.Categorical(weights))
                # Of an observation that is certain: its density is the given number.
                term = now[jnp.arange(batch), z]
                numpyro.sample("e", nd.Delta(jnp.zeros_like(term), term), obs=jnp.zeros(batch))
            return z, None

        scan(body, None, emission)

    enumerated = enum(config_enumerate(model), -2)
    step = jax.jit(jax.value_and_grad(lambda *v: log_density(enumerated, v, {}, {})[0], (0, 1)))
    arrays = jnp.asarray(matrix.exp().numpy()), jnp.asarray(emission.transpose(0, 1).numpy())
    return lambda: jax.block_until_ready(step(*arrays))


PEERS: dict[str, Callable[[Tensor, Tensor], Callable[[], tuple]]] = {
    "Dynamax": dynamax,
    "Dynamax, parallel": lambda matrix, emission: dynamax(matrix, emission, parallel=True),
    "NumPyro, scan": numpyro,
}


def serve_peers(size: Size, seconds: float, device: str) -> None:
    """Print a line of JSON for each library: its name, and what `peers` returns for it."""
    inputs = tensors(*size)
    for name, make in PEERS.items():
        try:
            import jax

            if device != "cpu" and jax.default_backend() != "gpu":
                found: dict = {"left": "JAX sees no GPU (jax[cuda12] or jax[cuda13] brings what it needs)"}
            else:
                step = make(*inputs)
                value = float(step()[0])
                found = {"times": milliseconds(step, seconds, lambda: None, fewest=3), "value": value}
        except ImportError as error:
            found = {"left": f"not installed: {error.name}"}
        except jax.errors.JaxRuntimeError as error:  # the device has too little memory, most likely
            found = {"left": str(error).splitlines()[0][:80]}
        print(json.dumps([name, found]), flush=True)


def report(size: Size, seconds: float, device: str, fastest: float) -> str:
    """One block of the table: of each library the median as a multiple of ours, milliseconds, and what it finds."""
    step = ours(*[x.to(device) for x in tensors(*size)])
    value = float(step()[0])
    found = {"symhmm": {"times": milliseconds(step, seconds, lambda: finished(device)), "value": value}}
    if device != "cpu":
        graph = milliseconds(replayed(step), seconds, lambda: finished(device))
        found["symhmm, CUDA graph"] = {"times": graph, "value": value}
    moved, blocks = traffic(*size), device_layout_of((size[1],), size[0], size[2]).blocks
    lines = [
        f"\nT = {size[0]}, B = {size[1]}, K = {size[2]}: {moved / 1e6:.2f} MB, {blocks} blocks on a device",
        f"{'':20}{'ratio':>8}{'median ms':>12}{'least ms':>12}{'bandwidth':>11}{'log-likelihood':>18}",
    ]
    mine = statistics.median(found["symhmm"]["times"])
    for name, other in {**found, **peers(size, seconds, device)}.items():
        if "left" in other:
            lines.append(f"{name:20}{'-':>8}   {other['left']}")
            continue
        median, least = statistics.median(other["times"]), min(other["times"])
        share = f"{moved / least * 1e3 / fastest:.1%}" if name in found else ""
        lines.append(f"{name:20}{median / mine:8.2f}{median:12.3f}{least:12.3f}{share:>11}{other['value']:18.2f}")
    return "\n".join(lines)


def main(seconds: float, device: str, sizes: list[Size]) -> None:
    """Print the table of one device, or what is missing for it."""
    missing = "" if device == "cpu" else nothing_to_measure()
    if missing:
        print(missing)
        return
    fastest = bandwidth(device, 2**24 if device == "cpu" else COPY)
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name(device)
    print(f"value and gradient, float32, {name}, torch {torch.__version__}, copies within: {fastest / 1e9:.0f} GB/s")
    for size in sizes:
        print(report(size, seconds, device, fastest), flush=True)


def arguments(words: list[str] | None = None) -> argparse.Namespace:
    """What was asked for on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each library and size")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--size", nargs=3, type=int, action="append", metavar=("T", "B", "K"), help="instead of those of the table"
    )
    parser.add_argument("--peers", nargs=3, type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


if __name__ == "__main__":
    options = arguments()
    if options.peers:
        serve_peers(tuple(options.peers), options.seconds, options.device)
    else:
        main(options.seconds, options.device, [tuple(s) for s in options.size] if options.size else SIZES)
