"""Experiments: tasks, runs, reports; may import everything."""
