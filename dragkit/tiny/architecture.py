"""The network of the bundled generator: a small Nemotron-H."""

from __future__ import annotations

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.tiny.tokenizer import MAX_TOKENS

# Two Mamba blocks come first. Copying "the token after this one" then takes half as many training
# steps as with one.
PATTERN = "MM*-M*-"
HIDDEN_SIZE = 96
NUM_HEADS = 4
SSM_STATE_SIZE = 16
MAMBA_HEAD_DIM = 32
# Chunks of 32 tokens are the fastest on a CPU. The size does not change the result.
CHUNK_SIZE = 32
# With transformers' 0.02 copying starts earlier, but the right fact is chosen less often.
INITIALIZER_RANGE = 0.1
TIME_STEP_MIN = 1e-9


def tiny_config(vocab_size: int) -> NemotronHConfig:
    """The model's configuration. Ids 0, 1 and 2 are pad, begin and end."""
    return NemotronHConfig(
        vocab_size=vocab_size,
        hidden_size=HIDDEN_SIZE,
        hybrid_override_pattern=PATTERN,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_HEADS,
        head_dim=HIDDEN_SIZE // NUM_HEADS,
        intermediate_size=2 * HIDDEN_SIZE,
        ssm_state_size=SSM_STATE_SIZE,
        mamba_num_heads=HIDDEN_SIZE // MAMBA_HEAD_DIM,
        mamba_head_dim=MAMBA_HEAD_DIM,
        n_groups=1,
        chunk_size=CHUNK_SIZE,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=INITIALIZER_RANGE,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def new_model(vocab_size: int, seed: int) -> NemotronHForCausalLM:
    """A model in float32 with initial weights from a seed."""
    torch.manual_seed(seed)
    model = NemotronHForCausalLM(tiny_config(vocab_size))
    # transformers clamps time steps to `time_step_min` in one of its two paths only. At 1e-9 the
    # clamp never acts, so both paths compute the same.
    model.config.time_step_min = TIME_STEP_MIN
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (TIME_STEP_MIN, float("inf"))
    return model
