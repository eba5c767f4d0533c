"""The self-test: it plants faults around real runs, and writes what survived onto one page."""
