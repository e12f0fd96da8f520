"""From a factor graph to a density: plan, lower, trace."""
