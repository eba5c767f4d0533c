"""Models of every block kind with adapters."""

from __future__ import annotations

import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.config import GeneratorConfig
from dragkit.model.adapters import add_adapters

ROUTED = ("experts.up_proj", "experts.down_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj")


def make_model(pattern="ME*-M*", **settings) -> NemotronHForCausalLM:
    """Every block kind of the 30B at toy widths, frozen."""
    shape = {
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
        "time_step_min": 1e-9,
    }
    config = NemotronHConfig(hybrid_override_pattern=pattern, use_cache=False, **shape | settings)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def adapted(targets=None, rank=4, model=None, **settings) -> torch.nn.Module:
    config = GeneratorConfig(lora_targets=targets, lora_rank=rank, **settings)
    torch.manual_seed(1)
    return add_adapters(make_model() if model is None else model, config)


def stir(model) -> None:
    """Every adapter at work: B is zero in a fresh one."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
