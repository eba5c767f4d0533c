"""Our forward of Nemotron-H: the parameters of transformers, over packs without padding."""

from __future__ import annotations

from dragkit.generator.nemotron_h.backends import MambaOps, mamba_ops
from dragkit.generator.nemotron_h.compiled import CompiledBlocks
from dragkit.generator.nemotron_h.decoder import (
    ACTIVATION_CHECKPOINTING,
    block_forward,
    hidden_at_rows,
    is_supported,
)
from dragkit.generator.nemotron_h.decoding import decode_step, prefill, prefill_in_microbatches
from dragkit.generator.nemotron_h.pack import Pack, make_pack, pad_to_multiple, split_by_tokens

__all__ = [
    "ACTIVATION_CHECKPOINTING",
    "CompiledBlocks",
    "MambaOps",
    "Pack",
    "block_forward",
    "decode_step",
    "hidden_at_rows",
    "is_supported",
    "make_pack",
    "mamba_ops",
    "pad_to_multiple",
    "prefill",
    "prefill_in_microbatches",
    "split_by_tokens",
]
