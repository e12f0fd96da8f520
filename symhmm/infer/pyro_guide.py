"""Pyro's own guides: an autoguide or one written by hand, captured with its draws as inputs.

The guide runs under Pyro's handlers once for each step that is captured, never afterwards. Its random numbers are made of the
standard normal noise that the driver gives: what asks torch for normal, uniform or exponential numbers gets a share of it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.distributions import constraints, transform_to
from torch.distributions.constraints import Constraint
from torch.overrides import TorchFunctionMode

from symhmm.compiler.marginal import marginalize
from symhmm.errors import FitError
from symhmm.graph import FactorGraph
from symhmm.infer.guide import Block
from symhmm.infer.points import Points
from symhmm.infer.target import Target

MANY = 1001  # draws for medians and standard deviations


@dataclass(frozen=True, eq=False)
class Weights:
    """One tensor of free numbers of the guide: a ``pyro.param`` with its constraint, or a weight of a module."""

    name: str
    start: Tensor
    constraint: Constraint


@dataclass(frozen=True, eq=False)
class PyroGuide:
    """A Pyro guide as a function of plain numbers. ``phi`` is the steps of the points, then the guide's own weights.

    Args:
        origin: shape (size,), the start.
        points: the program's parameters.
        call: the guide, run on its arguments.
        latents: names of the continuous latents that it draws, with their slice of the vector and their transform.
        weights: its free numbers.
        noise_size: standard normal numbers that one draw takes.
    """

    origin: Tensor
    points: Points
    call: Callable[[], Any]
    module: nn.Module | None
    goal: Target
    weights: tuple[Weights, ...]
    noise_size: int
    blocks: tuple[Block, ...] = ()

    @property
    def size(self) -> int:
        """Length of ``phi``."""
        return self.points.size + sum(w.start.numel() for w in self.weights)

    def initial(self) -> Tensor:
        """The start, shape (size,)."""
        return torch.cat([self.origin.new_zeros(self.points.size), *(w.start.reshape(-1) for w in self.weights)])

    def draw_with_density(self, phi: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """A vector, shape (density size,), and the log-density of its latents on their natural scale, nats."""
        pieces = phi[self.points.size :].split([w.start.numel() for w in self.weights])
        own = {
            w.name: transform_to(w.constraint)(x.reshape(w.start.shape))
            for w, x in zip(self.weights, pieces, strict=True)
        }
        # Checks of arguments read values, which a trace cannot; they were made when the guide first ran.
        with _alone(), pyro.validation_enabled(False), _Noise(noise):
            trace = _run(self.call, self.module, own)
            log_q = torch.stack([_log_prob(node) for node in _samples(trace).values()]).sum()
        vector = self.origin.index_put((self.points.index,), self.points(phi))
        for e in (e for e in self.goal.entries if not e.is_param):
            free = e.transform.inv(trace.nodes[e.name]["value"]).reshape(-1)
            vector = torch.cat([vector[: e.start], free.to(vector.dtype), vector[e.stop :]])
        return vector, log_q

    def posterior(self, phi: Tensor) -> "PyroPosterior":
        """The guide at ``phi`` as a result."""
        return PyroPosterior(self, phi)


@dataclass(frozen=True, eq=False)
class PyroPosterior:
    """A posterior that a Pyro guide draws."""

    guide: PyroGuide
    phi: Tensor
    source: Tensor | None = None
    blocks: tuple[()] = ()

    @cached_property
    def vector(self) -> Tensor:
        """Medians of many draws, and the points, shape (size,)."""
        return self.sample(MANY).median(0).values

    @cached_property
    def sd(self) -> Tensor:
        """Standard deviation of each unconstrained coordinate over many draws, shape (size,)."""
        return self.sample(MANY).std(0)

    def sample(self, draws: int, seed: int = 0) -> Tensor:
        """Unconstrained vectors, shape (draws, size); the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(draws, self.guide.noise_size, generator=generator, dtype=self.phi.dtype)
        goal = self.guide.goal
        with torch.no_grad():
            replay = goal.captured(f"draw {len(goal._steps)}", self.guide.draw_with_density, (self.phi, noise[0]))
            out = torch.stack([replay(self.phi, e)[0] for e in noise])
        return out if self.source is None else out[:, self.source]

    def permuted(self, source: Tensor) -> "PyroPosterior":
        """The same posterior with coordinate ``source[i]`` as number i."""
        return PyroPosterior(self.guide, self.phi, source if self.source is None else self.source[source])


