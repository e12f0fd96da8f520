"""Open captures: Pyro's own handlers around the call answer parameters and continuous latents."""

from typing import Any

from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from pyro.poutine.runtime import _PYRO_STACK

from symhmm.capture.giving import Giver
from symhmm.capture.sites import SiteMessenger
from symhmm.capture.time_index import NotVectorisable


def outer_plates() -> dict[str, int]:
    """Plates that are open around the call, by name, with their dimensions (particles, parallel predictions)."""
    return {f.name: f.dim for f in _outer_frames() if f.dim is not None}


class OpenSiteMessenger(SiteMessenger):
    """Records discrete, observed and factor sites and hides them from the handlers outside; leaves the others alone.

    Parameters and continuous latents are answered by the handlers outside, as in any Pyro program, and leave no factor
    here. What is recorded stands in the plates outside, too.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.giver = _Outside(self.position, self.tracker, self.inputs, self.result)
        self.outside = _outer_frames()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        super()._pyro_sample(msg)
        if type(msg["fn"]).__name__ != "_Subsample" and msg["name"] not in self.given:
            msg["cond_indep_stack"] = (*self.outside, *msg["cond_indep_stack"])
            msg["stop"] = True

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.given:
            super()._pyro_post_sample(msg)


class _Outside(Giver):
    """Gives nothing: the handlers outside do."""

    def param(self, msg: dict[str, Any]) -> None:
        pass

    def subsample(self, msg: dict[str, Any]) -> None:
        pass

    def latent(self, msg: dict[str, Any], nesting: int) -> None:
        if self.result.names.of(msg["name"]):
            raise NotVectorisable(f"continuous latent {msg['name']!r} is one statement for each step")


def _outer_frames() -> tuple[CondIndepStackFrame, ...]:
    """Outermost last, as Pyro orders them. A subsample outside is scaled outside."""
    plates = [h for h in _PYRO_STACK if isinstance(h, IndepMessenger) and h.dim is not None]
    return tuple(CondIndepStackFrame(h.name, h.dim, h.size, 0, h.size) for h in reversed(plates))
