"""Tiny random models of the families of causal language models that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
# Each configuration takes those of these sizes that it has.
_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("attention_hidden_size", "lru_width", "embedding_dim", "dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"), 48),
    **dict.fromkeys(
        ("intermediate_size_mlp", "d_ff", "dim_ff", "moe_shared_expert_intermediate_size"), 48
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "attention_heads", "num_heads"), 4
    ),
    **dict.fromkeys(("num_key_value_heads", "num_ln_in_parallel_attn"), 2),
    **{"head_dim": 8, "max_position_embeddings": 256, "n_positions": 256, "max_seq_len": 256},
    **{"context_length": 256, "rotary_dim": 4, "attention_dropout": 0.0},
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "top_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_intermediate_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **{"time_step_rank": 4, "chunk_size": 16, "mamba_chunk_size": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
# Settings of single families: what their sizes must be, or what makes them special.
FAMILIES: dict[str, dict[str, Any]] = {
    "bamba": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
}


def family_config(family: str, **settings: Any) -> Any:
    """The tiny configuration of a family."""
    default = AutoConfig.for_model(family)
    known = {k: v for k, v in _SIZES.items() if hasattr(default, k)}
    return AutoConfig.for_model(family, **known | FAMILIES.get(family, {}) | settings)


def family_model(family: str, **settings: Any) -> nn.Module:
    """A frozen model of a family with random weights, the same every time.

    The weights are larger than the library draws them, so that logits depend on all tokens.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(family, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model.requires_grad_(False)
