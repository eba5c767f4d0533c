"""Nemotron-H models: every kind of block at toy widths, and the published 30B's shape."""

from __future__ import annotations

from transformers import NemotronHConfig

TOY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "chunk_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 24,
}
# 23 Mamba-2, 23 experts, 6 attention, as its published configuration has them.
PATTERN_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
LARGE = {
    "vocab_size": 131072,
    "hidden_size": 2688,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "ssm_state_size": 128,
    "mamba_num_heads": 64,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
}


def toy_config(pattern: str, **settings: object) -> NemotronHConfig:
    """Blocks of a pattern at toy widths; `settings` take the place of these."""
    return NemotronHConfig(hybrid_override_pattern=pattern, use_cache=False, **TOY | settings)


def config_30b() -> NemotronHConfig:
    """The configuration of Nemotron-3-Nano-30B-A3B."""
    return NemotronHConfig(hybrid_override_pattern=PATTERN_30B, **LARGE)
