"""Bytes and FLOPs of training a Nemotron-H with LoRA, as functions of its dimensions and of tokens.

Saved bytes follow our forward in half precision on a GPU (`dragkit.generator.nemotron_h`), tensor
by tensor. `tests/memory_plan/test_memory.py` compares them with counted bytes. Workspace is
estimated from the sizes of the tensors that are alive together.
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
    linear_layers,
    num_active_parameters,
    num_block_parameters,
    num_embedding_parameters,
    num_lora_parameters,
)
from dragkit_kernels import scan_chunk

# A float32 parameter, its gradient and AdamW's two moments.
BYTES_PER_TRAINED_PARAM = 16
_FLOAT32_BYTES = 4
_INT64_BYTES = 8
# Adapters of routed experts pad their rank to a multiple of this many bytes.
_LORA_RANK_ALIGNMENT = 16


def _lora_saved(layers: dict[str, tuple[int, int]], lora: LoraDims) -> int:
    """Values that adapters save per token: each adapted layer's input, and its product with A."""
    adapted = [width for name, (_, width) in layers.items() if name in lora.targets]
    return sum(adapted) + lora.rank * len(adapted)


def _mamba_saved(dims: NemotronHDims, lora: LoraDims, itemsize: int) -> int:
    # The inputs of the convolution and of the scan, and both factors of the gated norm.
    values = dims.in_proj_dim - dims.mamba_num_heads + dims.conv_dim + dims.d_inner
    values += _lora_saved(linear_layers(dims, "linear_attention"), lora)
    # Time steps in float32: before softplus, before and after the clamp.
    return itemsize * values + 3 * _FLOAT32_BYTES * dims.mamba_num_heads


def _attention_saved(dims: NemotronHDims, lora: LoraDims, itemsize: int) -> int:
    layers = linear_layers(dims, "full_attention")
    # Queries, keys, values and output. The output is also the input of o_proj.
    values = 2 * dims.q_dim + 2 * dims.kv_dim + lora.rank * len(layers.keys() & set(lora.targets))
    if {"q_proj", "k_proj", "v_proj"} & set(lora.targets):
        values += dims.hidden_size  # the three layers share their input
    # The log-sum-exp of each query head.
    return itemsize * values + _FLOAT32_BYTES * dims.num_attention_heads


def _mlp_saved(dims: NemotronHDims, block_type: str, lora: LoraDims, itemsize: int) -> int:
    layers = linear_layers(dims, block_type)
    width, _ = layers["up_proj"]
    return itemsize * (width + _lora_saved(layers, lora))


