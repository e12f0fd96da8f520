"""Models for tables: each prints the ordinary Pyro program that it runs."""
