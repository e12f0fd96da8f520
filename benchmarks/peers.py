"""One Gaussian hidden Markov model in every library that can state it: value and gradient, paired in one run.

B sequences of T steps, K states, one transition matrix, uniform start; the gradient is with respect to transition logits,
means and log standard deviations, in float32. The values agree (pomegranate counts a uniform end as well). hmmlearn and
pomegranate have no gradient: theirs is one EM step, which needs the same two passes over the data. Libraries that are not
installed are left out. Run as

    python -m benchmarks.peers --seconds 2
"""

import argparse
import atexit
import importlib.util
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

import symhmm

SIZES = [(1800, 20, 3), (1000, 1, 5), (500, 100, 16), (1000, 64, 64), (200_000, 1, 4)]
MOST = 3000  # steps of a Python loop for each gradient; longer ones would take minutes
Step = Callable[[], float]


class Data:
    """Observations (T, B), with an identity of their own for the cache of compiled programs."""

    def __init__(self, length: int, batch: int, states: int) -> None:
        generator = np.random.default_rng(0)
        self.y = torch.from_numpy(generator.normal(0, 2, (length, batch)).astype(np.float32))
        self.loc = torch.linspace(-3, 3, states)
        self.states = states


def program(data: Data) -> None:
    """The model as a Pyro program with a plain loop."""
    states = data.states
    matrix = pyro.param("matrix", lambda: torch.full((states, states), 1 / states), constraints.simplex)
    loc = pyro.param("loc", lambda: data.loc.clone())
    scale = pyro.param("scale", lambda: torch.ones(states), constraints.positive)
    z = None
    with pyro.plate("sequence", data.y.shape[1], dim=-1):
        for t in pyro.markov(range(data.y.shape[0])):
            weights = torch.full((states,), 1 / states) if z is None else matrix[z]
            z = pyro.sample(f"z_{t}", dist.Categorical(weights))
            pyro.sample(f"y_{t}", dist.Normal(loc[z], scale[z]), obs=data.y[t])


def ours(data: Data) -> Step:
    """symhmm: the program above, compiled."""
    density = symhmm.compile(program, data)
    vector = density.pack(density.initial()).detach()
    return lambda: density.value_and_grad(vector)[0].item()


def free(states: int, loc: Tensor) -> tuple[Tensor, ...]:
    """Unconstrained values at which all are evaluated."""
    return tuple(x.requires_grad_() for x in (torch.zeros(states, states), loc.clone(), torch.zeros(states)))


def dynamax(data: Data, parallel: bool = False) -> Step:
    """Dynamax's filter, jitted; the parallel one is a scan over steps."""
    import jax
    import jax.numpy as jnp
    from dynamax.hidden_markov_model import inference, parallel_inference

    run = parallel_inference.hmm_filter if parallel else inference.hmm_filter
    states = data.states
    y = jnp.asarray(data.y.T.numpy())

    def value(logits: object, loc: object, log_scale: object) -> object:
        terms = jax.scipy.stats.norm.logpdf(y[..., None], loc, jnp.exp(log_scale))
        start, matrix = jnp.full(states, 1 / states), jax.nn.softmax(logits, -1)
        return jax.vmap(lambda e: run(start, matrix, e).marginal_loglik)(terms).sum()

    step = jax.jit(jax.value_and_grad(value, (0, 1, 2)))
    arguments = jnp.zeros((states, states)), jnp.asarray(data.loc.numpy()), jnp.zeros(states)
    return lambda: float(jax.block_until_ready(step(*arguments))[0])


