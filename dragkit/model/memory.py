"""Memory and work of training a Nemotron-H with LoRA, as functions of its shape and of tokens.

The figures of what a block keeps for its backward pass follow our own forward, tensor by tensor, in
the form it has in half precision on a GPU (`dragkit.model.nemotron_h`, experts of the library);
`tests/model/test_memory.py` counts the tensors and compares. What a block needs only while it runs
is an estimate from the sizes of the tensors that are alive together. All are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dragkit.model.nemotron_h import RECOMPUTED

# A float32 parameter in training: itself, its gradient and AdamW's two moments.
TRAINED = 16
# Rows of logits that are computed together, as in `dragkit.model.generator`.
LOGIT_ROWS = 4096
_WIDE = 4
_INDEX = 8
# Ranks of routed adapters are padded to so many bytes.
_ALIGNMENT = 16
_SEES_OTHER_TOKENS = ("linear_attention", "full_attention")


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


def parameters(shape: Shape) -> int:
    """Frozen parameters of the whole model."""
    ends = 2 * shape.vocab * shape.hidden + shape.hidden
    return ends + sum(block_parameters(shape, kind) for kind in shape.kinds)


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


def _mamba_kept(s: Shape, lora: Adapters, half: int) -> int:
    kept = half * (s.projected + s.convolved + s.inner)  # into the convolution, scan and norm
    # Step sizes in float32: before softplus, before and after their limits.
    kept += 3 * _WIDE * s.mamba_heads
    if "in_proj" in lora.targets:
        kept += half * (s.hidden + lora.rank)
    if "out_proj" in lora.targets:
        kept += half * (s.inner + lora.rank)
    return kept


def _attention_kept(s: Shape, lora: Adapters, half: int) -> int:
    kept = half * (2 * s.queries + 2 * s.keys) + _WIDE * s.heads
    reads = sum(name in lora.targets for name in ("q_proj", "k_proj", "v_proj"))
    if reads:
        kept += half * (s.hidden + reads * lora.rank)
    if "o_proj" in lora.targets:
        kept += half * lora.rank
    return kept


def _dense_kept(s: Shape, lora: Adapters, half: int) -> int:
    kept = half * s.dense_width
    if "up_proj" in lora.targets:
        kept += half * (s.hidden + lora.rank)
    if "down_proj" in lora.targets:
        kept += half * (s.dense_width + lora.rank)
    return kept


def _experts_kept(s: Shape, lora: Adapters, half: int) -> int:
    # Router: scores, the chosen experts and their weights before and after the division.
    kept = _WIDE * s.experts + s.active * (_INDEX + _WIDE) + _WIDE
    # Routed: after relu and after the way down, for every expert of a token; weights and orders.
    kept += s.active * half * (s.expert_width + s.hidden)
    up, down = (name in lora.targets for name in routed_layers(s))
    if up or down:
        kept += s.active * (_WIDE + 2 * _INDEX)
    else:
        kept += s.active * (_WIDE + 3 * _INDEX)
    rank = -(-lora.rank * half // _ALIGNMENT) * _ALIGNMENT // half
    if up:
        kept += s.active * half * (s.hidden + rank)
    if down:
        kept += s.active * half * (s.expert_width + rank)
    # Shared, by PEFT's own layers: their inputs are kept in float32, as the adapters are.
    kept += half * s.shared_width
    if "up_proj" in lora.targets:
        kept += _WIDE * (s.hidden + lora.rank)
    if "down_proj" in lora.targets:
        kept += _WIDE * (s.shared_width + lora.rank)
    return kept


_KEPT = {
    "linear_attention": _mamba_kept,
    "full_attention": _attention_kept,
    "moe": _experts_kept,
    "mlp": _dense_kept,
}


def kept_per_token(shape: Shape, kind: str, adapters: Adapters, half: int = 2) -> int:
    """What a block keeps of every token until its backward pass, without its input.

    Args:
        shape: of the model; kind: of the block; adapters: of the run.
        half: bytes of a number of the model's type, 2 in half precision.
    """
    return _KEPT[kind](shape, adapters, half)


def input_per_token(shape: Shape, half: int = 2) -> int:
    """A block's input, which it keeps whatever the policy."""
    return half * shape.hidden


