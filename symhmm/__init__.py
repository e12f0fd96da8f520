"""symhmm: hidden-state models with fixed and random effects, written as Pyro programs, summed out exactly, fitted fast."""

from symhmm.compiler.density import Density, compile
from symhmm.compiler.marginal import marginalize
from symhmm.fitting import Fit, fit
from symhmm.graph import FactorGraph

__all__ = ["Density", "FactorGraph", "Fit", "compile", "fit", "marginalize"]