def numpyro(data: Data) -> Step:
    """NumPyro's scan with enumeration, jitted, in a process of its own: funsor serves one backend at a time."""
    length, batch = data.y.shape
    command = [sys.executable, "-m", "benchmarks.peers", "--numpyro", str(length), str(batch), str(data.states)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(child.kill)
    assert child.stdin and child.stdout
    ask, answer = child.stdin, child.stdout

    def step() -> float:
        print(file=ask, flush=True)
        return float(answer.readline())

    return step


def serve_numpyro(length: int, batch: int, states: int) -> None:
    """One value and gradient for each line read."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as nd
    from numpyro.contrib.control_flow import scan
    from numpyro.contrib.funsor import config_enumerate, enum, log_density

    warnings.filterwarnings("ignore")
    data = Data(length, batch, states)
    y = jnp.asarray(data.y.numpy())

    def model(logits: object, loc: object, log_scale: object) -> None:
        matrix = jax.nn.softmax(logits, -1)
        start = jnp.full(states, 1 / states)

        def body(z: object, now: object) -> tuple[object, None]:
            with numpyro.plate("sequence", batch, dim=-1):
                z = numpyro.sample("z", nd.Categorical(start if z is None else matrix[z]))
                numpyro.sample("y", nd.Normal(loc[z], jnp.exp(log_scale)[z]), obs=now)
            return z, None

        scan(body, None, y)

    enumerated = enum(config_enumerate(model), -2)
    step = jax.jit(jax.value_and_grad(lambda *v: log_density(enumerated, v, {}, {})[0], (0, 1, 2)))
    arguments = jnp.zeros((states, states)), jnp.asarray(data.loc.numpy()), jnp.zeros(states)
    for _ in sys.stdin:
        print(float(jax.block_until_ready(step(*arguments))[0]), flush=True)


def pyro_loop(data: Data) -> Step:
    """Pyro's own elimination of the same program."""
    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)
    model = pyro.infer.config_enumerate(program)

    def step() -> float:
        loss = elbo.differentiable_loss(model, lambda data: None, data)
        loss.backward()
        return -loss.item()

    return step


def pyro_discrete_hmm(data: Data) -> Step:
    """Pyro's distribution of whole sequences, a parallel scan."""
    states = data.states
    values = free(states, data.loc)
    y = data.y.T[..., None]

    def step() -> float:
        logits, loc, log_scale = values
        emission = dist.Normal(loc, log_scale.exp())
        start = torch.full((states,), 1 / states).log()
        hmm = dist.DiscreteHMM(start, logits.log_softmax(-1), emission, duration=y.shape[1])
        total = hmm.log_prob(y[..., 0]).sum()
        torch.autograd.grad(total, values)
        return total.item()

    return step


def funsor_scan(data: Data) -> Step:
    """funsor's parallel elimination of one axis, written by hand."""
    import funsor
    from funsor import ops
    from funsor.sum_product import sequential_sum_product

    funsor.set_backend("torch")
    states, (length, batch) = data.states, data.y.shape
    values = free(states, data.loc)
    sizes = funsor.Bint[states]

    def step() -> float:
        logits, loc, log_scale = values
        terms = dist.Normal(loc, log_scale.exp()).log_prob(data.y[..., None])
        matrix = logits.log_softmax(-1).expand(length - 1, batch, states, states) + terms[1:, :, None]
        names = {"time": funsor.Bint[length - 1], "sequence": funsor.Bint[batch], "before": sizes, "now": sizes}
        chain = funsor.Tensor(matrix, names)
        product = sequential_sum_product(
            ops.logaddexp, ops.add, chain, funsor.Variable("time", names["time"]), {"before": "now"}
        )
        first = funsor.Tensor(terms[0] - np.log(states), {"sequence": names["sequence"], "before": sizes})
        total = (first + product).reduce(ops.logaddexp, frozenset({"before", "now"})).reduce(ops.add, "sequence").data
        torch.autograd.grad(total, values)
        return total.item()

    return step


