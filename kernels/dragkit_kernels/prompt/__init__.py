"""Prompts of text and structural vectors: their tokens, and the embeddings of these."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import prompt_embeddings_ref, prompt_tokens_ref

__all__ = [
    "PromptTokens",
    "prompt_embeddings",
    "prompt_embeddings_ref",
    "prompt_tokens",
    "prompt_tokens_ref",
]


class PromptTokens(NamedTuple):
    """T tokens of G prompts end to end.

    Attributes:
        ids: int32 [T] token ids, 0 at a structural vector.
        slot: int32 [T] row of the structural vector, -1 for text.
        position: int32 [T] position of the token in its prompt, from 0.
        sequence: int32 [T] prompt of the token, 0..G-1.
    """

    ids: Tensor
    slot: Tensor
    position: Tensor
    sequence: Tensor


def prompt_tokens(
    source: Tensor,
    start: Tensor,
    end: Tensor,
    slot: Tensor,
    question: Tensor,
    *,
    ptr: Tensor,
    num_tokens: int,
    backend: str = "auto",
) -> PromptTokens:
    """Lays G of B prompts end to end. Each prompt consists of P pieces.

    A piece is a run of text, which may be empty. A piece with a slot begins with one structural
    vector. Piece p of prompt b takes the positions end[b, p-1] to end[b, p] of the prompt.

    Args:
        source: int32 [W] token ids of all text.
        start: int32 [B, P] first row of a piece's text in `source`.
        end: int32 [B, P] end of a piece in its prompt, ascending.
        slot: int32 [B, P] row of the structural vector of a piece, -1 for none.
        question: int32 [G] the prompts to lay out, in this order.
        ptr: int32 [G+1] first token of each of them in the result, and T: the cumulative sums of
            their `end[:, -1]`.
        num_tokens: T, the last value of `ptr`.
        backend: "auto", "triton" or "torch".

    Returns:
        The tokens, without gradient.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.
    """
    op = "prompt_tokens"
    check_shape(op, "source", source, (None,))
    check_shape(op, "start", start, (None, None))
    check_shape(op, "end", end, tuple(start.shape))
    check_shape(op, "slot", slot, tuple(start.shape))
    check_shape(op, "question", question, (None,))
    check_shape(op, "ptr", ptr, (question.shape[0] + 1,))
    check_index(op, source=source, start=start, end=end, slot=slot, question=question, ptr=ptr)
    triton = resolve_backend(op, source, backend) == "triton"
    columns = torch.ops.dragkit.prompt_tokens_fwd(
        source, start, end, slot, question, ptr, num_tokens, triton
    )
    return PromptTokens(*columns)


def prompt_embeddings(
    table: Tensor, ids: Tensor, vectors: Tensor, slot: Tensor, *, backend: str = "auto"
) -> Tensor:
    """out_t = vectors[slot_t] if slot_t >= 0, else table[ids_t].

    Backward: dvectors_s = grad of the token with slot s, 0 if no token has it.

    Args:
        table: float [V, M] token embeddings without gradient.
        ids: int32 [T] rows of the table. A token with a slot may have any valid row.
        vectors: float [S, M], cast to the dtype of the table.
        slot: int32 [T] rows of `vectors`, -1 for text. A slot has at most one token.
        backend: "auto", "triton" or "torch".

    Returns:
        [T, M] with the dtype of `table`.

    Raises:
        ValueError: shapes or dtypes do not fit, or the table requires a gradient.
        RuntimeError: the backend is "triton" and Triton cannot run here.
    """
    op = "prompt_embeddings"
    check_shape(op, "table", table, (None, None))
    check_shape(op, "ids", ids, (None,))
    check_shape(op, "vectors", vectors, (None, table.shape[1]))
    check_shape(op, "slot", slot, tuple(ids.shape))
    check_float(op, table=table, vectors=vectors)
    check_index(op, ids=ids, slot=slot)
    if table.requires_grad:
        raise ValueError(
            f"{op}: table {list(table.shape)} requires a gradient, which this op does not compute. "
            "Freeze the token embeddings with requires_grad_(False)."
        )
    triton = resolve_backend(op, widest(table, vectors), backend) == "triton"
    return torch.ops.dragkit.prompt_embeddings_fwd(table, ids, vectors, slot, triton)
