"""Our own forward of Nemotron-H: the library's parameters, over packs without padding."""

from __future__ import annotations

from dragkit.generator.nemotron_h.backends import MambaOps, mamba_ops
from dragkit.generator.nemotron_h.compiled import CompiledBlocks
from dragkit.generator.nemotron_h.decoder import RECOMPUTED, after, computes, hidden_at_rows
from dragkit.generator.nemotron_h.decoding import prefill, prefill_in_passes, step
from dragkit.generator.nemotron_h.pack import Pack, make_pack, pad_to_multiple, split_by_tokens

__all__ = [
    "RECOMPUTED",
    "CompiledBlocks",
    "MambaOps",
    "Pack",
    "after",
    "computes",
    "hidden_at_rows",
    "make_pack",
    "mamba_ops",
    "pad_to_multiple",
    "prefill",
    "prefill_in_passes",
    "split_by_tokens",
    "step",
]
