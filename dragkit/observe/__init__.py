"""Observation of a run: throughput, profiling ranges, GPU state."""
