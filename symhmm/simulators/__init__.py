"""Data with a known truth for every model: individuals, sessions, covariates, gaps, missing values, unequal lengths."""

from symhmm.simulators.chains import simulate_continuous_time, simulate_hmm, simulate_semi_markov
from symhmm.simulators.groups import simulate_captures, simulate_mixture, simulate_regression
from symhmm.simulators.holes import Holes, Truth

__all__ = [
    "Holes",
    "Truth",
    "simulate_captures",
    "simulate_continuous_time",
    "simulate_hmm",
    "simulate_mixture",
    "simulate_regression",
    "simulate_semi_markov",
]
