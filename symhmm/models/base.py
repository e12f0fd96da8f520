"""What the smaller models share: a program as text, made, compiled and fitted; and the start of a chain."""

import ast
import builtins
import inspect
import linecache
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, cast

import pyro
import torch
from torch import Tensor

from symhmm import distributions, fitting
from symhmm.compiler.density import Density, compile
from symhmm.errors import SpecError
from symhmm.fitting import Fit
from symhmm.tables.data import SequenceData

Program = Callable[..., None]
Start = dict[str, Tensor]
Initial = str | Sequence[float]
INITIAL = ("stationary", "uniform", "free")
IMPORTS = """\
import pyro
import pyro.distributions as dist
import torch
from pyro.ops.indexing import Vindex
from torch.distributions import constraints
"""


class Model(ABC):
    """A model without formulas, whose parameters start from the data.

    ``model.fit(data)`` fits it, ``model.log_density(data)`` compiles it, and ``model.program_source()`` is the Pyro program
    that both of them run, to be read, copied and changed.
    """

    @property
    @abstractmethod
    def program(self) -> Program:
        """The Pyro program; its arguments are those of `arguments`."""

    @abstractmethod
    def start(self, data: Any, seed: int = 0) -> Start:
        """Constrained starting values by name, from the data; ``seed`` is that of the clustering behind them."""

    def arguments(self, data: Any, start: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """What the program is called with."""
        return (data, start)

    def program_source(self) -> str:
        """The text of the program, with the imports that it needs."""
        return source(self.program)

    def log_density(self, data: Any, *, seed: int = 0, start: Mapping[str, Tensor] | None = None) -> Density:
        """The compiled log-density of the data, which starts from ``start`` or else from values of `start`.

        Raises:
            DataError, SpecError: the data do not suit the model; the text names the stream.
        """
        first = self.start(data, seed) if start is None else start
        return compile(self.program, *self.arguments(data, first))

    def fit(self, data: Any, *, method: str = "mle", seed: int = 0, **options: Any) -> Fit:
        """Fit the model; ``options`` are those of `symhmm.fit`. Raises like `log_density` and `symhmm.fit`."""
        return fitting.fit(self.log_density(data, seed=seed), method=method, seed=seed, **options)


@lru_cache(maxsize=256)
def made(text: str) -> Program:
    """The function ``program`` of a text, whose lines show in tracebacks. The same text gives the same function.

    >>> made("def program(data):\\n    raise KeyError(data)\\n").__name__
    'program'
    """
    name = f"<symhmm program {abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"__name__": "symhmm.models.program"}
    exec(builtins.compile(text, name, "exec"), space)
    program: Any = space["program"]
    program.text = text
    return cast(Program, program)


def source(program: Program) -> str:
    """The text of a program: as it was made, or from its file with the imports that it uses."""
    if text := getattr(program, "text", ""):
        return str(text)
    body = inspect.getsource(program)
    used = {n.id for n in ast.walk(ast.parse(body)) if isinstance(n, ast.Name)}
    lines = []
    for node in ast.parse(inspect.getsource(inspect.getmodule(program) or ast)).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            node.names = [a for a in node.names if (a.asname or a.name).split(".")[0] in used]
            lines += [ast.unparse(node)] if node.names else []
    return "\n".join(lines) + "\n\n\n" + body


def assembled(body: Sequence[str], arguments: str = "data, start") -> Program:
    """A program from the lines of its body, with the imports that it needs."""
    text = "".join(f"    {line}\n" if line else "\n" for line in body)
    lines = [IMPORTS]
    for module, names in (("symhmm.distributions", distributions.__all__), (__name__, ("sequence_plates",))):
        if used := sorted(n for n in names if re.search(rf"(?<![\w.]){n}\(", text)):
            lines.append(f"from {module} import {', '.join(used)}\n")
    imports = IMPORTS + ("\n" if len(lines) > 1 else "") + "".join(lines[1:])
    return made(f"{imports}\n\ndef program({arguments}):\n{text}")


@contextmanager
def sequence_plates(data: SequenceData) -> Iterator[None]:
    """The plates of sequences: ``individual`` in dimension -1, and ``session`` in dimension -2 where there are sessions."""
    with pyro.plate("individual", data.num_sequences, dim=-1):
        if data.mask.dim() == 3:
            with pyro.plate("session", data.num_sessions, dim=-2):
                yield
        else:
            yield


def first_state(initial: Initial, states: int) -> str:
    """The line that makes ``first``, the distribution of a chain's first state, shape (..., K).

    Args:
        initial: ``stationary`` (what the transition matrix keeps), ``uniform``, ``free`` (a parameter), or K probabilities.

    Raises:
        SpecError: anything else.

    >>> first_state("uniform", 2)
    'first = torch.full_like(transition[..., 0], 1 / 2)'
    """
    if initial == "stationary":
        return "first = stationary_distribution(transition)"
    if initial == "uniform":
        return f"first = torch.full_like(transition[..., 0], 1 / {states})"
    if initial == "free":
        return 'first = pyro.param("initial", start["initial"], constraints.simplex)'
    values = [] if isinstance(initial, str) else [float(p) for p in initial]
    if len(values) != states or min(values) < 0 or abs(sum(values) - 1) > 1e-9:
        raise SpecError(
            f"the initial state cannot be {initial!r}.",
            details=[f"wanted {', '.join(map(repr, INITIAL))}, or {states} probabilities that sum to 1"],
            suggestion="initial='stationary'",
        )
    return f"first = transition.new_tensor({values}).expand(transition.shape[:-1])"


def sticky(states: int, dtype: torch.dtype, stay: float = 0.8) -> Tensor:
    """Transition probabilities that stay with probability ``stay``, shape (K, K).

    >>> sticky(2, torch.float32)
    tensor([[0.8000, 0.2000],
            [0.2000, 0.8000]])
    """
    if states == 1:
        return torch.ones(1, 1, dtype=dtype)
    eye = torch.eye(states, dtype=dtype)
    return stay * eye + (1 - stay) / (states - 1) * (1 - eye)


def whole_number(name: str, value: Any, least: int) -> None:
    """Raise `SpecError` unless ``value`` is a whole number of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SpecError(f"{name}={value!r} is no whole number from {least} on.", suggestion=f"{name}={max(least, 2)}")


def as_data(data: Any) -> SequenceData:
    """``data`` itself. Raises `SpecError` for anything that is no `SequenceData`."""
    if not isinstance(data, SequenceData):
        raise SpecError(
            f"a {type(data).__name__} is not sequence data.",
            suggestion="SequenceData.from_frame(table, id=..., time=..., streams=[...]), or SequenceData.from_tensors",
        )
    return data
