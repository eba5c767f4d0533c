"""Triton kernels of the states between chunks, for the forward and the backward."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import ResourceLimits, row_strided, spec
from .decays import STATE_PASSING_TILE, TILES, ScanTile, chunk_rows, decay_logs, load_rows, product


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads_per_group"])
def _ssd_scan_fwd_states_kernel(
    x_ptr, dt_ptr, log_ptr, B_ptr, seq_pos_ptr,
    state_ptr,
    num_rows, num_heads, heads_per_group, head_dim, state_dim,
    stride_x, stride_B,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, LOW_PREC: tl.constexpr,
    TO_END: tl.constexpr,
):  # fmt: skip
    """state[c, h] = sum_j w_j x_j B_j^T over the rows j of chunk c, [P, N].

    With TO_END, w_j is dt_j times the decay from row j to the chunk's end, over the rows of the
    sequence that reaches the end. Without it, w_j is the decay from the chunk's start to row j,
    over the rows of the sequence that enters the chunk. For x = dy and B = C that is the gradient
    of the entering state. One program per chunk, head and block of the state.
    """
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    start, offs_q, mask_q, seq_pos, last_pos = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    log = tl.load(log_ptr + pid_h.to(tl.int64) * num_rows + start + offs_q, mask=mask_q, other=0.0)
    if TO_END:
        mask_q = mask_q & (Q - 1 - offs_q <= last_pos)
        log_end = tl.sum(tl.where(offs_q == Q - 1, log, 0.0), 0)
        dt_ptr += start * num_heads + pid_h
        dt = tl.load(dt_ptr + offs_q * num_heads, mask=mask_q, other=0.0)
        weight = tl.exp2(tl.where(mask_q, log_end - log, 0.0)) * dt
    else:
        mask_q = mask_q & (seq_pos > offs_q)
        weight = tl.exp2(log)
    # Mask the loads of other sequences: a NaN there would survive a weight of 0.
    x_ptr += start * stride_x + pid_h * head_dim
    x = load_rows(x_ptr, offs_q, mask_q, stride_x, offs_p, head_dim)
    B_ptr += start * stride_B + pid_h // heads_per_group * state_dim
    B = load_rows(B_ptr, offs_q, mask_q, stride_B, offs_n, state_dim)
    x = tl.where(mask_q[:, None], x * weight[:, None], 0.0)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    state = product(tl.trans(x), B, state, LOW_PREC, x_ptr.dtype.element_ty)
    state_ptr += tl.program_id(0).to(tl.int64) * head_dim * state_dim
    mask = (offs_p < head_dim)[:, None] & (offs_n < state_dim)[None, :]
    offs = offs_p[:, None] * state_dim + offs_n[None, :]
    tl.store(state_ptr + offs, state, mask=mask)


@triton.jit(do_not_specialize=["num_chunks", "num_heads"])
def _ssd_scan_fwd_state_passing_kernel(
    state_ptr, chunk_decay_ptr,
    num_chunks, num_heads, num_elements,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Replaces the gain of every chunk by the state before it: s_{c+1} = decay_c s_c + gain_c.

    With BACKWARD it runs from the last chunk to the first and stores the gradient of the state
    after each chunk. One program per head and BLOCK elements of the state.
    """
    pid_h = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    state_ptr += pid_h.to(tl.int64) * num_elements
    chunk_decay_ptr += pid_h * num_chunks
    chunk_stride = num_heads.to(tl.int64) * num_elements
    zeros = tl.zeros((BLOCK,), tl.float32)
    state = zeros
    chunk = (num_chunks - 1) * BACKWARD
    gain = tl.load(state_ptr + chunk * chunk_stride + offs, mask=mask, other=0.0)
    chunk_decay = tl.load(chunk_decay_ptr + chunk)
    for c in range(0, num_chunks):
        # Prefetch the next gain while this one is used. The last step loads its own gain again.
        next_chunk = tl.minimum(c + 1, num_chunks - 1)
        if BACKWARD:
            next_chunk = num_chunks - 1 - next_chunk
        next_gain = tl.load(state_ptr + next_chunk * chunk_stride + offs, mask=mask, other=0.0)
        next_chunk_decay = tl.load(chunk_decay_ptr + next_chunk)
        tl.store(state_ptr + chunk * chunk_stride + offs, state, mask=mask)
        # Select instead of multiplying by 0: a NaN state would survive that.
        state = tl.where(chunk_decay < 0.0, gain, tl.fma(state, zeros + chunk_decay, gain))
        gain, chunk_decay, chunk = next_gain, next_chunk_decay, next_chunk


