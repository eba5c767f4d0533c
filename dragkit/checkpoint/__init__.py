"""Checkpoints that are written whole or not at all, and which of them are kept."""
