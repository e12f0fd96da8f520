"""Capture: run a Pyro program a few times and write down its log-density as a factor graph."""