class ScanInputs(NamedTuple):
    """Inputs of the kernels. x and B may be row-strided, all others are contiguous.

    Attributes:
        x, dt, A, B, seq_pos: see ssd_scan.
        log, chunk_decay: see decay_logs.
        tile: see scan_tile.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    seq_pos: Tensor
    log: Tensor
    chunk_decay: Tensor
    tile: ScanTile

    @classmethod
    def prepare(
        cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor, tile: ScanTile
    ) -> ScanInputs:
        """Makes the inputs contiguous and launches the logarithms of their decays."""
        dt, A, seq_pos = (t.contiguous() for t in (dt, A, seq_pos))
        log, chunk_decay = decay_logs(dt, A, seq_pos, tile.chunk)
        return cls(row_strided(x), dt, A, row_strided(B), seq_pos, log, chunk_decay, tile)

    @property
    def sizes(self) -> tuple[int, ...]:
        """(num_rows, num_heads, heads_per_group, head_dim, state_dim)."""
        num_rows, num_heads, head_dim = self.x.shape
        state_dim = self.B.shape[2]
        return num_rows, num_heads, num_heads // self.B.shape[1], head_dim, state_dim

    @property
    def num_chunks(self) -> int:
        """Number of chunks that cover all rows."""
        return self.chunk_decay.shape[1]


def chunk_states(scan: ScanInputs, *, backward: bool = False) -> Tensor:
    """Launches gains and state passing. Returns float32 [chunks, H, P, N].

    Result c is the state before chunk c. With `backward`, for x = dy and B = C, it is the gradient
    of the state after chunk c.
    """
    _, num_heads, _, head_dim, state_dim = scan.sizes
    tile, num_chunks = scan.tile, scan.num_chunks
    state = scan.log.new_empty(num_chunks, num_heads, head_dim, state_dim)
    blocks = triton.cdiv(head_dim, tile.width), triton.cdiv(state_dim, tile.states)
    _ssd_scan_fwd_states_kernel[(num_chunks * num_heads, *blocks)](
        *(scan.x, scan.dt, scan.log, scan.B, scan.seq_pos, state),
        *(*scan.sizes, scan.x.stride(0), scan.B.stride(0)),
        TO_END=int(not backward),
        **tile.options,
    )
    elements = head_dim * state_dim
    _ssd_scan_fwd_state_passing_kernel[
        (num_heads, triton.cdiv(elements, STATE_PASSING_TILE.block))
    ](
        *(state, scan.chunk_decay, num_chunks, num_heads, elements),
        BLOCK=STATE_PASSING_TILE.block,
        BACKWARD=int(backward),
        **STATE_PASSING_TILE.options,
    )
    return state


KERNELS = (
    *(
        spec(
            _ssd_scan_fwd_states_kernel,
            ResourceLimits(registers=96, shared_bytes=24576),
            tile=tile,
            dtype=dtype,
            constants={"TO_END": to_end},
        )
        for to_end in (1, 0)
        for dtype, tile in TILES.items()
    ),
    *(
        spec(
            _ssd_scan_fwd_state_passing_kernel,
            ResourceLimits(registers=64, shared_bytes=0, vector_loads=1),
            tile=STATE_PASSING_TILE,
            constants={"BACKWARD": backward},
        )
        for backward in (0, 1)
    ),
)