def pyro_guide(asked: Callable[..., Any], goal: Target, points: Points, seed: int) -> PyroGuide:
    """A Pyro guide, or a class of autoguides, for the latents of ``goal``.

    Raises:
        FitError: it leaves a latent out, draws one without a gradient, or needs random numbers of another kind.
    """
    density = goal.density
    args, kwargs = density.arguments.rebuild(density.data[: len(density.arguments.tensors)])
    if inspect.isclass(asked) and issubclass(asked, AutoGuide):
        if isinstance(density.program, FactorGraph):
            raise FitError(
                "an autoguide needs a program, and this density was made of a graph.", suggestion="guide='full'"
            )
        asked = asked(marginalize(density.program))
    module = asked if isinstance(asked, nn.Module) else None

    def call() -> Any:
        return asked(*args, **kwargs)

    counter = _Noise(None)
    with _alone(), torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        _run(call, module, {})  # an autoguide looks at its model first
        with counter:
            trace = _run(call, module, {})
        store = pyro.get_param_store()
        found = [
            Weights(n, transform_to(c).inv(v.detach()).to(goal.start.dtype), c)
            for n, v, c in ((n, store[n], store._constraints[n]) for n in _params(trace))
        ]
    if module is not None:
        found = [Weights(n, p.detach().to(goal.start.dtype), constraints.real) for n, p in module.named_parameters()]
    sites = _samples(trace)
    wanted = [e.name for e in goal.entries if not e.is_param]
    if missing := [n for n in wanted if n not in sites]:
        raise FitError(
            f"the guide does not draw {missing[0]!r}.",
            details=[f"continuous latents: {', '.join(wanted)}", f"the guide draws: {', '.join(sites) or 'nothing'}"],
        )
    for name, node in sites.items():
        if not getattr(node["fn"], "has_rsample", False) or node["fn"].support is constraints.boolean:
            raise FitError(
                f"the guide draws {name!r} in a way that has no gradient.",
                details=[f"its distribution is {type(node['fn']).__name__}"],
                suggestion="a normal distribution, transformed to the support of the latent",
            )
    return PyroGuide(goal.start, points, call, module, goal, tuple(found), counter.used)


def _params(trace: Any) -> list[str]:
    return [n for n, node in trace.nodes.items() if node["type"] == "param"]


def _samples(trace: Any) -> dict[str, Any]:
    nodes = {n: node for n, node in trace.nodes.items() if node["type"] == "sample"}
    return {n: node for n, node in nodes.items() if type(node["fn"]).__name__ != "_Subsample"}


def _log_prob(node: Mapping[str, Any]) -> Tensor:
    total: Tensor = scale_and_mask(node["fn"].log_prob(node["value"]), node["scale"], node["mask"])
    return total.sum()


def _run(call: Callable[[], Any], module: nn.Module | None, weights: Mapping[str, Tensor]) -> Any:
    """A trace of the guide with its weights replaced."""
    if not weights:
        return poutine.trace(call).get_trace()
    if module is None:
        return poutine.trace(poutine.substitute(call, data=dict(weights))).get_trace()
    with nn.utils.stateless._reparametrize_module(module, dict(weights)):
        return poutine.trace(call).get_trace()


@contextmanager
def _alone() -> Iterator[None]:
    """Pyro's parameters are afterwards what they were."""
    with pyro.get_param_store().scope():
        yield


class _Noise(TorchFunctionMode):
    """Gives what asks for random numbers its share of a vector of standard normal ones; counts where there is none."""

    def __init__(self, given: Tensor | None) -> None:
        super().__init__()
        self.given, self.used = given, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_:
            given = dict(zip(("mean", "std"), args[1:], strict=False)) | kwargs
            return given.get("mean", 0.0) + given.get("std", 1.0) * self._take(args[0].shape, args[0].dtype)
        if func is torch.normal and isinstance(args[0], Tensor):
            return args[0] + args[1] * self._take(args[0].shape, args[0].dtype)
        if func in (torch.randn_like, torch.rand_like):
            e = self._take(args[0].shape, args[0].dtype)
            return e if func is torch.randn_like else torch.special.ndtr(e)
        if func in (torch.randn, torch.rand):
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            e = self._take(torch.Size(shape), kwargs.get("dtype") or torch.get_default_dtype())
            return e if func is torch.randn else torch.special.ndtr(e)
        if func is torch.Tensor.uniform_:
            given = {"from": 0.0, "to": 1.0} | dict(zip(("from", "to"), args[1:], strict=False)) | kwargs
            return given["from"] + (given["to"] - given["from"]) * torch.special.ndtr(
                self._take(args[0].shape, args[0].dtype)
            )
        if func is torch.Tensor.exponential_:
            return -torch.special.log_ndtr(self._take(args[0].shape, args[0].dtype))
        return func(*args, **kwargs)

    def _take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        n = prod(shape)
        self.used += n
        if self.given is None:
            return torch.zeros(shape, dtype=dtype)
        return self.given[self.used - n : self.used].reshape(shape).to(dtype)
