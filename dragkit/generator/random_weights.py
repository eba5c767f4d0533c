"""Generators of a true architecture with random weights: for loss, speed and memory, no answers.

A published model of tens of gigabytes need not be on a machine to measure how fast it would train
there: time and memory depend on shapes. Routing by random weights is nearly balanced, so experts
look a little better than trained ones would.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dragkit.config import DEFAULT_GENERATOR
from dragkit.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "random:"
_SEED = 20260101
_STD = 0.02
# Layers that add to the residual stream; each block has one such addition.
_RESIDUAL = ("out_proj", "o_proj", "down_proj")
_STEP_RANGE = (1e-3, 1e-1)


class Architecture(NamedTuple):
    """What `random:NAME` builds.

    Attributes:
        pattern: one letter a block: M Mamba-2, E experts, * attention, - dense.
        sizes: of `NemotronHConfig`; what is left out has that class's default.
    """

    pattern: str
    sizes: Mapping[str, object]


ARCHITECTURES: dict[str, Architecture] = {
    "nemotron-3-nano-30b-a3b": Architecture(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        {
            "vocab_size": 131072,
            "hidden_size": 2688,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "mamba_num_heads": 64,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
            "chunk_size": 128,
            "n_routed_experts": 128,
            "num_experts_per_tok": 6,
            "n_shared_experts": 1,
            "moe_intermediate_size": 1856,
            "moe_shared_expert_intermediate_size": 3712,
            "intermediate_size": 1856,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
            "n_group": 1,
            "topk_group": 1,
            "max_position_embeddings": 262144,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    )
}
# Names of weights whose architecture stands above, so that a run is planned before they are here.
PUBLISHED = {DEFAULT_GENERATOR: "nemotron-3-nano-30b-a3b"}


def is_random(name: str) -> bool:
    """Whether a generator's name asks for random weights."""
    return name.startswith(PREFIX)


def architecture_of(name: str) -> str | None:
    """`random:NAME` with the architecture of a generator, if it is in the table."""
    known = name.removeprefix(PREFIX).partition(":")[0] if is_random(name) else PUBLISHED.get(name)
    return PREFIX + known if known in ARCHITECTURES else None


def random_config(name: str) -> Any:
    """The `NemotronHConfig` of `random:NAME` or `random:NAME:layers=N`.

    Raises:
        ConfigError: no such architecture, or no such number of layers.
    """
    from transformers import NemotronHConfig

    known, _, option = name.removeprefix(PREFIX).partition(":")
    if known not in ARCHITECTURES:
        raise ConfigError(
            f"generator.model: {name}: there is no architecture {known!r}. There are: "
            f"{', '.join(ARCHITECTURES)}. Write {PREFIX}NAME, or {PREFIX}NAME:layers=N for its "
            "first N blocks."
        )
    pattern, sizes = ARCHITECTURES[known]
    count = len(pattern)
    if option:
        found = re.fullmatch(r"layers=([0-9]+)", option)
        count = int(found[1]) if found else 0
        if not 1 <= count <= len(pattern):
            raise ConfigError(
                f"generator.model: {name}: what follows {known} must be layers=N with N from 1 to "
                f"{len(pattern)}, got {option!r}."
            )
    config = NemotronHConfig(hybrid_override_pattern=pattern[:count], **sizes)
    # Residual outputs are scaled for the depth of the whole, so that a part of it is its beginning.
    config.random_depth = len(pattern)
    return config


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a configuration, without memory for its weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal language model with random weights, the same ones every time on a kind of device.

    Every tensor is drawn from a seed of its own name: `layers=N` gives the first N blocks of the
    whole model. The host holds nothing of it where the device is a GPU.

    Args:
        name: `random:NAME[:layers=N]`; device, dtype: of its weights.

    Raises:
        ConfigError: no such architecture, or no such number of layers.
    """
    config = random_config(name)
    model = meta_model(config, dtype).to_empty(device=device).eval()
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if leaf in (model._keep_in_fp32_modules_strict or ()):
                module.register_buffer(leaf, buffer.float())
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            _fill(key, tensor, config.random_depth)
    count = sum(p.numel() for p in model.parameters())
    logger.warning(
        "generator %s: %d blocks, %s parameters, random weights. No tokeniser belongs to it, so "
        "the bundled tiny one's ids stand in: use it for loss, speed and memory only.",
        name,
        len(config.layers_block_type),
        f"{count:,}",
    )
    return model


def _fill(name: str, tensor: Tensor, depth: int) -> None:
    """Sane values for one parameter or buffer, a function of its name, shape and type."""
    path = name.split(".")
    module, leaf = path[-2] if len(path) > 1 else "", path[-1]
    digest = hashlib.blake2b(f"{_SEED} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest))
    if leaf == "A_log":
        number = torch.arange(1, tensor.numel() + 1, dtype=torch.float32, device=tensor.device)
        tensor.copy_(number.log())
    elif leaf == "dt_bias":
        low, high = (math.log(limit) for limit in _STEP_RANGE)
        drawn = torch.rand(tensor.shape, generator=generator, device=tensor.device)
        step = (low + (high - low) * drawn).exp()
        # The inverse of softplus.
        tensor.copy_(step + (-torch.expm1(-step)).log())
    elif leaf == "D" or module.startswith("norm"):
        tensor.fill_(1.0)
    elif leaf in ("bias", "e_score_correction_bias"):
        tensor.zero_()
    else:
        scale = 1 / math.sqrt(2 * depth) if {module, leaf} & set(_RESIDUAL) else 1.0
        tensor.normal_(0.0, _STD * scale, generator=generator)
