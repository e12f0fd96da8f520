"""For tests of symhmm and of what is built on it: a brute-force oracle, and random factor graphs to compare on."""

from symhmm.testing.oracle import Cell, enumerate_joint, expand_factor, largest_joint
from symhmm.testing.random_graphs import random_graph, random_graphs

__all__ = ["Cell", "enumerate_joint", "expand_factor", "largest_joint", "random_graph", "random_graphs"]
