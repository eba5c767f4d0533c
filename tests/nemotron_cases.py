"""Nemotron-H models at toy widths, and the configuration of the published 30B."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import NemotronHConfig, NemotronHForCausalLM

from dragkit.config import GeneratorConfig
from dragkit.generator.lora.adapters import DEFAULT_LORA_TARGETS, add_adapters
from dragkit.generator.random_weights import ARCHITECTURES

ROUTED_EXPERTS = ("experts.up_proj", "experts.down_proj")
ALL_LINEAR = (*DEFAULT_LORA_TARGETS, "out_proj")
BLOCK_TYPES = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}

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
# 23 Mamba-2, 23 expert and 6 attention blocks.
PATTERN_30B, LARGE = ARCHITECTURES["nemotron-3-nano-30b-a3b"]


def toy_config(pattern: str, **settings: object) -> NemotronHConfig:
    """Blocks of a pattern at toy widths; `settings` override `TOY`."""
    return NemotronHConfig(hybrid_override_pattern=pattern, use_cache=False, **TOY | settings)


def config_30b() -> NemotronHConfig:
    """The configuration of Nemotron-3-Nano-30B-A3B."""
    return NemotronHConfig(hybrid_override_pattern=PATTERN_30B, **LARGE)


def toy_model(
    pattern: str = "ME*-M*",
    dtype: torch.dtype = torch.float32,
    std: float = 0.3,
    **settings: object,
) -> NemotronHForCausalLM:
    """Frozen random weights, the same every time."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(toy_config(pattern, **settings)).eval()
    for name, parameter in model.named_parameters():
        # The residual sum of 52 blocks would otherwise grow beyond any tolerance.
        deep = len(pattern) > 12 and any(n in name for n in ("out_proj", "o_proj", "down_proj"))
        nn.init.normal_(parameter, std=0.2 * std if deep else std)
    return model.to(dtype).requires_grad_(False)


def adapted(
    targets: tuple[str, ...] | None = None,
    rank: int = 4,
    model: nn.Module | None = None,
    std: float = 0.0,
    **settings: object,
) -> nn.Module:
    """Adapters on the targets that the model has, with B of standard deviation `std`."""
    model = toy_model(std=0.2) if model is None else model
    names = [name for name, _ in model.named_parameters()]
    targets = targets and tuple(t for t in targets if any(f".{t}" in name for name in names))
    torch.manual_seed(1)
    config = GeneratorConfig(lora_targets=targets, lora_rank=rank, **settings)
    model = add_adapters(model, config)
    if std:
        randomize_lora_b(model, std)
    return model


def randomize_lora_b(model: nn.Module, std: float = 0.2) -> None:
    """Draws B, which is zero in a new adapter."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=std)


def decoder_of(model: nn.Module) -> nn.Module:
    """The blocks without the output layer, of a model with or without adapters."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).model


def relative_rms(got: Tensor, wanted: Tensor) -> float:
    """RMS of the difference, relative to the RMS of `wanted`."""
    got, wanted = got.detach().double(), wanted.detach().double()
    return float((got - wanted).norm() / wanted.norm())
