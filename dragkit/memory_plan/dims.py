"""The dimensions of a Nemotron-H and of its adapters, and its parameter counts, without weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dragkit.config import GeneratorConfig
from dragkit.errors import MissingInputError
from dragkit.generator.load import resolve_generator
from dragkit.generator.nemotron_h.decoder import TOKEN_MIXING_TYPES
from dragkit.generator.random_weights import architecture_of, is_random, random_config


class NemotronHDims(NamedTuple):
    """Dimensions of a Nemotron-H, named as in `NemotronHConfig` except for the first two.

    Attributes:
        block_types: `layers_block_type`, one entry per block.
        num_kv_heads: `num_key_value_heads`.
    """

    block_types: tuple[str, ...]
    num_kv_heads: int
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    intermediate_size: int

    @property
    def d_inner(self) -> int:
        """Width of the Mamba-2 heads together."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the causal convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_dim(self) -> int:
        """Output width of in_proj: gate, convolution channels, and one time step per head."""
        return self.d_inner + self.conv_dim + self.mamba_num_heads

    @property
    def q_dim(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads, which is that of all value heads."""
        return self.num_kv_heads * self.head_dim


class LoraDims(NamedTuple):
    """LoRA's rank and target modules. Without targets the generator is frozen."""

    rank: int
    targets: tuple[str, ...]


def dims_of(config: Any) -> NemotronHDims | None:
    """The dimensions in a `NemotronHConfig`, or None for a model that the formulas do not cover."""
    if getattr(config, "model_type", None) != "nemotron_h":
        return None
    if getattr(config, "moe_latent_size", None) is not None:
        return None
    first_two = tuple(config.layers_block_type), config.num_key_value_heads
    return NemotronHDims(*first_two, *(getattr(config, name) for name in NemotronHDims._fields[2:]))


def generator_dims(config: GeneratorConfig, *, name: str) -> NemotronHDims | None:
    """The generator's dimensions, read from its configuration, or None if it is not a Nemotron-H.

    Raises:
        MissingInputError: the generator is neither on this machine nor a known architecture.
        ConfigError: random weights of an unknown architecture.
    """
    if is_random(name):
        return dims_of(random_config(name))
    from transformers import AutoConfig

    try:
        folder = resolve_generator(config, name=name)
    except MissingInputError:
        if (known := architecture_of(name)) is None:
            raise
        return dims_of(random_config(known))
    return dims_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))


def linear_layers(dims: NemotronHDims, block_type: str) -> dict[str, tuple[int, int]]:
    """(output width, input width) of a block's linear layers, by LoRA's target names."""
    hidden = dims.hidden_size
    if block_type == "linear_attention":
        return {"in_proj": (dims.in_proj_dim, hidden), "out_proj": (hidden, dims.d_inner)}
    if block_type == "full_attention":
        return {
            "q_proj": (dims.q_dim, hidden),
            "k_proj": (dims.kv_dim, hidden),
            "v_proj": (dims.kv_dim, hidden),
            "o_proj": (hidden, dims.q_dim),
        }
    width = dims.intermediate_size
    if block_type == "moe":
        width = dims.moe_shared_expert_intermediate_size
    return {"up_proj": (width, hidden), "down_proj": (hidden, width)}


def expert_layers(dims: NemotronHDims) -> dict[str, tuple[int, int]]:
    """(output width, input width) of one routed expert's layers, by LoRA's target names."""
    width, hidden = dims.moe_intermediate_size, dims.hidden_size
    return {"experts.up_proj": (width, hidden), "experts.down_proj": (hidden, width)}


def _num_matrix_parameters(dims: NemotronHDims, block_type: str, num_experts: int) -> int:
    """Parameters of a block's matrices, with `num_experts` of its routed experts."""
    count = sum(o * i for o, i in linear_layers(dims, block_type).values())
    if block_type == "moe":
        count += num_experts * sum(o * i for o, i in expert_layers(dims).values())
        count += dims.n_routed_experts * dims.hidden_size  # the router
    return count


def num_active_parameters(dims: NemotronHDims, block_types: Sequence[str]) -> int:
    """Parameters of these blocks that one token is multiplied with."""
    num_experts = dims.num_experts_per_tok
    return sum(_num_matrix_parameters(dims, kind, num_experts) for kind in block_types)


def num_block_parameters(dims: NemotronHDims, block_type: str) -> int:
    """Frozen parameters of a block."""
    matrices = _num_matrix_parameters(dims, block_type, dims.n_routed_experts)
    count = matrices + dims.hidden_size  # the norm before the mixer
    if block_type == "linear_attention":
        # Convolution with bias, A, D and the time step's bias per head, and the gated norm.
        count += dims.conv_dim * (dims.conv_kernel + 1) + 3 * dims.mamba_num_heads + dims.d_inner
    return count


def num_embedding_parameters(dims: NemotronHDims) -> int:
    """Frozen parameters outside the blocks: embeddings, LM head and the last norm."""
    return 2 * dims.vocab_size * dims.hidden_size + dims.hidden_size


def num_parameters(dims: NemotronHDims) -> int:
    """Frozen parameters of the whole model."""
    blocks = sum(num_block_parameters(dims, block_type) for block_type in dims.block_types)
    return num_embedding_parameters(dims) + blocks


def num_lora_parameters(dims: NemotronHDims, lora: LoraDims) -> int:
    """Trained parameters of the adapters."""
    count = 0
    for block_type in dims.block_types:
        width_sums = {name: o + i for name, (o, i) in linear_layers(dims, block_type).items()}
        if block_type == "moe":
            routed = expert_layers(dims).items()
            width_sums |= {name: dims.n_routed_experts * (o + i) for name, (o, i) in routed}
        count += lora.rank * sum(width_sums.get(name, 0) for name in lora.targets)
    return count


def blocks_of_all_tokens(dims: NemotronHDims) -> tuple[str, ...]:
    """Types of the blocks that process every token of a pack.

    After the last block that mixes tokens, only supervised tokens are processed.
    """
    mixing = [i for i, kind in enumerate(dims.block_types) if kind in TOKEN_MIXING_TYPES]
    return dims.block_types[: mixing[-1] + 1 if mixing else 0]
