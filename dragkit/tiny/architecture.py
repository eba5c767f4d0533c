"""The network of the shipped generator: an ordinary Nemotron-H, only small."""

from __future__ import annotations

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.tiny.tokenizer import MAX_TOKENS

# Two Mamba blocks in front find "the token after this one" in half the steps of a single one.
PATTERN = "MM*-M*-"
HIDDEN = 96
HEADS = 4
STATE = 16
MAMBA_HEAD_WIDTH = 32
# Chunks of 32 tokens are the fastest on a CPU; the size changes no result.
CHUNK = 32
# Larger than transformers' 0.02: copying starts later, but the right fact is chosen more often.
INITIAL_STD = 0.1
STEP_FLOOR = 1e-9


def tiny_config(vocab_size: int) -> NemotronHConfig:
    """The configuration; ids 0, 1, 2 are pad, begin and end."""
    return NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN,
        hybrid_override_pattern=PATTERN,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        intermediate_size=2 * HIDDEN,
        ssm_state_size=STATE,
        mamba_num_heads=HIDDEN // MAMBA_HEAD_WIDTH,
        mamba_head_dim=MAMBA_HEAD_WIDTH,
        n_groups=1,
        chunk_size=CHUNK,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INITIAL_STD,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def new_model(vocab_size: int, seed: int) -> NemotronHForCausalLM:
    """A freshly initialised model in float32."""
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(tiny_config(vocab_size))
    # The library floors step sizes at `time_step_min` in one path and not in the other. Without a
    # floor worth the name both paths, and any loader, compute the same.
    model.config.time_step_min = STEP_FLOOR
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (STEP_FLOOR, float("inf"))
    return model