def passing_per_token(shape: Shape, kind: str, half: int = 2) -> int:
    """What a block needs of every token while its backward pass runs, estimated."""
    if kind == "linear_attention":
        states = _WIDE * shape.inner * shape.state // max(shape.chunk, 1)
        return half * (2 * shape.projected + 2 * shape.inner + shape.convolved) + 2 * states
    if kind == "full_attention":
        return half * (3 * shape.queries + 4 * shape.keys + 2 * shape.hidden)
    if kind == "moe":
        # Sums over a token's experts are float32, and so are the gradients of their terms.
        routed = shape.hidden * (2 * _WIDE + half) + 2 * half * shape.expert_width
        return shape.active * routed + 2 * _WIDE * shape.shared_width
    return half * (2 * shape.dense_width + 2 * shape.hidden)


def _places(shape: Shape) -> int:
    """Blocks up to the last that lets tokens see one another; later ones see few tokens."""
    seeing = [i for i, kind in enumerate(shape.kinds) if kind in _SEES_OTHER_TOKENS]
    return seeing[-1] + 1 if seeing else 0


def whole_blocks(shape: Shape) -> tuple[str, ...]:
    """Kinds of the blocks that all tokens pass; those behind see supervised tokens alone."""
    return shape.kinds[: _places(shape)]


def activations_per_token(
    shape: Shape, policy: str, adapters: Adapters, half: int = 2
) -> dict[str, int]:
    """Bytes per token of a pass at its peak, by what they are for.

    Args:
        shape: of the model; policy: of `RECOMPUTED`; adapters: of the run; half: as above.

    Returns:
        "inputs of blocks", one entry per kind of block for what it keeps, and "while a block runs".
    """
    kinds, again = whole_blocks(shape), RECOMPUTED[policy]
    found = {"inputs of blocks": len(kinds) * input_per_token(shape, half)}
    passing = 0
    for kind in dict.fromkeys(kinds):
        each = kept_per_token(shape, kind, adapters, half)
        moment = passing_per_token(shape, kind, half)
        if kind in again:
            found[f"{kind}, computed again"] = 0
            moment += each
        else:
            found[f"{kind}, kept"] = kinds.count(kind) * each
        passing = max(passing, moment)
    return found | {"while a block runs": passing}


def logits_bytes(shape: Shape, rows: int, half: int = 2) -> int:
    """Loss at so many supervised rows: log-softmax kept, logits and gradients of a chunk."""
    return _WIDE * shape.vocab * (rows + 2 * min(rows, LOGIT_ROWS)) + half * shape.hidden * rows


def matrix_parameters(shape: Shape, kinds: Sequence[str]) -> int:
    """Parameters of the blocks that multiply a token."""
    count = 0
    for kind in kinds:
        count += sum(o * i for o, i in linear_layers(shape, kind).values())
        if kind == "moe":
            count += shape.active * sum(o * i for o, i in routed_layers(shape).values())
            count += shape.experts * shape.hidden
    return count


def flops_per_token(
    shape: Shape, policy: str, adapters: Adapters, context: int, rows_share: float
) -> Mapping[str, float]:
    """Floating-point operations of a training step per token, by part.

    The base is frozen, so its backward pass computes gradients of inputs only: as much as forward.

    Args:
        shape, policy, adapters: as above; context: tokens of a prompt.
        rows_share: supervised tokens over all.
    """
    kinds, again = whole_blocks(shape), RECOMPUTED[policy]
    behind = shape.kinds[len(kinds) :]
    repeated = [kind for kind in kinds if kind in again]
    forward = 2.0 * matrix_parameters(shape, kinds)
    head = 2.0 * (shape.vocab * shape.hidden + matrix_parameters(shape, behind)) * rows_share
    n, p, h, g = shape.state, shape.mamba_dim, shape.mamba_heads, shape.mamba_groups
    scan = 2.0 * shape.chunk * (n * g + p * h) + 4.0 * n * p * h
    attention = 2.0 * context * shape.queries  # half of the square, two products

    def mixing(some: Sequence[str]) -> float:
        mamba, full = some.count("linear_attention"), some.count("full_attention")
        return mamba * scan + full * attention

    mixed = mixing(kinds)
    return {
        "matrices, forward and backward": 2 * forward,
        "scan and attention": 3 * mixed,
        "adapters": 6.0 * adapter_parameters(shape._replace(kinds=kinds), _dense(adapters)),
        "output layer": 2 * head,
        "computed again": 2.0 * matrix_parameters(shape, repeated) + mixing(repeated),
    }


def _dense(adapters: Adapters) -> Adapters:
    """Those that every token meets."""
    names = tuple(name for name in adapters.targets if not name.startswith("experts."))
    return adapters._replace(targets=names)
