"""Triton helpers of all kernels of the scan: tiles, the rows of a chunk, decays, products."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..backend import INTERPRETED
from ..launch import ResourceLimits, Tile, spec
from .tiles import FLOAT32_TILE, HALF_TILE, ScanTile

# Other dtypes are multiplied in float32. The interpreter computes bfloat16 products wrongly.
TENSOR_CORE_DTYPES = (torch.float16,) if INTERPRETED else (torch.float16, torch.bfloat16)
# Elements of a state that a program carries from chunk to chunk.
STATE_PASSING_TILE = Tile(512, 4)

# LOWEST_LOG clamps the log2 of one row's decay, see slabs.py.
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST_LOG = tl.constexpr(-127.0)
_LARGEST = tl.constexpr(3.4028234663852886e38)
# Heads whose logarithms one program accumulates.
LOG_TILE = Tile(8, 1)
TILES = {"*bf16": HALF_TILE, "*fp32": FLOAT32_TILE}
GRADIENT_LIMITS = {
    HALF_TILE: ResourceLimits(registers=240, shared_bytes=32768),
    FLOAT32_TILE: ResourceLimits(registers=176, shared_bytes=16384),
}


def scan_tile(*tensors: Tensor) -> ScanTile:
    """The tile for tensors that are operands of products. Every tile takes any size."""
    dtypes = {t.dtype for t in tensors}
    return HALF_TILE if len(dtypes) == 1 and dtypes <= set(TENSOR_CORE_DTYPES) else FLOAT32_TILE


@triton.jit
def chunk_rows(seq_pos_ptr, chunk, num_rows, Q: tl.constexpr):
    """(start as int64, offs_q, mask_q, seq_pos [Q], last_pos) of a chunk.

    last_pos is seq_pos of the chunk's last row, or -1 beyond the last row of the pack.
    """
    start = chunk.to(tl.int64) * Q
    offs_q = tl.arange(0, Q)
    mask_q = offs_q < num_rows - start
    seq_pos = tl.load(seq_pos_ptr + start + offs_q, mask=mask_q, other=0)
    last_pos = tl.load(seq_pos_ptr + start + Q - 1, mask=start + Q - 1 < num_rows, other=-1)
    return start, offs_q, mask_q, seq_pos, last_pos


@triton.jit
def causal_mask(offs_q, seq_pos):
    """bool [Q, Q] whether row i depends on row j of its chunk."""
    distance = offs_q[:, None] - offs_q[None, :]
    return (distance >= 0) & (distance <= seq_pos[:, None])


@triton.jit
def decay(log, causal):
    """[Q, Q] decay from row j to row i, or 1 if not `causal`, so that exp2 cannot overflow."""
    return tl.exp2(tl.where(causal, log[:, None] - log[None, :], 0.0))


@triton.jit
def load_rows(ptr, offs_q, mask_q, stride, offs_k, num):
    """[Q, K] columns `offs_k` < `num` of a chunk's rows in float32, 0 where masked.

    `ptr` points at the chunk's first row, so that offsets within the tile fit into int32.
    """
    offs = offs_q[:, None] * stride + offs_k[None, :]
    mask = mask_q[:, None] & (offs_k < num)[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_state(ptr, offs_p, head_dim, offs_n, state_dim):
    """[P, N] block of the state at `ptr`, 0 where masked."""
    mask = (offs_p < head_dim)[:, None] & (offs_n < state_dim)[None, :]
    offs = offs_p[:, None] * state_dim + offs_n[None, :]
    return tl.load(ptr + offs, mask=mask, other=0.0)


@triton.jit
def finite(x):
    """x with 0 in place of non-finite values."""
    return tl.where(tl.abs(x) <= _LARGEST, x, 0.0)


@triton.jit
def nonfinite(x):
    """[Q] 0 for a row of finite values, else NaN."""
    return tl.sum(x * 0.0, 1)


@triton.jit
def product(a, b, acc, LOW_PREC: tl.constexpr, dot_dtype):
    """acc + a b with operands in `dot_dtype` if LOW_PREC, else in float32 without TF32."""
    if LOW_PREC:
        return tl.dot(a.to(dot_dtype), b.to(dot_dtype), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(
    B_ptr, C_ptr, log, offs_q, mask_q, seq_pos, state_dim, stride_B, stride_C, dot_dtype,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
):  # fmt: skip
    """(score [Q, Q], diagonal [Q]): decay_ij (C_i . B_j) for causal i > j else 0, and C_i . B_i."""
    score = tl.zeros((Q, Q), tl.float32)
    for start_n in tl.range(0, state_dim, BLOCK_N, num_stages=1):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        C = load_rows(C_ptr, offs_q, mask_q, stride_C, offs_n, state_dim)
        B = load_rows(B_ptr, offs_q, mask_q, stride_B, offs_n, state_dim)
        score = product(C, tl.trans(B), score, LOW_PREC, dot_dtype)
    is_diagonal = offs_q[:, None] == offs_q[None, :]
    diagonal = tl.sum(tl.where(is_diagonal, score, 0.0), 1)
    causal = causal_mask(offs_q, seq_pos) & ~is_diagonal
    return tl.where(causal, score * decay(log, causal), 0.0), diagonal


@triton.jit(do_not_specialize=["num_rows", "num_heads"])
def _ssd_scan_fwd_logs_kernel(
    dt_ptr, A_ptr, seq_pos_ptr,
    log_ptr, chunk_decay_ptr,
    num_rows, num_heads,
    Q: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """log[h, t] = sum of max(A dt log2(e), LOWEST_LOG) from the chunk's first row to row t.

    chunk_decay[h, c] = decay over chunk c, or -1 where a sequence begins in it. One program per
    chunk and BLOCK_H heads.
    """
    chunk, num_chunks = tl.program_id(0), tl.num_programs(0)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    mask_h = offs_h < num_heads
    start, offs_q, mask_q, _, last_pos = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    offs = start * num_heads + offs_q[:, None] * num_heads + offs_h[None, :]
    mask = mask_q[:, None] & mask_h[None, :]
    # A non-finite dt still reaches its own row as a factor of x, but no decay of other sequences.
    dt = finite(tl.load(dt_ptr + offs, mask=mask, other=0.0))
    A = tl.load(A_ptr + offs_h, mask=mask_h, other=0.0).to(tl.float32) * LOG2_E
    log = dt * A[None, :]
    log = tl.cumsum(tl.where(log < LOWEST_LOG, LOWEST_LOG, log), 0)
    offs = offs_h.to(tl.int64)[None, :] * num_rows + start + offs_q[:, None]
    tl.store(log_ptr + offs, log, mask=mask)
    # A masked sum reads the last element, because a tensor in registers cannot be indexed.
    log_end = tl.sum(tl.where((offs_q == Q - 1)[:, None], log, 0.0), 0)
    chunk_decay = tl.where(last_pos > Q - 1, tl.exp2(log_end), -1.0)
    tl.store(chunk_decay_ptr + offs_h * num_chunks + chunk, chunk_decay, mask=mask_h)


def decay_logs(dt: Tensor, A: Tensor, seq_pos: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Launches the logarithms. Returns float32 (log [H, T], chunk_decay [H, chunks])."""
    num_rows, num_heads = dt.shape
    num_chunks = triton.cdiv(num_rows, chunk)
    log, chunk_decay = dt.new_empty(num_heads, num_rows), dt.new_empty(num_heads, num_chunks)
    _ssd_scan_fwd_logs_kernel[(num_chunks, triton.cdiv(num_heads, LOG_TILE.block))](
        *(dt, A, seq_pos, log, chunk_decay),
        *(num_rows, num_heads),
        Q=chunk,
        BLOCK_H=LOG_TILE.block,
        **LOG_TILE.options,
    )
    return log, chunk_decay


KERNELS = tuple(
    spec(
        _ssd_scan_fwd_logs_kernel,
        ResourceLimits(registers=128, shared_bytes=4096),
        tile=LOG_TILE,
        constants={"Q": chunk},
    )
    for chunk in (FLOAT32_TILE.chunk, HALF_TILE.chunk)
)
