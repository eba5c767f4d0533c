"""Training: one loop, two phases."""
