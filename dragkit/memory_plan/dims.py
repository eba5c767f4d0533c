"""The sizes of a Nemotron-H and of its adapters, without the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dragkit.config import GeneratorConfig
from dragkit.errors import MissingInputError
from dragkit.generator.load import resolve_generator
from dragkit.generator.nemotron_h.decoder import TOKEN_MIXING_TYPES
from dragkit.generator.random_weights import architecture_of, is_random, random_config


class NemotronHDims(NamedTuple):
    """Sizes of a Nemotron-H.

    Attributes:
        kinds: of its blocks, as `layers_block_type` names them; hidden: width M; vocab: V.
        heads, groups, head_dim: query heads, key-value heads and their width.
        mamba_heads, mamba_dim, state, mamba_groups, conv, chunk: of Mamba-2.
        experts, active, expert_width, shared_width: routed experts, those of a token, widths.
        dense_width: of dense blocks.
    """

    block_types: tuple[str, ...]
    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    num_kv_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    ssm_state_size: int
    n_groups: int
    conv_kernel: int
    chunk_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    intermediate_size: int

    @property
    def d_inner(self) -> int:
        """Width of a Mamba-2 block's states."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Width of what the convolution reads."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    @property
    def in_proj_dim(self) -> int:
        """Width of in_proj's output."""
        return self.d_inner + self.conv_dim + self.mamba_num_heads

    @property
    def q_dim(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Width of all key heads."""
        return self.num_kv_heads * self.head_dim


class LoraDims(NamedTuple):
    """LoRA: its rank and the names of what it adapts; none is a frozen model."""

    rank: int
    targets: tuple[str, ...]


def dims_of(config: Any) -> NemotronHDims | None:
    """The shape of a `NemotronHConfig`; None of another model, which has no figures here."""
    if getattr(config, "model_type", None) != "nemotron_h":
        return None
    if getattr(config, "moe_latent_size", None) is not None:
        return None
    return NemotronHDims(
        block_types=tuple(config.layers_block_type),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        mamba_num_heads=config.mamba_num_heads,
        mamba_head_dim=config.mamba_head_dim,
        ssm_state_size=config.ssm_state_size,
        n_groups=config.n_groups,
        conv_kernel=config.conv_kernel,
        chunk_size=config.chunk_size,
        n_routed_experts=config.n_routed_experts,
        num_experts_per_tok=config.num_experts_per_tok,
        moe_intermediate_size=config.moe_intermediate_size,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        intermediate_size=config.intermediate_size,
    )


def linear_layers(dims: NemotronHDims, block_type: str) -> dict[str, tuple[int, int]]:
    """Output and input width of a block's linear layers, by the names that LoRA knows."""
    hidden = dims.hidden_size
    if block_type == "linear_attention":
        return {"in_proj": (dims.in_proj_dim, hidden), "out_proj": (hidden, dims.d_inner)}
    if block_type == "full_attention":
        ends = {"q_proj": dims.q_dim, "k_proj": dims.kv_dim, "v_proj": dims.kv_dim}
        layers = {name: (width, hidden) for name, width in ends.items()}
        return layers | {"o_proj": (hidden, dims.q_dim)}
    width = (
        dims.moe_shared_expert_intermediate_size if block_type == "moe" else dims.intermediate_size
    )
    return {"up_proj": (width, hidden), "down_proj": (hidden, width)}


def expert_layers(dims: NemotronHDims) -> dict[str, tuple[int, int]]:
    """The same of one routed expert."""
    width, hidden = dims.moe_intermediate_size, dims.hidden_size
    return {"experts.up_proj": (width, hidden), "experts.down_proj": (hidden, width)}


def num_block_parameters(dims: NemotronHDims, block_type: str) -> int:
    """Frozen parameters of a block."""
    count = dims.hidden_size + sum(o * i for o, i in linear_layers(dims, block_type).values())
    if block_type == "linear_attention":
        count += dims.conv_dim * (dims.conv_kernel + 1) + 3 * dims.mamba_num_heads + dims.d_inner
    if block_type == "moe":
        count += dims.n_routed_experts * sum(o * i for o, i in expert_layers(dims).values())
        count += dims.n_routed_experts * dims.hidden_size
    return count


def num_embedding_parameters(dims: NemotronHDims) -> int:
    """Frozen parameters outside of blocks: embeddings, output layer and the norm before it."""
    return 2 * dims.vocab_size * dims.hidden_size + dims.hidden_size


def num_parameters(dims: NemotronHDims) -> int:
    """Frozen parameters of the whole model."""
    return num_embedding_parameters(dims) + sum(
        num_block_parameters(dims, block_type) for block_type in dims.block_types
    )


def num_lora_parameters(dims: NemotronHDims, adapters: LoraDims) -> int:
    """Trained parameters of LoRA."""
    count = 0
    for block_type in dims.block_types:
        layers = dict(linear_layers(dims, block_type))
        if block_type == "moe":
            routed = expert_layers(dims).items()
            layers |= {
                name: (dims.n_routed_experts * o, dims.n_routed_experts * i)
                for name, (o, i) in routed
            }
        count += sum(adapters.rank * sum(layers.get(n, (0,))) for n in adapters.targets)
    return count


def blocks_of_all_tokens(dims: NemotronHDims) -> tuple[str, ...]:
    """Kinds of the blocks that all tokens pass.

    After the last block in which tokens see one another, only supervised tokens go on.
    """
    seeing = [
        i for i, block_type in enumerate(dims.block_types) if block_type in TOKEN_MIXING_TYPES
    ]
    return dims.block_types[: seeing[-1] + 1 if seeing else 0]


def num_active_parameters(dims: NemotronHDims, block_types: Sequence[str]) -> int:
    """Parameters of the blocks that multiply a token."""
    count = 0
    for block_type in block_types:
        count += sum(o * i for o, i in linear_layers(dims, block_type).values())
        if block_type == "moe":
            count += dims.num_experts_per_tok * sum(o * i for o, i in expert_layers(dims).values())
            count += dims.n_routed_experts * dims.hidden_size
    return count


def generator_dims(config: GeneratorConfig, *, name: str) -> NemotronHDims | None:
    """The generator's shape, from its configuration alone; None of one that has no plan.

    Raises:
        MissingInputError: it is not on this machine, nor in our table.
        ConfigError: random weights of an architecture that does not exist.
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
