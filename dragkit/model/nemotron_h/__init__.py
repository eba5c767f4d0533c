"""Our own training forward of Nemotron-H on a CPU: the library's parameters, fewer passes."""

from __future__ import annotations

from dragkit.model.nemotron_h.decoder import computes, hidden_at_rows

__all__ = ["computes", "hidden_at_rows"]
