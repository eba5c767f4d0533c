"""Triton backward of prompt_embeddings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, spec
from .forward import EMBEDDING_TILE


@triton.jit(do_not_specialize=["num_tokens"])
def _prompt_embeddings_bwd_kernel(
    grad_ptr, slot_ptr,
    d_vectors_ptr,
    num_tokens, num_columns,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dvectors[slot_t] = grad_t. A slot has one token, so no two programs write the same row."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = tl.load(slot_ptr + offs_t, mask=offs_t < num_tokens, other=-1)
    mask = (slot >= 0)[:, None] & (offs_c < num_columns)[None, :]
    offs = offs_t[:, None] * num_columns + offs_c[None, :]
    grad = tl.load(grad_ptr + offs, mask=mask, other=0.0)
    offs = slot[:, None].to(tl.int64) * num_columns + offs_c[None, :]
    tl.store(d_vectors_ptr + offs, grad.to(d_vectors_ptr.dtype.element_ty), mask=mask)


def prompt_embeddings_bwd(grad: Tensor, slot: Tensor, num_slots: int, dtype: torch.dtype) -> Tensor:
    """Launches the kernel with the arguments of `dragkit::prompt_embeddings_bwd`."""
    d_vectors = grad.new_zeros(num_slots, grad.shape[1], dtype=dtype)
    if d_vectors.numel() == 0 or slot.shape[0] == 0:
        return d_vectors
    _prompt_embeddings_bwd_kernel[EMBEDDING_TILE.grid(*grad.shape)](
        *(grad.contiguous(), slot.contiguous(), d_vectors, *grad.shape),
        BLOCK_T=EMBEDDING_TILE.rows,
        BLOCK_C=EMBEDDING_TILE.columns,
        **EMBEDDING_TILE.options,
    )
    return d_vectors


KERNELS = tuple(
    spec(
        _prompt_embeddings_bwd_kernel,
        ResourceLimits(registers=40, shared_bytes=2048, vector_loads=1),
        tile=EMBEDDING_TILE,
        dtype=dtype,
        d_vectors_ptr=vectors,
    )
    for dtype in ("*bf16", "*fp32")
    for vectors in ("*bf16", "*fp32")
)
