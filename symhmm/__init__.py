"""symhmm: hidden-state models with fixed and random effects, written as Pyro programs, summed out exactly, fitted fast."""

from typing import TYPE_CHECKING, Any

from symhmm.compiler.density import Density, compile
from symhmm.compiler.marginal import marginalize
from symhmm.fitting import Fit, fit, load
from symhmm.graph import FactorGraph
from symhmm.tables.data import SequenceData

if TYPE_CHECKING:
    from symhmm.models.mixed_hmm import MixedHMM

__all__ = ["Density", "FactorGraph", "Fit", "MixedHMM", "SequenceData", "compile", "fit", "load", "marginalize"]


def __getattr__(name: str) -> Any:
    """Models are a sixth of the time of importing all: they wait until one is asked for."""
    if name == "MixedHMM":
        from symhmm.models.mixed_hmm import MixedHMM

        return MixedHMM
    raise AttributeError(f"module 'symhmm' has no attribute {name!r}")
