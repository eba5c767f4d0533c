"""Looking at a run: throughput, profiling ranges, GPU state."""
