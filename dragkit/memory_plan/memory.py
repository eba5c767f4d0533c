"""Memory and work of training a Nemotron-H with LoRA, as functions of its shape and of tokens.

The figures of what a block keeps for its backward pass follow our own forward, tensor by tensor, in
the form it has in half precision on a GPU (`dragkit.generator.nemotron_h`); what counts them and
compares is `tests/memory_plan/test_memory.py`. What a block needs only while it runs is an estimate
from the sizes of the tensors that are alive together. All are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dragkit.generator.generator import LOGIT_ROWS
from dragkit.generator.nemotron_h import ACTIVATION_CHECKPOINTING
from dragkit.memory_plan.dims import (
    LoraDims,
    NemotronHDims,
    blocks_of_all_tokens,
    expert_layers,
    num_active_parameters,
    num_block_parameters,
    num_embedding_parameters,
    num_lora_parameters,
)

# A float32 parameter in training: itself, its gradient and AdamW's two moments.
BYTES_PER_TRAINED_PARAM = 16
_FLOAT32_BYTES = 4
_INT64_BYTES = 8
# Ranks of routed adapters are padded to so many bytes.
_LORA_RANK_ALIGNMENT = 16


def _mamba_saved(dims: NemotronHDims, lora: LoraDims, itemsize: int) -> int:
    # Into the convolution and the scan, and the two factors of the norm.
    kept = itemsize * (dims.in_proj_dim - dims.mamba_num_heads + dims.conv_dim + dims.d_inner)
    # Step sizes in float32: before softplus, before and after their limits.
    kept += 3 * _FLOAT32_BYTES * dims.mamba_num_heads
    if "in_proj" in lora.targets:
        kept += itemsize * (dims.hidden_size + lora.rank)
    if "out_proj" in lora.targets:
        kept += itemsize * (dims.d_inner + lora.rank)
    return kept


def _attention_saved(dims: NemotronHDims, lora: LoraDims, itemsize: int) -> int:
    kept = itemsize * (2 * dims.q_dim + 2 * dims.kv_dim) + _FLOAT32_BYTES * dims.num_attention_heads
    reads = sum(name in lora.targets for name in ("q_proj", "k_proj", "v_proj"))
    if reads:
        kept += itemsize * (dims.hidden_size + reads * lora.rank)
    if "o_proj" in lora.targets:
        kept += itemsize * lora.rank
    return kept


def _mlp_saved(dims: NemotronHDims, width: int, lora: LoraDims, itemsize: int) -> int:
    kept = itemsize * width
    if "up_proj" in lora.targets:
        kept += itemsize * (dims.hidden_size + lora.rank)
    if "down_proj" in lora.targets:
        kept += itemsize * (width + lora.rank)
    return kept


def _moe_saved(dims: NemotronHDims, lora: LoraDims, itemsize: int) -> int:
    # Router: scores, the chosen experts and their weights before and after the division.
    kept = (
        _FLOAT32_BYTES * dims.n_routed_experts
        + dims.num_experts_per_tok * (_INT64_BYTES + _FLOAT32_BYTES)
        + _FLOAT32_BYTES
    )
    # Routed: after relu and after the way down, for every expert of a token; weights and orders.
    kept += dims.num_experts_per_tok * (
        itemsize * (dims.moe_intermediate_size + dims.hidden_size)
        + _FLOAT32_BYTES
        + 2 * _INT64_BYTES
    )
    up, down = (name in lora.targets for name in expert_layers(dims))
    rank = -(-lora.rank * itemsize // _LORA_RANK_ALIGNMENT) * _LORA_RANK_ALIGNMENT // itemsize
    if up:
        kept += dims.num_experts_per_tok * itemsize * (dims.hidden_size + rank)
    if down:
        kept += dims.num_experts_per_tok * itemsize * (dims.moe_intermediate_size + rank)
    return kept + _mlp_saved(dims, dims.moe_shared_expert_intermediate_size, lora, itemsize)


def saved_bytes_per_token(
    dims: NemotronHDims, block_type: str, adapters: LoraDims, itemsize: int = 2
) -> int:
    """Bytes that a block keeps of every token until its backward, without its input.

    Args:
        shape: of the model; kind: of the block; adapters: of the run.
        half: bytes of a number of the model's type, 2 in half precision.
    """
    if block_type == "mlp":
        return _mlp_saved(dims, dims.intermediate_size, adapters, itemsize)
    if block_type == "moe":
        return _moe_saved(dims, adapters, itemsize)
    mixer = _mamba_saved if block_type == "linear_attention" else _attention_saved
    return mixer(dims, adapters, itemsize)


def backward_workspace_per_token(dims: NemotronHDims, block_type: str, itemsize: int = 2) -> int:
    """What a block needs of every token while its backward pass runs, estimated."""
    if block_type == "linear_attention":
        states = _FLOAT32_BYTES * dims.d_inner * dims.ssm_state_size // max(dims.chunk_size, 1)
        return itemsize * (2 * dims.in_proj_dim + 2 * dims.d_inner + dims.conv_dim) + 2 * states
    if block_type == "full_attention":
        return itemsize * (3 * dims.q_dim + 4 * dims.kv_dim + 2 * dims.hidden_size)
    if block_type == "moe":
        # Sums over a token's experts are float32, and so are the gradients of their terms.
        routed = (
            dims.hidden_size * (2 * _FLOAT32_BYTES + itemsize)
            + 2 * itemsize * dims.moe_intermediate_size
        )
        return (
            dims.num_experts_per_tok * routed
            + 2 * itemsize * dims.moe_shared_expert_intermediate_size
        )
    return itemsize * (2 * dims.intermediate_size + 2 * dims.hidden_size)


def activation_bytes_per_token(
    dims: NemotronHDims, policy: str, adapters: LoraDims, itemsize: int = 2
) -> dict[str, int]:
    """Bytes per token of a pass at its peak, by what they are for.

    Args:
        shape: of the model; policy: of `ACTIVATION_CHECKPOINTING`; adapters: of the run.
        itemsize: as above.

    Returns:
        "inputs of blocks", one entry per kind of block for what it keeps, and "while a block runs".
    """
    block_types, recomputed = blocks_of_all_tokens(dims), ACTIVATION_CHECKPOINTING[policy]
    found = {"inputs of blocks": len(block_types) * itemsize * dims.hidden_size}
    passing = 0
    for block_type in dict.fromkeys(block_types):
        each = saved_bytes_per_token(dims, block_type, adapters, itemsize)
        moment = backward_workspace_per_token(dims, block_type, itemsize)
        if block_type in recomputed:
            found[f"{block_type}, computed again"] = 0
            moment += each
        else:
            found[f"{block_type}, kept"] = block_types.count(block_type) * each
        passing = max(passing, moment)
    return found | {"while a block runs": passing}


def gathered_bytes(dims: NemotronHDims, itemsize: int = 2) -> int:
    """Weights that a rank has beside its own part at a time, where weights are cut between ranks.

    What is outside of blocks stays for a pass. Of blocks it is the one in use, and the buffers in
    which this one and the next have come.
    """
    largest = max(num_block_parameters(dims, block_type) for block_type in dims.block_types)
    return itemsize * (num_embedding_parameters(dims) + 3 * largest)


def prefill_bytes_per_token(dims: NemotronHDims, block_type: str, itemsize: int = 2) -> int:
    """What a block needs of every token of a pass without gradients, hidden states included."""
    hidden = itemsize * dims.hidden_size
    if block_type == "linear_attention":
        # Between its chunks the scan hands on states; behind it come the norm and the way out.
        states = _FLOAT32_BYTES * dims.d_inner * dims.ssm_state_size // max(dims.chunk_size, 1)
        mixed = (
            itemsize * (dims.in_proj_dim + dims.conv_dim + dims.d_inner)
            + _FLOAT32_BYTES * dims.mamba_num_heads
        )
        return mixed + max(states, itemsize * dims.d_inner + hidden) + 2 * hidden
    if block_type == "full_attention":
        return itemsize * (2 * dims.q_dim + 2 * dims.kv_dim) + 4 * hidden
    if block_type == "moe":
        # Rows of the experts: read, between their layers, behind them, back in the order of tokens,
        # and these times the weights, which are float32, as their sum is.
        each = (
            itemsize * (3 * dims.hidden_size + dims.moe_intermediate_size)
            + _FLOAT32_BYTES * dims.hidden_size
            + 3 * _INT64_BYTES
        )
        return (
            dims.num_experts_per_tok * each
            + _FLOAT32_BYTES * (dims.hidden_size + dims.n_routed_experts)
            + 2 * hidden
        )
    return (
        itemsize * 2 * dims.intermediate_size
        + max(itemsize * dims.intermediate_size, 2 * hidden)
        + 2 * hidden
    )


def decode_bytes(
    dims: NemotronHDims, sequences: int, prompt: int, answer: int, tokens: int, itemsize: int = 2
) -> dict[str, int]:
    """Bytes of decoding at its peak, the last pass over prompts, by what they are for.

    Args:
        shape: of the model; sequences: decoded at once.
        prompt, answer: tokens of each, at most; tokens: of a pass over prompts, at most.
        itemsize: as above.
    """
    mamba, full = (
        dims.block_types.count(block_type) for block_type in ("linear_attention", "full_attention")
    )
    state = (
        _FLOAT32_BYTES * dims.d_inner * dims.ssm_state_size
        + itemsize * dims.conv_dim * dims.conv_kernel
    )
    busiest = max(
        (
            prefill_bytes_per_token(dims, block_type, itemsize)
            for block_type in blocks_of_all_tokens(dims)
        ),
        default=0,
    )
    return {
        "embeddings of prompts": sequences * prompt * itemsize * dims.hidden_size,
        "keys and values": sequences * (prompt + answer) * full * 2 * itemsize * dims.kv_dim,
        "states of Mamba-2": sequences * mamba * state,
        "while a block runs": min(tokens, sequences * prompt) * busiest,
        "logits": sequences * dims.vocab_size * (itemsize + _FLOAT32_BYTES),
    }


def logits_bytes(dims: NemotronHDims, rows: int, itemsize: int = 2) -> int:
    """Loss at so many supervised rows: log-softmax kept, logits and gradients of a chunk."""
    return (
        _FLOAT32_BYTES * dims.vocab_size * (rows + 2 * min(rows, LOGIT_ROWS))
        + itemsize * dims.hidden_size * rows
    )


def flops_per_token(
    dims: NemotronHDims, policy: str, adapters: LoraDims, context: int, rows_share: float
) -> Mapping[str, float]:
    """Floating-point operations of a training step per token, by part.

    The base is frozen, so its backward pass computes gradients of inputs only: as much as forward.

    Args:
        shape, policy, adapters: as above; context: tokens of a prompt.
        rows_share: supervised tokens over all.
    """
    block_types, recomputed = blocks_of_all_tokens(dims), ACTIVATION_CHECKPOINTING[policy]
    behind = dims.block_types[len(block_types) :]
    repeated = [block_type for block_type in block_types if block_type in recomputed]
    forward = 2.0 * num_active_parameters(dims, block_types)
    head = (
        2.0
        * (dims.vocab_size * dims.hidden_size + num_active_parameters(dims, behind))
        * rows_share
    )
    n, p, h, g = dims.ssm_state_size, dims.mamba_head_dim, dims.mamba_num_heads, dims.n_groups
    scan = 2.0 * dims.chunk_size * (n * g + p * h) + 4.0 * n * p * h
    attention = 2.0 * context * dims.q_dim  # half of the square, two products

    def mixing(some: Sequence[str]) -> float:
        mamba, full = some.count("linear_attention"), some.count("full_attention")
        return mamba * scan + full * attention

    mixed = mixing(block_types)
    return {
        "matrices, forward and backward": 2 * forward,
        "scan and attention": 3 * mixed,
        "adapters": 6.0
        * num_lora_parameters(dims._replace(block_types=block_types), _without_experts(adapters)),
        "output layer": 2 * head,
        "computed again": 2.0 * num_active_parameters(dims, repeated) + mixing(repeated),
    }


def _without_experts(adapters: LoraDims) -> LoraDims:
    """Those that every token meets."""
    names = tuple(name for name in adapters.targets if not name.startswith("experts."))
    return adapters._replace(targets=names)
