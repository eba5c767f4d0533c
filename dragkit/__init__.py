"""Differentiable retrieval-augmented generation over knowledge graphs."""

__version__ = "0.1.0"