def _moe_saved(dims: NemotronHDims, lora: LoraDims, itemsize: int) -> int:
    # Router: the scores, and the sum that divides the chosen weights.
    count = _FLOAT32_BYTES * (dims.n_routed_experts + 1)
    # Router, per chosen expert: its index, and its weight before the division and after it.
    # Dispatch, per chosen expert: two index lists.
    per_expert = 3 * _INT64_BYTES + 2 * _FLOAT32_BYTES
    padded = -(-lora.rank * itemsize // _LORA_RANK_ALIGNMENT) * _LORA_RANK_ALIGNMENT // itemsize
    # The output of relu and of down_proj.
    values = dims.moe_intermediate_size + dims.hidden_size
    values += _lora_saved(expert_layers(dims), lora._replace(rank=padded))
    count += dims.num_experts_per_tok * (per_expert + itemsize * values)
    return count + _mlp_saved(dims, "moe", lora, itemsize)


def saved_bytes_per_token(
    dims: NemotronHDims, block_type: str, lora: LoraDims, itemsize: int = 2
) -> int:
    """Bytes per token that a block saves for its backward, without the block's input.

    Args:
        dims: the model's dimensions.
        block_type: an entry of `dims.block_types`.
        lora: the run's adapters.
        itemsize: bytes per value in the model's dtype.
    """
    if block_type == "mlp":
        return _mlp_saved(dims, block_type, lora, itemsize)
    formulas = {
        "moe": _moe_saved,
        "linear_attention": _mamba_saved,
        "full_attention": _attention_saved,
    }
    return formulas[block_type](dims, lora, itemsize)


def _scan_state_bytes(dims: NemotronHDims, itemsize: int) -> int:
    """Bytes per token of one float32 state per chunk of our kernels."""
    return _FLOAT32_BYTES * dims.d_inner * dims.ssm_state_size // scan_chunk(itemsize)


def backward_workspace_per_token(dims: NemotronHDims, block_type: str, itemsize: int = 2) -> int:
    """Bytes per token that a block needs only while its backward runs, estimated."""
    if block_type == "linear_attention":
        values = 2 * dims.in_proj_dim + 2 * dims.d_inner + dims.conv_dim
        return itemsize * values + 2 * _scan_state_bytes(dims, itemsize)
    if block_type == "full_attention":
        return itemsize * (3 * dims.q_dim + 4 * dims.kv_dim + 2 * dims.hidden_size)
    if block_type == "moe":
        # The weighted sum over a token's experts is float32, and so are its terms' gradients.
        routed = dims.hidden_size * (2 * _FLOAT32_BYTES + itemsize)
        routed += 2 * itemsize * dims.moe_intermediate_size
        shared = 2 * itemsize * dims.moe_shared_expert_intermediate_size
        return dims.num_experts_per_tok * routed + shared
    return itemsize * (2 * dims.intermediate_size + 2 * dims.hidden_size)


def activation_bytes_per_token(
    dims: NemotronHDims, policy: str, lora: LoraDims, itemsize: int = 2
) -> dict[str, int]:
    """Bytes per token at the peak of a training pass, by component.

    Args:
        policy: a key of `ACTIVATION_CHECKPOINTING`.
        dims, lora, itemsize: see `saved_bytes_per_token`.

    Returns:
        "block inputs", one entry per block type for its saved tensors, and "block workspace".
    """
    block_types, recomputed = blocks_of_all_tokens(dims), ACTIVATION_CHECKPOINTING[policy]
    components = {"block inputs": len(block_types) * itemsize * dims.hidden_size}
    largest = 0
    for block_type in dict.fromkeys(block_types):
        saved = saved_bytes_per_token(dims, block_type, lora, itemsize)
        workspace = backward_workspace_per_token(dims, block_type, itemsize)
        if block_type in recomputed:
            # Recomputed blocks save their tensors one block at a time.
            components[f"{block_type}, recomputed"] = 0
            workspace += saved
        else:
            components[f"{block_type}, saved"] = block_types.count(block_type) * saved
        largest = max(largest, workspace)
    return components | {"block workspace": largest}


def gathered_bytes(dims: NemotronHDims, itemsize: int = 2) -> int:
    """Bytes of all-gathered weights that a rank holds beside its own shard, with FSDP.

    Embeddings and LM head stay gathered for the whole pass. Of the blocks, the current one and two
    prefetch buffers are resident.
    """
    largest = max(num_block_parameters(dims, block_type) for block_type in dims.block_types)
    return itemsize * (num_embedding_parameters(dims) + 3 * largest)


def prefill_bytes_per_token(dims: NemotronHDims, block_type: str, itemsize: int = 2) -> int:
    """Bytes per token that a block needs in a no-grad pass, its input and output included."""
    hidden = itemsize * dims.hidden_size
    if block_type == "linear_attention":
        mixed = itemsize * (dims.in_proj_dim + dims.conv_dim + dims.d_inner)
        mixed += _FLOAT32_BYTES * dims.mamba_num_heads
        # The scan's chunk states are gone before the gated norm and out_proj run.
        states = _scan_state_bytes(dims, itemsize)
        return mixed + max(states, itemsize * dims.d_inner + hidden) + 2 * hidden
    if block_type == "full_attention":
        return itemsize * (2 * dims.q_dim + 2 * dims.kv_dim) + 4 * hidden
    if block_type == "moe":
        # Rows of the experts: input, inner, output, and output in token order in the model's
        # dtype, the weighted output in float32, and three index lists.
        routed = itemsize * (3 * dims.hidden_size + dims.moe_intermediate_size)
        routed += _FLOAT32_BYTES * dims.hidden_size + 3 * _INT64_BYTES
        summed = _FLOAT32_BYTES * (dims.hidden_size + dims.n_routed_experts)
        return dims.num_experts_per_tok * routed + summed + 2 * hidden
    inner = itemsize * dims.intermediate_size
    return 2 * inner + max(inner, 2 * hidden) + 2 * hidden


def decode_bytes(
    dims: NemotronHDims, sequences: int, prompt: int, answer: int, tokens: int, itemsize: int = 2
) -> dict[str, int]:
    """Bytes at the peak of decoding, which is the last prefill pass, by component.

    Args:
        sequences: number of sequences decoded at once.
        prompt, answer: tokens of the longest prompt, and of the longest answer.
        tokens: tokens of the largest prefill pass.
        itemsize: bytes per value in the model's dtype.
    """
    num_mamba = dims.block_types.count("linear_attention")
    num_attention = dims.block_types.count("full_attention")
    state = _FLOAT32_BYTES * dims.d_inner * dims.ssm_state_size
    state += itemsize * dims.conv_dim * dims.conv_kernel
    keys_values = 2 * itemsize * dims.kv_dim * num_attention
    blocks = blocks_of_all_tokens(dims)
    busiest = max((prefill_bytes_per_token(dims, kind, itemsize) for kind in blocks), default=0)
    return {
        "prompt embeddings": sequences * prompt * itemsize * dims.hidden_size,
        "keys and values": sequences * (prompt + answer) * keys_values,
        "Mamba-2 states": sequences * num_mamba * state,
        "block workspace": min(tokens, sequences * prompt) * busiest,
        "logits": sequences * dims.vocab_size * (itemsize + _FLOAT32_BYTES),
    }


def logits_bytes(dims: NemotronHDims, rows: int, itemsize: int = 2) -> int:
    """Bytes of the loss at `rows` supervised tokens."""
    # log_softmax is saved for every row. Logits and their gradient exist for one chunk of rows.
    logits = _FLOAT32_BYTES * dims.vocab_size * (rows + 2 * min(rows, LOGIT_ROWS))
    return logits + itemsize * dims.hidden_size * rows


def flops_per_token(
    dims: NemotronHDims, policy: str, lora: LoraDims, context: int, supervised_fraction: float
) -> Mapping[str, float]:
    """FLOPs of a training step per token, by component.

    The base model is frozen, so its backward costs as much as its forward: it computes only the
    gradients of inputs.

    Args:
        dims, policy, lora: see `activation_bytes_per_token`.
        context: tokens of a prompt.
        supervised_fraction: supervised tokens over all tokens.
    """
    block_types, recomputed = blocks_of_all_tokens(dims), ACTIVATION_CHECKPOINTING[policy]
    supervised_blocks = dims.block_types[len(block_types) :]
    repeated = [block_type for block_type in block_types if block_type in recomputed]
    forward = 2.0 * num_active_parameters(dims, block_types)
    head_parameters = dims.vocab_size * dims.hidden_size
    head_parameters += num_active_parameters(dims, supervised_blocks)
    head = 2.0 * head_parameters * supervised_fraction
    n, p, h, g = dims.ssm_state_size, dims.mamba_head_dim, dims.mamba_num_heads, dims.n_groups
    scan = 2.0 * scan_chunk(itemsize=2) * (n * g + p * h) + 4.0 * n * p * h
    # Two products, each over half of the causal square.
    attention = 2.0 * context * dims.q_dim

    def mixing(kinds: Sequence[str]) -> float:
        return kinds.count("linear_attention") * scan + kinds.count("full_attention") * attention

    # A token does not meet every routed expert, so their adapters are left out.
    names = tuple(name for name in lora.targets if not name.startswith("experts."))
    adapters = num_lora_parameters(
        dims._replace(block_types=block_types), lora._replace(targets=names)
    )
    return {
        "matrices, forward and backward": 2 * forward,
        "scan and attention": 3 * mixing(block_types),
        "adapters": 6.0 * adapters,
        "LM head": 2 * head,
        "recomputation": 2.0 * num_active_parameters(dims, repeated) + mixing(repeated),
    }
