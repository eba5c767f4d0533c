"""Triton forward of prompt_tokens and prompt_embeddings."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, Tile, Tile2D, spec

TOKEN_TILE = Tile(128, 4)
# Each row is a long contiguous copy.
EMBEDDING_TILE = Tile2D(rows=4, columns=256, num_warps=4)


@triton.jit
def _search_ends(ends_ptr, size, steps, value):
    """Index of the first of `size` ascending numbers above `value`, at most size - 1."""
    low = tl.zeros_like(value)
    high = low + size - 1
    for _ in range(steps):
        middle = (low + high) // 2
        is_above = tl.load(ends_ptr + middle) > value
        low = tl.where(is_above, low, tl.minimum(middle + 1, high))
        high = tl.where(is_above, middle, high)
    return low


@triton.jit(
    do_not_specialize=["num_prompts", "num_pieces", "num_tokens", "prompt_steps", "piece_steps"]
)
def _prompt_tokens_fwd_kernel(
    source_ptr, start_ptr, end_ptr, slot_ptr, question_ptr, rowptr_ptr,
    ids_ptr, slots_ptr, position_ptr, sequence_ptr,
    num_prompts, num_pieces, num_tokens, prompt_steps, piece_steps,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Finds prompt and piece of every token by binary search. One program per BLOCK_T tokens."""
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    sequence = _search_ends(rowptr_ptr + 1, num_prompts, prompt_steps, offs_t)
    position = offs_t - tl.load(rowptr_ptr + sequence)
    first_piece = tl.load(question_ptr + sequence).to(tl.int64) * num_pieces
    piece = _search_ends(end_ptr + first_piece, num_pieces, piece_steps, position)
    row = first_piece + piece
    slot = tl.load(slot_ptr + row)
    # The first piece begins at 0. The end before it in memory is that of another prompt.
    piece_offset = position - tl.load(end_ptr + row - 1, mask=piece > 0, other=0)
    has_vector = slot >= 0
    is_vector = has_vector & (piece_offset == 0)
    source_row = tl.load(start_ptr + row).to(tl.int64) + piece_offset - has_vector.to(tl.int32)
    # A vector reads no text, because source_row may be out of bounds.
    ids = tl.load(source_ptr + source_row, mask=mask_t & (is_vector == 0), other=0)
    tl.store(ids_ptr + offs_t, ids, mask=mask_t)
    tl.store(slots_ptr + offs_t, tl.where(is_vector, slot, -1), mask=mask_t)
    tl.store(position_ptr + offs_t, position, mask=mask_t)
    tl.store(sequence_ptr + offs_t, sequence, mask=mask_t)


@triton.jit(do_not_specialize=["num_tokens"])
def _prompt_embeddings_fwd_kernel(
    table_ptr, ids_ptr, vectors_ptr, slot_ptr,
    out_ptr,
    num_tokens, num_columns,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out_t = vectors[slot_t] if slot_t >= 0, else table[ids_t]. One program per output tile."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < num_tokens
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < num_columns)[None, :]
    slot = tl.load(slot_ptr + offs_t, mask=mask_t, other=-1)
    ids = tl.load(ids_ptr + offs_t, mask=mask_t, other=0)
    has_vector = (slot >= 0)[:, None]
    offs = ids[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    text = tl.load(table_ptr + offs, mask=mask_t[:, None] & mask_c & (has_vector == 0), other=0.0)
    offs = slot[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    vector = tl.load(vectors_ptr + offs, mask=has_vector & mask_c, other=0.0)
    value = tl.where(has_vector, vector.to(text.dtype), text)
    offs = offs_t[:, None] * num_columns + offs_c[None, :]
    tl.store(out_ptr + offs, value, mask=mask_t[:, None] & mask_c)


def prompt_tokens_fwd(
    source: Tensor,
    start: Tensor,
    end: Tensor,
    slot: Tensor,
    question: Tensor,
    ptr: Tensor,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches the kernel with the arguments of `dragkit::prompt_tokens_fwd`."""
    out = tuple(source.new_empty(num_tokens) for _ in range(4))
    if num_tokens == 0:
        return out
    prompts, pieces = question.shape[0], start.shape[1]
    _prompt_tokens_fwd_kernel[(triton.cdiv(num_tokens, TOKEN_TILE.block),)](
        *(x.contiguous() for x in (source, start, end, slot, question, ptr)),
        *(*out, prompts, pieces, num_tokens),
        # A binary search among n ends takes ceil(log2(n)) steps.
        *((prompts - 1).bit_length(), (pieces - 1).bit_length()),
        BLOCK_T=TOKEN_TILE.block,
        **TOKEN_TILE.options,
    )
    return out


def prompt_embeddings_fwd(table: Tensor, ids: Tensor, vectors: Tensor, slot: Tensor) -> Tensor:
    """Launches the kernel with the arguments of `dragkit::prompt_embeddings_fwd`."""
    out = table.new_empty(ids.shape[0], table.shape[1])
    if out.numel() == 0:
        return out
    _prompt_embeddings_fwd_kernel[EMBEDDING_TILE.grid(*out.shape)](
        *(x.contiguous() for x in (table, ids, vectors, slot)),
        *(out, *out.shape),
        BLOCK_T=EMBEDDING_TILE.rows,
        BLOCK_C=EMBEDDING_TILE.columns,
        **EMBEDDING_TILE.options,
    )
    return out


KERNELS = (
    spec(_prompt_tokens_fwd_kernel, ResourceLimits(registers=40, shared_bytes=0), tile=TOKEN_TILE),
    *(
        spec(
            _prompt_embeddings_fwd_kernel,
            ResourceLimits(registers=48, shared_bytes=4096, vector_loads=2),
            tile=EMBEDDING_TILE,
            dtype=dtype,
            vectors_ptr=vectors,
        )
        for dtype in ("*bf16", "*fp32")
        for vectors in ("*bf16", "*fp32")
    ),
)
