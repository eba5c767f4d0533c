"""LoRA on a frozen language model, in PEFT's layout."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from dragkit.config import GeneratorConfig
from dragkit.errors import ConfigError
from dragkit.generator.lora.coverage import coverage, coverage_table

logger = logging.getLogger(__name__)

DEFAULT_LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "up_proj", "down_proj")


def _linear_names(model: nn.Module) -> set[str]:
    return {n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def _routed_names(model: nn.Module) -> set[str]:
    """`experts.<name>` of the parameters that hold one matrix per expert."""
    return {
        f"experts.{parameter}"
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] == "experts"
        for parameter, tensor in module.named_parameters(recurse=False)
        if tensor.dim() == 3
    }


def lora_targets(model: nn.Module, wanted: Sequence[str] | None) -> list[str]:
    """Names of what gets an adapter.

    A name is that of linear layers (`q_proj`), or of one projection of the routed experts
    (`experts.up_proj`). Unset: the layers of `DEFAULT_LORA_TARGETS` that the model has. Adapters on
    those load with PEFT alone, and there are few enough of them to train at any rank.

    Raises:
        ConfigError: a wanted name matches nothing, with the nearest names that exist.
    """
    linear, routed = sorted(_linear_names(model)), sorted(_routed_names(model))
    if wanted is None:
        chosen = [name for name in DEFAULT_LORA_TARGETS if name in linear]
        if not chosen:
            raise ConfigError(
                f"generator.lora_targets: none of {', '.join(DEFAULT_LORA_TARGETS)} is a "
                f"linear layer of this model; name some of its own: {', '.join(linear)}."
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


@contextmanager
def hidden_model_type(model: nn.Module) -> Iterator[None]:
    """Lets PEFT adapt `out_proj` of a Mamba model while the block runs.

    PEFT refuses by the model type alone, because transformers' fused CUDA path reads the bare
    weight of `out_proj` and would miss its adapter. Our mixer calls the layer. The type is hidden
    on this one configuration and comes back whatever happens.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if kind is None:
        yield
        return
    before = dict(vars(config))
    config.model_type = f"{kind}, guard lifted"
    try:
        yield
    finally:
        del config.model_type
        if "model_type" in before:
            config.model_type = kind


def add_adapters(model: nn.Module, config: GeneratorConfig) -> nn.Module:
    """The model with adapters on its layers; nothing else of it is trained.

    Args:
        model: frozen; config: rank, scale, dropout and targets.

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
    with hidden_model_type(model):
        model = get_peft_model(model, lora)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "LoRA rank %d on %s: %d parameters\n%s",
        config.lora_rank,
        ", ".join(targets),
        count,
        coverage_table(coverage(model)),
    )
    return model


def load_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """A bare model with the adapters of a folder.

    `peft.PeftModel.from_pretrained` does the same where no `out_proj` is adapted, and refuses a
    Nemotron-H where one is. The library's fused CUDA path (`mamba_ssm` installed, training without
    a cache) would not see that adapter; its other paths and dragkit's do.

    Args:
        model: without adapters; folder: with `adapter_config.json`, as `save_adapters` writes it.

    Returns:
        A `PeftModel`, its adapters frozen.
    """
    from peft import PeftModel

    with hidden_model_type(model):
        return PeftModel.from_pretrained(model, str(folder))
