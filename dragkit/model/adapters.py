"""LoRA on a frozen language model, in PEFT's layout."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence

from torch import nn

from dragkit.config import GeneratorConfig
from dragkit.errors import ConfigError

logger = logging.getLogger(__name__)

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj")


def lora_targets(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        ConfigError: a wanted name matches no layer, with the nearest names that exist.
    """
    present = sorted(
        {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    )
    if wanted is None:
        chosen = [name for name in LORA_TARGETS if name in present]
        if not chosen:
            raise ConfigError(
                f"generator.lora_targets: none of the usual names {', '.join(LORA_TARGETS)} is a "
                f"linear layer of this model; name some of its own: {', '.join(present)}."
            )
        return chosen
    for name in wanted:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=3, cutoff=0.0)
            raise ConfigError(
                f"generator.lora_targets: {name!r} matches no linear layer of this model. "
                f"Nearest: {', '.join(near)}."
            )
    return list(wanted)


def add_adapters(model: nn.Module, config: GeneratorConfig) -> nn.Module:
    """The model with adapters on its layers; nothing else of it is trained.

    Args:
        model: frozen; config: rank, scale, dropout and targets.

    Raises:
        ConfigError: a wanted target matches no layer.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, config.lora_targets)
    model = get_peft_model(
        model,
        LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info("LoRA rank %d on %s: %d parameters", config.lora_rank, ", ".join(targets), count)
    return model
