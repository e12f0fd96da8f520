"""Discrete latents are summed out: each gets a tensor dimension of its own while it is in sight."""

from typing import Any

import torch
from torch import Tensor

from symhmm.capture.marks import Mark, set_mark
from symhmm.capture.time_index import NotVectorisable
from symhmm.capture.tracking import Position, Tracker
from symhmm.errors import ProgramError


class Enumeration:
    """Hands out dimensions to the left of the plates, and says later which site a dimension belongs to.

    Dimensions are used again when a site is out of sight of `pyro.markov`. That a tensor still depends on a site that
    is out of sight is known from its mark, so such a dimension is never mistaken for that of another site.

    Args:
        nesting: number of rightmost dimensions that belong to plates.
        tracker: knows which sites a tensor was computed from.
        position: where the program is.
    """

    def __init__(self, nesting: int, tracker: Tracker, position: Position) -> None:
        self.nesting, self.tracker, self.position = nesting, tracker, position
        self.dims: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.supports: dict[str, Tensor] = {}
        self.steps: dict[str, tuple[tuple[str, str, int], ...]] = {}
        self._depths: dict[str, int] = {}
        self._global: set[str] = set()

    def enter(self, msg: dict[str, Any]) -> None:
        """Note how deep in `pyro.markov` contexts a site stands, as Pyro does."""
        depth = msg["infer"].get("_markov_depth")
        if depth is None:
            self._global.add(msg["name"])
        else:
            self._depths[msg["name"]] = depth

    def in_sight(self, msg: dict[str, Any]) -> set[str]:
        """Discrete sites that a site may depend on."""
        scope = msg["infer"].get("_markov_scope") or {}
        near = {name for name, depth in scope.items() if self._depths.get(name) == depth}
        return {name for name in near | self._global if name in self.dims}

    def enumerate(self, msg: dict[str, Any]) -> None:
        """Give a discrete latent all its values, along a dimension that no site in sight uses."""
        fn, name = msg["fn"], msg["name"]
        with torch._C.DisableTorchFunction():
            parents = self.tracker.union(*_parameters(fn)).sites
        taken = {self.dims[site] for site in (self.in_sight(msg) | parents) - {name}}
        dim = -1 - self.nesting
        while dim in taken:
            dim -= 1
        try:
            values = fn.enumerate_support(expand=False)
        except NotImplementedError as error:
            raise ProgramError(
                f"discrete latent {name!r} cannot be summed out.",
                details=[f"{type(fn).__name__}: {error}"],
                suggestion="the same number of values for all members",
            ) from error
        with torch._C.DisableTorchFunction():
            event = values.shape[values.dim() - fn.event_dim :] if fn.event_dim else values.shape[:0]
            value = values.reshape(values.shape[:1] + (1,) * (-1 - dim) + event)
            alike = getattr(values, "_pyro_categorical_support", None)
            if alike is not None:
                value._pyro_categorical_support = alike  # lets Pyro read the logits instead of gathering them
            self.dims[name], self.sizes[name] = dim, values.shape[0]
            self.supports[name] = values.reshape(values.shape[:1] + event)
        self.steps[name] = tuple(self.position.steps)
        set_mark(value, Mark(self.tracker.run, sites=frozenset({name})))
        msg["value"], msg["done"] = value, True
        msg["infer"]["_enumerate_dim"] = dim

    def sites_of(self, tensor: Tensor, reader: str) -> frozenset[str]:
        """Discrete sites that the log-factor of site ``reader`` was computed from."""
        own = frozenset({reader}) if reader in self.dims else frozenset()
        return self.tracker.mark(tensor).sites | own

    def name_of(self, dim: int, size: int, msg: dict[str, Any], tensor: Tensor) -> str | None:
        """The discrete site whose values lie along dimension ``dim`` of a log-factor; None if there is none.

        Raises:
            ProgramError: the log-factor was computed from several sites that share the dimension.
        """
        reader = msg["name"]
        here = {s for s in self.sites_of(tensor, reader) if self.dims[s] == dim and self.sizes[s] == size}
        seen = self.in_sight(msg)
        found = here or {s for s in seen if self.dims[s] == dim and self.sizes[s] == size}
        if not found:
            return None
        if len(found) > 1:
            if self.position.levels:
                raise NotVectorisable(f"site {reader!r} reads states that share a dimension")
            stale = sorted(found - seen - {reader}) or sorted(found - {reader})
            raise ProgramError(
                f"site {reader!r} reads discrete latent {stale[0]!r}, which is out of its sight.",
                details=[f"they share a dimension with {', '.join(map(repr, sorted(found - {stale[0]})))}"],
                suggestion="a larger history in pyro.markov(..., history=), or do not read states after their loop",
            )
        (site,) = found
        roles = {loop: role for loop, role, _ in self.position.steps}
        for loop, role, _ in self.steps[site]:
            if role in ("prev", "curr") and loop not in roles:
                raise NotVectorisable(f"site {reader!r} reads discrete latent {site!r} after its loop")
            if role == "init" and roles.get(loop, "curr") == "curr":
                raise NotVectorisable(
                    f"site {reader!r} reads discrete latent {site!r} from further back or after its loop"
                )
        return site


def _parameters(fn: Any) -> list[Tensor]:
    """The tensors that a distribution was made from, through wrappers."""
    found = []
    for value in vars(fn).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif hasattr(value, "log_prob"):
            found += _parameters(value)
    return found
