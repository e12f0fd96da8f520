"""What one run of the program leaves behind: a record per site, in names that may hold tokens."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from symhmm.capture.loops import Loop
from symhmm.capture.names import Names
from symhmm.graph import Latent, Param, Plate, Role

Steps = tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class Record:
    """One log-factor.

    Args:
        name: of the site; tokens stand for what differs between the steps of vectorised loops.
        role: of the site.
        tensor: log-factor in nats, one dimension per entry of ``dims``.
        dims: keys of loops, names of discrete sites and plates.
        plates: vectorised plates in which the site stands.
        axes: keys of the vectorised loops in which it stands.
        steps: the step of each loop in which it stands: (loop, init | prev | curr | concrete, step or lag).
        scale: weight set by `poutine.scale`.
        support: values that a discrete latent takes, shape (size, *event).
        observed: shape of an observed value and family of its distribution.
    """

    name: str
    role: Role
    tensor: Tensor
    dims: tuple[str, ...]
    plates: tuple[str, ...]
    axes: tuple[str, ...]
    steps: Steps
    scale: float = 1.0
    support: Tensor | None = None
    observed: tuple[tuple[int, ...], str] | None = None

    @property
    def helper(self) -> bool:
        """Whether it belongs to a pass that only prepares the state of the next one; it is no factor of the model."""
        return any(role == "prev" for _, role, _ in self.steps)


@dataclass
class Result:
    """Everything one run found; `names` resolves the tokens in it."""

    names: Names
    loops: Mapping[str, Loop]
    records: dict[str, Record] = field(default_factory=dict)
    plates: dict[str, Plate] = field(default_factory=dict)
    params: dict[str, Param] = field(default_factory=dict)
    latents: dict[str, Latent] = field(default_factory=dict)
    subsamples: dict[str, Tensor] = field(default_factory=dict)
    deterministic: dict[str, Any] = field(default_factory=dict)

    def vectorised(self) -> list[Loop]:
        """Loops that became an axis of the graph."""
        return [loop for loop in self.loops.values() if loop.vector and not loop.helper]
