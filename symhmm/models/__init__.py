"""Models for tables: each prints the ordinary Pyro program that it runs."""

from symhmm.models.continuous_time import ContinuousTimeHMM
from symhmm.models.gaussian import GaussianHMM
from symhmm.models.glm_hmm import GLMHMM
from symhmm.models.hmm import MixtureHMM, PoissonHMM
from symhmm.models.mixed_hmm import MixedHMM
from symhmm.models.mixture import LatentClass, Mixture
from symhmm.models.recapture import CormackJollySeber
from symhmm.models.regression import HierarchicalRegression, MixtureOfRegressions
from symhmm.models.semi_markov import SemiMarkovHMM

__all__ = [
    "GLMHMM",
    "ContinuousTimeHMM",
    "CormackJollySeber",
    "GaussianHMM",
    "HierarchicalRegression",
    "LatentClass",
    "MixedHMM",
    "Mixture",
    "MixtureHMM",
    "MixtureOfRegressions",
    "PoissonHMM",
    "SemiMarkovHMM",
]
