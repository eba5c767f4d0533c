"""Published architectures with random weights, to measure loss, speed and memory.

Time and memory depend on shapes, so the weights of the published model are not needed. Random
weights route nearly balanced, so experts run a little faster than trained ones would.
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
# Layers whose output is added to the residual stream, one per block.
_RESIDUAL = ("out_proj", "o_proj", "down_proj")
_DT_RANGE = (1e-3, 1e-1)


class Architecture(NamedTuple):
    """The architecture that `random:NAME` builds.

    Attributes:
        pattern: one letter per block: M Mamba-2, E experts, * attention, - dense.
        sizes: arguments of `NemotronHConfig`.
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
# Hub names of published weights, so that a run can be planned before their download.
PUBLISHED = {DEFAULT_GENERATOR: "nemotron-3-nano-30b-a3b"}


def is_random(name: str) -> bool:
    """Whether a generator's name asks for random weights."""
    return name.startswith(PREFIX)


def architecture_of(name: str) -> str | None:
    """`random:NAME` with the architecture of a generator, or None if it is not in the table."""
    known = name.removeprefix(PREFIX).partition(":")[0] if is_random(name) else PUBLISHED.get(name)
    return PREFIX + known if known in ARCHITECTURES else None


def random_config(name: str) -> Any:
    """The `NemotronHConfig` of `random:NAME` or `random:NAME:layers=N`.

    Raises:
        ConfigError: there is no such architecture, or it has fewer layers.
    """
    from transformers import NemotronHConfig

    known, _, option = name.removeprefix(PREFIX).partition(":")
    if known not in ARCHITECTURES:
        raise ConfigError(
            f"generator.model: {name}: there is no architecture {known!r}. The architectures are "
            f"{', '.join(ARCHITECTURES)}. Write {PREFIX}NAME, or {PREFIX}NAME:layers=N for its "
            "first N blocks."
        )
    pattern, sizes = ARCHITECTURES[known]
    num_layers = len(pattern)
    if option:
        match = re.fullmatch(r"layers=([0-9]+)", option)
        num_layers = int(match[1]) if match else 0
        if not 1 <= num_layers <= len(pattern):
            raise ConfigError(
                f"generator.model: {name}: {option!r} must be layers=N with N from 1 to "
                f"{len(pattern)}."
            )
    config = NemotronHConfig(hybrid_override_pattern=pattern[:num_layers], **sizes)
    # The first N blocks get the weights that they have in the whole model, whose depth scales them.
    config.random_depth = len(pattern)
    return config


def meta_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a configuration on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A causal language model with random weights, the same every time on a type of device.

    The seed of a tensor is its name, so `layers=N` gives the first N blocks of the whole model. A
    GPU's weights never exist on the host.

    Args:
        name: `random:NAME[:layers=N]`.
        device, dtype: those of the weights.

    Raises:
        ConfigError: there is no such architecture, or it has fewer layers.
    """
    config = random_config(name)
    model = meta_model(config, dtype).to_empty(device=device).eval()
    # Some buffers stay in float32 in a model of half precision, as with `from_pretrained`.
    for module in model.modules():
        for leaf, buffer in list(module.named_buffers(recurse=False)):
            if leaf in (model._keep_in_fp32_modules_strict or ()):
                module.register_buffer(leaf, buffer.float())
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            _fill(key, tensor, config.random_depth)
    logger.warning(
        "generator %s: %d blocks, %s parameters, random weights. It has no tokenizer and takes "
        "that of the bundled tiny generator. Use it for loss, speed and memory only.",
        name,
        len(config.layers_block_type),
        f"{sum(p.numel() for p in model.parameters()):,}",
    )
    return model


def _fill(name: str, tensor: Tensor, depth: int) -> None:
    """Draws one parameter or buffer by its name, shape and dtype."""
    path = name.split(".")
    module, leaf = path[-2] if len(path) > 1 else "", path[-1]
    # The seed depends on the name only, not on how many tensors were drawn before.
    digest = hashlib.blake2b(f"{_SEED} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest))
    if leaf == "A_log":
        head = torch.arange(1, tensor.numel() + 1, dtype=torch.float32, device=tensor.device)
        tensor.copy_(head.log())
    elif leaf == "dt_bias":
        low, high = (math.log(limit) for limit in _DT_RANGE)
        uniform = torch.rand(tensor.shape, generator=generator, device=tensor.device)
        dt = (low + (high - low) * uniform).exp()
        # The mixer applies softplus, so its inverse is stored.
        tensor.copy_(dt + (-torch.expm1(-dt)).log())
    elif leaf == "D" or module.startswith("norm"):
        tensor.fill_(1.0)
    elif leaf in ("bias", "e_score_correction_bias"):
        tensor.zero_()
    else:
        scale = 1 / math.sqrt(2 * depth) if {module, leaf} & set(_RESIDUAL) else 1.0
        tensor.normal_(0.0, _STD * scale, generator=generator)
