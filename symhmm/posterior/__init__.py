"""Questions asked of a density at given values."""