def hmmlearn_em(data: Data) -> Step:
    """One EM step of hmmlearn, without its own checks of convergence."""
    from hmmlearn.hmm import GaussianHMM

    states, (length, batch) = data.states, data.y.shape
    x = np.ascontiguousarray(data.y.T.numpy().reshape(-1, 1).astype(np.float64))

    def step() -> float:
        model = GaussianHMM(states, n_iter=1, init_params="", params="tmc")
        model.startprob_, model.transmat_ = np.full(states, 1 / states), np.full((states, states), 1 / states)
        model.means_, model.covars_ = data.loc.numpy()[:, None].astype(np.float64), np.ones((states, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.fit(x, [length] * batch)
        return float(model.monitor_.history[0])

    return step


def pomegranate_em(data: Data) -> Step:
    """One EM step of pomegranate."""
    from pomegranate.distributions import Normal
    from pomegranate.hmm import DenseHMM

    states = data.states
    x = data.y.T[..., None].contiguous()
    emissions = [Normal(data.loc[k : k + 1], torch.ones(1), covariance_type="diag") for k in range(states)]
    matrix = torch.full((states, states), 1 / states)
    model = DenseHMM(emissions, edges=matrix, starts=torch.full((states,), 1 / states))

    def step() -> float:
        with torch.no_grad():
            return float(model.summarize(x).sum())

    return step


PEERS: dict[str, tuple[Callable[[Data], Step], tuple[str, ...]]] = {
    "symhmm": (ours, ()),
    "Dynamax": (dynamax, ("jax", "dynamax")),
    "Dynamax, parallel": (lambda data: dynamax(data, parallel=True), ("jax", "dynamax")),
    "NumPyro, scan": (numpyro, ("jax", "numpyro")),
    "Pyro, loop": (pyro_loop, ()),
    "Pyro, DiscreteHMM": (pyro_discrete_hmm, ()),
    "funsor, scan": (funsor_scan, ()),
    "hmmlearn, EM step": (hmmlearn_em, ("hmmlearn",)),
    "pomegranate, EM step": (pomegranate_em, ("pomegranate",)),
}
CUBIC = ("Dynamax, parallel", "Pyro, DiscreteHMM", "funsor, scan")  # their work and memory grow with K^3


def too_much(name: str, length: int, batch: int, states: int) -> str:
    """Why a peer is not asked for a size; empty where it is."""
    if name == "Pyro, loop" and length > MOST:
        return "a loop of minutes"
    if name in CUBIC and length * batch * states**3 > 4e8:
        return "matrices of all steps do not fit"
    return ""


def compare(steps: dict[str, Step], seconds: float) -> dict[str, list[float]]:
    """Milliseconds of every step, one after the other, again and again; slow ones at least twice."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times["symhmm"]) < 2:
        for name, step in steps.items():
            if times[name] and sum(times[name]) > seconds * 1e3:
                continue  # has had its share
            start = time.perf_counter()
            step()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def main(seconds: float, threads: int, sizes: list[tuple[int, int, int]]) -> None:
    """Print one block for each size: milliseconds, times of symhmm, and the value that each finds."""
    torch.set_num_threads(threads)
    print(f"Gaussian HMM, value and gradient, float32, {threads} threads, load {os.getloadavg()[0]:.1f}: medians")
    for length, batch, states in sizes:
        print(f"\nT = {length}, B = {batch}, K = {states}\n{'':24}{'ratio':>9}{'ms':>12}{'log-likelihood':>18}")
        data = Data(length, batch, states)
        steps, left = {}, {}
        for name, (make, needs) in PEERS.items():
            missing = [n for n in needs if not importlib.util.find_spec(n)]
            left[name] = f"not installed: {', '.join(missing)}" if missing else too_much(name, length, batch, states)
            if not left[name]:
                steps[name] = make(data)
        values = {name: step() for name, step in steps.items()}
        times = compare(steps, seconds)
        mine = statistics.median(times["symhmm"])
        for name in PEERS:
            if left[name]:
                print(f"{name:24}{'-':>9}{'':>12}   {left[name]}")
                continue
            took = statistics.median(times[name])
            print(f"{name:24}{took / mine:9.1f}{took:12.3f}{values[name]:18.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="for each library and size")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--size", nargs=3, type=int, action="append", metavar=("T", "B", "K"), help="instead of five sizes"
    )
    parser.add_argument("--numpyro", nargs=3, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.numpyro:
        serve_numpyro(*options.numpyro)
        raise SystemExit
    main(options.seconds, options.threads, [tuple(s) for s in options.size] if options.size else SIZES)
