"""Memory and work of training a Nemotron-H with LoRA, as functions of its shape and of tokens.

The figures of what a block keeps for its backward pass follow our own forward, tensor by tensor, in
the form it has in half precision on a GPU (`dragkit.generator.nemotron_h`); what counts them and
compares is `tests/memory_plan/test_memory.py`. What a block needs only while it runs is an estimate
from the sizes of the tensors that are alive together. All are bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dragkit.generator.generator import LOGIT_ROWS
from dragkit.generator.nemotron_h import RECOMPUTED
from dragkit.memory_plan.dims import (
    Adapters,
    Shape,
    adapter_parameters,
    block_parameters,
    end_parameters,
    matrix_parameters,
    routed_layers,
    whole_blocks,
)

# A float32 parameter in training: itself, its gradient and AdamW's two moments.
TRAINED = 16
_WIDE = 4
_INDEX = 8
# Ranks of routed adapters are padded to so many bytes.
_ALIGNMENT = 16


def _mamba_kept(s: Shape, lora: Adapters, half: int) -> int:
    # Into the convolution and the scan, and the two factors of the norm.
    kept = half * (s.projected - s.mamba_heads + s.convolved + s.inner)
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


def _feed_forward_kept(s: Shape, width: int, lora: Adapters, half: int) -> int:
    kept = half * width
    if "up_proj" in lora.targets:
        kept += half * (s.hidden + lora.rank)
    if "down_proj" in lora.targets:
        kept += half * (width + lora.rank)
    return kept


def _experts_kept(s: Shape, lora: Adapters, half: int) -> int:
    # Router: scores, the chosen experts and their weights before and after the division.
    kept = _WIDE * s.experts + s.active * (_INDEX + _WIDE) + _WIDE
    # Routed: after relu and after the way down, for every expert of a token; weights and orders.
    kept += s.active * (half * (s.expert_width + s.hidden) + _WIDE + 2 * _INDEX)
    up, down = (name in lora.targets for name in routed_layers(s))
    rank = -(-lora.rank * half // _ALIGNMENT) * _ALIGNMENT // half
    if up:
        kept += s.active * half * (s.hidden + rank)
    if down:
        kept += s.active * half * (s.expert_width + rank)
    return kept + _feed_forward_kept(s, s.shared_width, lora, half)


def kept_per_token(shape: Shape, kind: str, adapters: Adapters, half: int = 2) -> int:
    """Bytes that a block keeps of every token until its backward, without its input.

    Args:
        shape: of the model; kind: of the block; adapters: of the run.
        half: bytes of a number of the model's type, 2 in half precision.
    """
    if kind == "mlp":
        return _feed_forward_kept(shape, shape.dense_width, adapters, half)
    if kind == "moe":
        return _experts_kept(shape, adapters, half)
    mixer = _mamba_kept if kind == "linear_attention" else _attention_kept
    return mixer(shape, adapters, half)


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
        return shape.active * routed + 2 * half * shape.shared_width
    return half * (2 * shape.dense_width + 2 * shape.hidden)


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
    found = {"inputs of blocks": len(kinds) * half * shape.hidden}
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


def gathered_bytes(shape: Shape, half: int = 2) -> int:
    """Weights that a rank has beside its own part at a time, where weights are cut between ranks.

    What is outside of blocks stays for a pass. Of blocks it is the one in use, and the buffers in
    which this one and the next have come.
    """
    largest = max(block_parameters(shape, kind) for kind in shape.kinds)
    return half * (end_parameters(shape) + 3 * largest)


def prefill_per_token(shape: Shape, kind: str, half: int = 2) -> int:
    """What a block needs of every token of a pass without gradients, hidden states included."""
    hidden = half * shape.hidden
    if kind == "linear_attention":
        # Between its chunks the scan hands on states; behind it come the norm and the way out.
        states = _WIDE * shape.inner * shape.state // max(shape.chunk, 1)
        mixed = half * (shape.projected + shape.convolved + shape.inner) + _WIDE * shape.mamba_heads
        return mixed + max(states, half * shape.inner + hidden) + 2 * hidden
    if kind == "full_attention":
        return half * (2 * shape.queries + 2 * shape.keys) + 4 * hidden
    if kind == "moe":
        # Rows of the experts: read, between their layers, behind them, back in the order of tokens,
        # and these times the weights, which are float32, as their sum is.
        each = half * (3 * shape.hidden + shape.expert_width) + _WIDE * shape.hidden + 3 * _INDEX
        return shape.active * each + _WIDE * (shape.hidden + shape.experts) + 2 * hidden
    return half * 2 * shape.dense_width + max(half * shape.dense_width, 2 * hidden) + 2 * hidden


def decode_bytes(
    shape: Shape, sequences: int, prompt: int, answer: int, tokens: int, half: int = 2
) -> dict[str, int]:
    """Bytes of decoding at its peak, the last pass over prompts, by what they are for.

    Args:
        shape: of the model; sequences: decoded at once.
        prompt, answer: tokens of each, at most; tokens: of a pass over prompts, at most.
        half: as above.
    """
    mamba, full = (shape.kinds.count(kind) for kind in ("linear_attention", "full_attention"))
    state = _WIDE * shape.inner * shape.state + half * shape.convolved * shape.conv
    busiest = max((prefill_per_token(shape, kind, half) for kind in whole_blocks(shape)), default=0)
    return {
        "embeddings of prompts": sequences * prompt * half * shape.hidden,
        "keys and values": sequences * (prompt + answer) * full * 2 * half * shape.keys,
        "states of Mamba-2": sequences * mamba * state,
        "while a block runs": min(tokens, sequences * prompt) * busiest,
        "logits": sequences * shape.vocab * (half + _WIDE),
    }


def logits_bytes(shape: Shape, rows: int, half: int = 2) -> int:
    """Loss at so many supervised rows: log-softmax kept, logits and gradients of a chunk."""
    return _WIDE * shape.vocab * (rows + 2 * min(rows, LOGIT_ROWS)) + half * shape.hidden * rows


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
