"""The sizes of a Nemotron-H and of its adapters, without the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dragkit.config import GeneratorConfig
from dragkit.errors import MissingInputError
from dragkit.generator.load import resolve_generator
from dragkit.generator.nemotron_h.decoder import SEES_OTHER_TOKENS
from dragkit.generator.random_weights import architecture_of, is_random, random_config


class Shape(NamedTuple):
    """Sizes of a Nemotron-H.

    Attributes:
        kinds: of its blocks, as `layers_block_type` names them; hidden: width M; vocab: V.
        heads, groups, head_dim: query heads, key-value heads and their width.
        mamba_heads, mamba_dim, state, mamba_groups, conv, chunk: of Mamba-2.
        experts, active, expert_width, shared_width: routed experts, those of a token, widths.
        dense_width: of dense blocks.
    """

    kinds: tuple[str, ...]
    hidden: int
    vocab: int
    heads: int
    groups: int
    head_dim: int
    mamba_heads: int
    mamba_dim: int
    state: int
    mamba_groups: int
    conv: int
    chunk: int
    experts: int
    active: int
    expert_width: int
    shared_width: int
    dense_width: int

    @property
    def inner(self) -> int:
        """Width of a Mamba-2 block's states."""
        return self.mamba_heads * self.mamba_dim

    @property
    def convolved(self) -> int:
        """Width of what the convolution reads."""
        return self.inner + 2 * self.mamba_groups * self.state

    @property
    def projected(self) -> int:
        """Width of in_proj's output."""
        return self.inner + self.convolved + self.mamba_heads

    @property
    def queries(self) -> int:
        """Width of all query heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of all key heads."""
        return self.groups * self.head_dim


class Adapters(NamedTuple):
    """LoRA: its rank and the names of what it adapts; none is a frozen model."""

    rank: int
    targets: tuple[str, ...]


def shape_of(config: Any) -> Shape | None:
    """The shape of a `NemotronHConfig`; None of another model, which has no figures here."""
    if getattr(config, "model_type", None) != "nemotron_h":
        return None
    if getattr(config, "moe_latent_size", None) is not None:
        return None
    return Shape(
        kinds=tuple(config.layers_block_type),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        heads=config.num_attention_heads,
        groups=config.num_key_value_heads,
        head_dim=config.head_dim,
        mamba_heads=config.mamba_num_heads,
        mamba_dim=config.mamba_head_dim,
        state=config.ssm_state_size,
        mamba_groups=config.n_groups,
        conv=config.conv_kernel,
        chunk=config.chunk_size,
        experts=config.n_routed_experts,
        active=config.num_experts_per_tok,
        expert_width=config.moe_intermediate_size,
        shared_width=config.moe_shared_expert_intermediate_size,
        dense_width=config.intermediate_size,
    )


def linear_layers(shape: Shape, kind: str) -> dict[str, tuple[int, int]]:
    """Output and input width of a block's linear layers, by the names that LoRA knows."""
    hidden = shape.hidden
    if kind == "linear_attention":
        return {"in_proj": (shape.projected, hidden), "out_proj": (hidden, shape.inner)}
    if kind == "full_attention":
        ends = {"q_proj": shape.queries, "k_proj": shape.keys, "v_proj": shape.keys}
        layers = {name: (width, hidden) for name, width in ends.items()}
        return layers | {"o_proj": (hidden, shape.queries)}
    width = shape.shared_width if kind == "moe" else shape.dense_width
    return {"up_proj": (width, hidden), "down_proj": (hidden, width)}


def routed_layers(shape: Shape) -> dict[str, tuple[int, int]]:
    """The same of one routed expert."""
    width, hidden = shape.expert_width, shape.hidden
    return {"experts.up_proj": (width, hidden), "experts.down_proj": (hidden, width)}


def block_parameters(shape: Shape, kind: str) -> int:
    """Frozen parameters of a block."""
    count = shape.hidden + sum(o * i for o, i in linear_layers(shape, kind).values())
    if kind == "linear_attention":
        count += shape.convolved * (shape.conv + 1) + 3 * shape.mamba_heads + shape.inner
    if kind == "moe":
        count += shape.experts * sum(o * i for o, i in routed_layers(shape).values())
        count += shape.experts * shape.hidden
    return count


def end_parameters(shape: Shape) -> int:
    """Frozen parameters outside of blocks: embeddings, output layer and the norm before it."""
    return 2 * shape.vocab * shape.hidden + shape.hidden


def parameters(shape: Shape) -> int:
    """Frozen parameters of the whole model."""
    return end_parameters(shape) + sum(block_parameters(shape, kind) for kind in shape.kinds)


def adapter_parameters(shape: Shape, adapters: Adapters) -> int:
    """Trained parameters of LoRA."""
    count = 0
    for kind in shape.kinds:
        layers = dict(linear_layers(shape, kind))
        if kind == "moe":
            routed = routed_layers(shape).items()
            layers |= {name: (shape.experts * o, shape.experts * i) for name, (o, i) in routed}
        count += sum(adapters.rank * sum(layers.get(n, (0,))) for n in adapters.targets)
    return count


def whole_blocks(shape: Shape) -> tuple[str, ...]:
    """Kinds of the blocks that all tokens pass.

    After the last block in which tokens see one another, only supervised tokens go on.
    """
    seeing = [i for i, kind in enumerate(shape.kinds) if kind in SEES_OTHER_TOKENS]
    return shape.kinds[: seeing[-1] + 1 if seeing else 0]


def matrix_parameters(shape: Shape, kinds: Sequence[str]) -> int:
    """Parameters of the blocks that multiply a token."""
    count = 0
    for kind in kinds:
        count += sum(o * i for o, i in linear_layers(shape, kind).values())
        if kind == "moe":
            count += shape.active * sum(o * i for o, i in routed_layers(shape).values())
            count += shape.experts * shape.hidden
    return count


def generator_shape(config: GeneratorConfig, *, name: str) -> Shape | None:
    """The generator's shape, from its configuration alone; None of one that has no plan.

    Raises:
        MissingInputError: it is not on this machine, nor in our table.
        ConfigError: random weights of an architecture that does not exist.
    """
    if is_random(name):
        return shape_of(random_config(name))
    from transformers import AutoConfig

    try:
        folder = resolve_generator(config, name=name)
    except MissingInputError:
        if (known := architecture_of(name)) is None:
            raise
        return shape_of(random_config(known))
    return shape_of(AutoConfig.from_pretrained(folder, trust_remote_code=False))
