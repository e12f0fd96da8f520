"""symhmm: hidden-state models with fixed and random effects, written as Pyro programs, summed out exactly, fitted fast."""

from symhmm.compiler.density import Density, compile
from symhmm.compiler.marginal import marginalize
from symhmm.fitting import Fit, fit, load
from symhmm.graph import FactorGraph
from symhmm.models.mixed_hmm import MixedHMM
from symhmm.tables.data import SequenceData

__all__ = ["Density", "FactorGraph", "Fit", "MixedHMM", "SequenceData", "compile", "fit", "load", "marginalize"]
