"""Benchmarks: timed comparisons of this package with what it replaces. Not installed."""
