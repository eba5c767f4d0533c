"""Checkpoints: atomic writes, manifests with hashes, retention, and the lock of a run."""
