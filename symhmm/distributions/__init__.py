"""Distributions that hidden Markov models need and Pyro lacks or approximates, and the transition matrices of a chain."""

from symhmm.distributions.atoms import Hurdle, ZeroInflated, ZeroOneInflated
from symhmm.distributions.chain import (
    dwell_chain,
    generator_matrix,
    stationary_distribution,
    stationary_of_generator,
    transition_after,
    with_zero_diagonal,
)
from symhmm.distributions.circular import VonMises, WrappedCauchy
from symhmm.distributions.counts import NegativeBinomialMean
from symhmm.distributions.positive import GammaMeanSd, TruncatedNormal
from symhmm.distributions.unit import Beta, BetaMeanPrecision
from symhmm.distributions.vectors import PartlyObservedNormal

__all__ = [
    "Beta",
    "BetaMeanPrecision",
    "GammaMeanSd",
    "Hurdle",
    "NegativeBinomialMean",
    "PartlyObservedNormal",
    "TruncatedNormal",
    "VonMises",
    "WrappedCauchy",
    "ZeroInflated",
    "ZeroOneInflated",
    "dwell_chain",
    "generator_matrix",
    "stationary_distribution",
    "stationary_of_generator",
    "transition_after",
    "with_zero_diagonal",
]
