"""Models of every block kind with adapters."""

from __future__ import annotations

import torch
from transformers import NemotronHForCausalLM

from dragkit.config import GeneratorConfig
from dragkit.model.adapters import add_adapters
from tests.nemotron_cases import toy_config

ROUTED = ("experts.up_proj", "experts.down_proj")
EVERY = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "out_proj", "up_proj", "down_proj")


def make_model(pattern="ME*-M*", **settings) -> NemotronHForCausalLM:
    """Every block kind of the 30B at toy widths, frozen."""
    config = toy_config(pattern, **{"time_step_min": 1e-9} | settings)
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
