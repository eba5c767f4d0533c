"""LoRA on a frozen language model, in PEFT's layout."""

from __future__ import annotations

import difflib
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from dragkit.config import GeneratorConfig
from dragkit.errors import ConfigError
from dragkit.generator.lora.coverage import coverage, coverage_table
from dragkit.generator.nemotron_h.patches import hidden_model_type

logger = logging.getLogger(__name__)

# Adapters on these layers load with PEFT alone, and are few enough to train at any rank.
DEFAULT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj")


def _linear_names(model: nn.Module) -> set[str]:
    from transformers.pytorch_utils import Conv1D

    names: dict[bool, set[str]] = {True: set(), False: set()}
    for name, module in model.named_modules():
        names[isinstance(module, (nn.Linear, Conv1D))].add(name.rsplit(".", 1)[-1])
    # PEFT stops at a name that another module has, too: in an nn.Sequential, names are numbers.
    return names[True] - names[False]


def _routed_names(model: nn.Module) -> set[str]:
    """`experts.<name>` of the parameters that stack one matrix per expert."""
    return {
        f"experts.{parameter}"
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "experts"
        for parameter, tensor in module.named_parameters(recurse=False)
        if tensor.dim() == 3
    }


def _default_targets(model: nn.Module, linear: Sequence[str]) -> list[str]:
    """Names of layers with adapters where the user names none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as USUAL

    chosen = [name for name in DEFAULT_LORA_TARGETS if name in linear]
    if chosen:
        return chosen
    usual = USUAL.get(model.config.model_type, ())
    chosen = [name for name in linear if name in usual]
    if chosen:
        return chosen
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), "")
    return [name for name in linear if name != head.rsplit(".", 1)[-1]]


def lora_targets(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Names of the layers that get an adapter.

    Args:
        model: the model to adapt.
        wanted: names of linear layers (`q_proj`) or of projections of the routed experts
            (`experts.up_proj`). None is those of `DEFAULT_LORA_TARGETS` that the model has. A model
            without any takes those that PEFT takes for its family, or all but the head.

    Raises:
        ConfigError: a wanted name matches nothing. The message has the nearest existing names.
    """
    linear, routed = sorted(_linear_names(model)), sorted(_routed_names(model))
    if wanted is None:
        chosen = _default_targets(model, linear)
        if not chosen:
            raise ConfigError(
                "generator.lora_targets: this model has no linear layer. Set "
                "generator.freeze_lm to train no adapter, or name another model."
            )
        return chosen
    present = linear + routed
    for name in wanted:
        if name not in present:
            near = difflib.get_close_matches(name, present, n=3, cutoff=0.0)
            raise ConfigError(
                f"generator.lora_targets: {name!r} matches no linear layer or routed expert of "
                f"this model. Nearest: {', '.join(near)}."
            )
    return list(wanted)


def add_adapters(model: nn.Module, config: GeneratorConfig) -> nn.Module:
    """Adds trainable adapters to a frozen model.

    Args:
        model: the frozen model.
        config: rank, scale, dropout and targets of the adapters.

    Raises:
        ConfigError: a wanted target matches nothing.
    """
    from peft import LoraConfig, get_peft_model

    targets = lora_targets(model, config.lora_targets)
    routed = [name for name in targets if name.startswith("experts.")]
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=[name for name in targets if name not in routed],
        target_parameters=routed or None,
        task_type="CAUSAL_LM",
    )
    with hidden_model_type(model), warnings.catch_warnings():
        # peft reads a property that transformers has renamed. The user cannot change that.
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")
        model = get_peft_model(model, lora)
    logger.info(
        "LoRA rank %d on %s: %d parameters\n%s",
        config.lora_rank,
        ", ".join(targets),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        coverage_table(coverage(model)),
    )
    return model


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Adds the saved adapters of a folder to a bare model, frozen.

    `peft.PeftModel.from_pretrained` refuses a Nemotron-H with an adapter on `out_proj`, and does
    the same as this function otherwise. Training such a model without a cache and with `mamba_ssm`
    installed misses that adapter in transformers' own forward, not in ours.

    Args:
        model: the model without adapters.
        folder: folder with `adapter_config.json`, as `save_adapters` writes it.

    Returns:
        A `PeftModel`.
    """
    from peft import PeftModel

    with hidden_model_type(model):
        return PeftModel.from_pretrained(model, str(folder))
