"""Small models with the block types of the 30B, for counting the tensors of a pass."""

from __future__ import annotations

import pytest
import torch

from dragkit.config import GeneratorConfig
from dragkit.generator.lora.adapters import add_adapters
from dragkit.generator.random_weights import ARCHITECTURES, random_model
from dragkit.memory_plan.dims import LoraDims, NemotronHDims, dims_of, linear_layers

# Like the 30B: d_inner differs from hidden_size, and there are fewer key heads than query heads.
SIZES = ARCHITECTURES["nemotron-3-nano-30b-a3b"].sizes | {
    "vocab_size": 1024,
    "hidden_size": 168,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "ssm_state_size": 32,
    "n_groups": 2,
    "n_routed_experts": 16,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 120,
    "moe_shared_expert_intermediate_size": 232,
    "intermediate_size": 336,
}


def build(
    monkeypatch: pytest.MonkeyPatch, pattern: str, targets: tuple[str, ...], **sizes: int
) -> tuple[torch.nn.Module, NemotronHDims, LoraDims]:
    """A bfloat16 model with LoRA, its dims and adapters, without the `targets` that it lacks."""
    published = ARCHITECTURES["nemotron-3-nano-30b-a3b"]
    architecture = published._replace(pattern=pattern, sizes=SIZES | sizes)
    monkeypatch.setitem(ARCHITECTURES, "small", architecture)
    model = random_model("random:small", torch.device("cpu"), torch.bfloat16)
    dims = dims_of(model.config)
    linear = {n for kind in dims.block_types for n in linear_layers(dims, kind)}
    routed = "moe" in dims.block_types
    targets = tuple(t for t in targets if t in linear or (routed and t.startswith("experts.")))
    model.requires_grad_(False)
    model = add_adapters(model, GeneratorConfig(lora_rank=4, lora_targets=targets))
    return model, dims, LoraDims(4, targets)
