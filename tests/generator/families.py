"""Tiny random models of the families of causal language models that transformers knows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 96
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size"),
    *("lru_width", "embedding_dim", "dim"),
)
_INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "intermediate_size_mlp")
_DROPOUT = (
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "dropout"),
    *("hidden_dropout", "hidden_dropout_prob", "activation_dropout", "layerdrop", "embed_dropout"),
    *("attention_probs_dropout_prob", "ff_dropout", "resid_dropout", "embedding_dropout"),
)
# Each configuration takes those of these sizes that it has.
_SIZES: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2},
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_DROPOUT, 0.0),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "attention_heads"), 4),
    **{"num_key_value_heads": 2, "head_dim": 8, "rotary_dim": 4},
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 99
    ),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts"), 4),
    **dict.fromkeys(("moe_num_experts",), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 24),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state"), 8),
    **{"time_step_rank": 4, "mamba_dt_rank": 4, "chunk_size": 16, "mamba_chunk_size": 16},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
}
_LATENT = {"num_key_value_heads": 4, "head_dim": None}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
# Settings of single families: sizes that must fit together, and what makes a family special. None
# leaves a size out.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "cohere": {"logit_scale": 0.25},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "ernie4_5_moe": {"moe_layer_start_index": 1},
    "falcon": {"head_dim": None, "num_ln_in_parallel_attn": None},
    "falcon_h1": {
        **_MAMBA,
        **{"mamba_d_ssm": 64, "embedding_multiplier": 5.0, "lm_head_multiplier": 0.1},
    },
    "gemma4_text": {
        **{"head_dim": None, "num_key_value_heads": None, "hidden_size_per_layer_input": 8},
        **{"vocab_size_per_layer_input": VOCABULARY, "global_head_dim": 16},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "glm4_moe_lite": _LATENT,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
    "granite": {
        "logits_scaling": 8.0,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
    },
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "n_groups": 2},
    "minicpm3": _LATENT,
    "qwen3_5_text": _LINEAR,
    "qwen3_5_moe_text": _LINEAR,
    "qwen3_next": _LINEAR,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "youtu": _LATENT,
    "zamba2": {
        "attention_hidden_size": None,
        **{"num_hidden_layers": 3, "head_dim": None, "num_key_value_heads": None},
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention"],
    },
}


class Tokens:
    """A tokenizer whose texts are arbitrary token ids."""

    bos_token_id, eos_token_id, unk_token_id = 0, 1, 2
    all_special_ids = (0, 1, 2)

    def __call__(self, texts, *, add_special_tokens, split_special_tokens):
        return {"input_ids": [[3 + ord(c) * 7 % (VOCABULARY - 3) for c in t] for t in texts]}


# Of each kind of model, those that many people train, and those that differ from all others.
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt2"),
    *("gpt_neo", "gpt_neox", "gptj", "gpt_bigcode", "opt", "bloom", "falcon", "mpt", "xglm"),
    *("cohere", "cohere2", "granite", "glm4", "minicpm3", "mixtral", "qwen2_moe", "qwen3_moe"),
    *("deepseek_v2", "deepseek_v3", "glm4_moe", "dots1", "ernie4_5_moe", "hunyuan_v1_moe"),
    *("gpt_oss", "llama4_text", "nemotron_h", "mamba", "mamba2", "bamba", "falcon_h1", "jamba"),
    *("zamba2", "granitemoehybrid", "recurrent_gemma", "qwen3_next", "qwen3_5_text", "rwkv"),
)
# Transformers has a model for the task, but it reads later tokens, or its decoding stops.
REFUSED = ("bert", "electra", "roberta", "xlm", "cpmant")


def family_config(family: str, **settings: Any) -> Any:
    """The tiny configuration of a family. `settings` override its sizes."""
    default = AutoConfig.for_model(family)
    sizes = {
        k: v
        for k, v in _SIZES.items()
        if k in default.to_dict() or k in type(default).attribute_map
    }
    chosen = sizes | _SPECIAL.get(family, {}) | settings
    return AutoConfig.for_model(family, **{k: v for k, v in chosen.items() if v is not None})


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
