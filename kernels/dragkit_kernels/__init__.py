"""Ops over packs of ragged graphs and sequences: PyTorch, and Triton where a kernel exists."""

from __future__ import annotations

from .attention_pool import attention_pool, attention_pool_ref
from .backend import force_backend, resolve_backend
from .causal_conv import causal_conv, causal_conv_ref, causal_conv_state
from .fact_loss import fact_loss, fact_loss_ref
from .fact_scores import fact_scores, fact_scores_ref
from .gated_rms_norm import gated_rms_norm, gated_rms_norm_ref
from .gumbel_topk import FactSelection, draw_score, gumbel_topk, gumbel_topk_ref, top_facts
from .message_passing import (
    message_passing,
    message_passing_per_instruction,
    message_passing_ref,
)
from .noise import logistic_noise
from .orders import (
    FactGroups,
    FactIndex,
    GroupedIndex,
    build_fact_index,
    concat_fact_indexes,
    grouped_index,
)
from .prompt import (
    PromptTokens,
    prompt_embeddings,
    prompt_embeddings_ref,
    prompt_tokens,
    prompt_tokens_ref,
)
from .relation_gate import relation_gate, relation_gate_ref
from .relation_sum import relation_sum, relation_sum_ref
from .rows import (
    fact_rows,
    gather_rows,
    gather_rows_ref,
    segment_sum,
    segment_sum_ref,
)
from .segment_softmax import segment_softmax, segment_softmax_ref
from .ssd_scan import scan_chunk, ssd_scan, ssd_scan_ref, ssd_state, ssd_state_ref

__all__ = [
    "FactGroups",
    "FactIndex",
    "FactSelection",
    "GroupedIndex",
    "PromptTokens",
    "attention_pool",
    "attention_pool_ref",
    "build_fact_index",
    "causal_conv",
    "causal_conv_ref",
    "causal_conv_state",
    "concat_fact_indexes",
    "draw_score",
    "fact_loss",
    "fact_loss_ref",
    "fact_rows",
    "fact_scores",
    "fact_scores_ref",
    "force_backend",
    "gated_rms_norm",
    "gated_rms_norm_ref",
    "gather_rows",
    "gather_rows_ref",
    "grouped_index",
    "gumbel_topk",
    "gumbel_topk_ref",
    "logistic_noise",
    "message_passing",
    "message_passing_per_instruction",
    "message_passing_ref",
    "prompt_embeddings",
    "prompt_embeddings_ref",
    "prompt_tokens",
    "prompt_tokens_ref",
    "relation_gate",
    "relation_gate_ref",
    "relation_sum",
    "relation_sum_ref",
    "resolve_backend",
    "scan_chunk",
    "segment_softmax",
    "segment_softmax_ref",
    "segment_sum",
    "segment_sum_ref",
    "ssd_scan",
    "ssd_scan_ref",
    "ssd_state",
    "ssd_state_ref",
    "top_facts",
]
