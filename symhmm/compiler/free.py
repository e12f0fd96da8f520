"""Free values: what every density says of the values that it is a function of, read off its graph and its layout."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from symhmm.compiler.layout import Layout
from symhmm.compiler.roles import Roles, roles
from symhmm.graph import FactorGraph


class FreeValues(ABC):
    """Named, constrained values and the unconstrained vector that stands for them; shared by every kind of density."""

    @property
    @abstractmethod
    def graph(self) -> FactorGraph:
        """The factor graph, as captured."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """Names, shapes and places of the free values."""

    @property
    def size(self) -> int:
        """Length of the unconstrained vector."""
        return self.layout.size

    def roles(self) -> Roles:
        """What is fitted, what is summed out, what is observed; prints as a table."""
        return roles(self.graph, self.layout)

    def initial(self) -> dict[str, Tensor]:
        """Constrained starting values: each parameter's own, and for latents the prior mean where there is one."""
        start = {n: x.value for found in (self.graph.params, self.graph.latents) for n, x in found.items()}
        return {e.name: start[e.name] for e in self.layout.entries}

    def pack(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained vector, shape (size,), of constrained ``values``. Raises `ValuesError`."""
        return self.layout.pack(values)

    def unpack(self, vector: Tensor) -> dict[str, Tensor]:
        """Constrained values of an unconstrained vector; differentiable."""
        return self.layout.unpack(vector)
