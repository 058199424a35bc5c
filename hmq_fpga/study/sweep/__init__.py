"""A grid of runs."""
