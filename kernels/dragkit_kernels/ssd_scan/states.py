"""Triton kernels of the states between chunks, in either direction of time."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..launch import Budget, row_strided, spec
from .decays import chunk_rows, decay_logs, load_rows, product
from .tiles import PASS_TILE, TILES, ScanTile


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_scan_fwd_states_kernel(
    x_ptr,
    dt_ptr,
    log_ptr,
    B_ptr,
    seq_pos_ptr,
    state_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_x,
    stride_B,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
    TO_END: tl.constexpr,
):
    """state[c, h] = sum_j w_j x_j B_j^T over the rows j of chunk c, [P, N].

    With TO_END, w_j = dt_j times the decay to the chunk's end, of rows that feed the state there.
    Else w_j is the decay from the chunk's start, of rows that see the state there: the gradient of
    that state, where x is the gradient of y and `B` is C.
    """
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    first, offs_q, live, seq_pos, last = chunk_rows(seq_pos_ptr, chunk, num_rows, Q)
    log = tl.load(log_ptr + pid_h.to(tl.int64) * num_rows + first + offs_q, mask=live, other=0.0)
    if TO_END:
        live = live & (Q - 1 - offs_q <= last)
        whole = tl.sum(tl.where(offs_q == Q - 1, log, 0.0), 0)
        dt_ptr += first * num_heads + pid_h
        dt = tl.load(dt_ptr + offs_q * num_heads, mask=live, other=0.0)
        weight = tl.exp2(tl.where(live, whole - log, 0.0)) * dt
    else:
        live = live & (seq_pos > offs_q)
        weight = tl.exp2(log)
    # Rows that take no part are not loaded: a NaN there would outlive a weight of zero.
    x_ptr += first * stride_x + pid_h * num_width
    x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
    B_ptr += first * stride_B + pid_h // heads * num_states
    B = load_rows(B_ptr, offs_q, live, stride_B, offs_n, num_states)
    x = tl.where(live[:, None], x * weight[:, None], 0.0)
    state = tl.zeros((BLOCK_P, BLOCK_N), tl.float32)
    state = product(tl.trans(x), B, state, LOW, x_ptr.dtype.element_ty)
    state_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    mask = (offs_p < num_width)[:, None] & (offs_n < num_states)[None, :]
    at = offs_p[:, None] * num_states + offs_n[None, :]
    tl.store(state_ptr + at, state, mask=mask)


@triton.jit(do_not_specialize=["num_chunks", "num_heads"])
def _ssd_scan_fwd_pass_kernel(
    state_ptr,
    chunk_decay_ptr,
    num_chunks,
    num_heads,
    num_elements,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """Replaces every chunk's own part by the state before it, s_{c+1} = chunk_decay_c s_c + part_c.

    With BACKWARD the same from the last chunk on: by what reaches the chunk from those after it.
    """
    pid_h = tl.program_id(0)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    state_ptr += pid_h.to(tl.int64) * num_elements
    chunk_decay_ptr += pid_h * num_chunks
    step = num_heads.to(tl.int64) * num_elements
    zeros = tl.zeros((BLOCK,), tl.float32)
    state = zeros
    chunk = (num_chunks - 1) * BACKWARD
    part = tl.load(state_ptr + chunk * step + offs, mask=mask, other=0.0)
    chunk_decay = tl.load(chunk_decay_ptr + chunk)
    for c in range(0, num_chunks):
        # The next part is on its way while this one is used; behind the last, that comes again.
        following = tl.minimum(c + 1, num_chunks - 1)
        if BACKWARD:
            following = num_chunks - 1 - following
        next_part = tl.load(state_ptr + following * step + offs, mask=mask, other=0.0)
        next_chunk_decay = tl.load(chunk_decay_ptr + following)
        tl.store(state_ptr + chunk * step + offs, state, mask=mask)
        # Chosen, not multiplied by zero: a NaN would outlive that.
        state = tl.where(chunk_decay < 0.0, part, tl.fma(state, zeros + chunk_decay, part))
        part, chunk_decay, chunk = next_part, next_chunk_decay, following


class Scan(NamedTuple):
    """Inputs of the kernels: rows of x and B may have gaps, all else is contiguous.

    Attributes:
        x, dt, A, B, seq_pos: see ssd_scan; tile: see scan_tile.
        log, chunk_decay: see decay_logs.
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
    def of(
        cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor, tile: ScanTile
    ) -> Scan:
        """Launches the logarithms of the decays."""
        dt, A, seq_pos = (t.contiguous() for t in (dt, A, seq_pos))
        log, chunk_decay = decay_logs(dt, A, seq_pos, tile.chunk)
        return cls(row_strided(x), dt, A, row_strided(B), seq_pos, log, chunk_decay, tile)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows, heads, heads of a group, head width, states."""
        rows, heads, width = self.x.shape
        return rows, heads, heads // self.B.shape[1], width, self.B.shape[2]

    @property
    def num_chunks(self) -> int:
        """Chunks that cover all rows."""
        return self.chunk_decay.shape[1]


def chunk_states(scan: Scan, *, backward: bool = False) -> Tensor:
    """Launches states and passing: float32 [chunks, H, P, N], the state before each chunk.

    With `backward` the gradient of the state after each chunk, for x = dy and B = C.
    """
    _, num_heads, _, num_width, num_states = scan.sizes
    tile, num_chunks = scan.tile, scan.num_chunks
    state = scan.log.new_empty(num_chunks, num_heads, num_width, num_states)
    blocks = triton.cdiv(num_width, tile.width), triton.cdiv(num_states, tile.states)
    _ssd_scan_fwd_states_kernel[(num_chunks * num_heads, *blocks)](
        *(scan.x, scan.dt, scan.log, scan.B, scan.seq_pos, state),
        *(*scan.sizes, scan.x.stride(0), scan.B.stride(0)),
        TO_END=int(not backward),
        **tile.options,
    )
    elements = num_width * num_states
    _ssd_scan_fwd_pass_kernel[(num_heads, triton.cdiv(elements, PASS_TILE.block))](
        *(state, scan.chunk_decay, num_chunks, num_heads, elements),
        BLOCK=PASS_TILE.block,
        BACKWARD=int(backward),
        **PASS_TILE.options,
    )
    return state


KERNELS = (
    *(
        spec(
            _ssd_scan_fwd_states_kernel,
            Budget(registers=96, shared=24576),
            tile=tile,
            dtype=dtype,
            constants={"TO_END": to_end},
        )
        for to_end in (1, 0)
        for dtype, tile in TILES.items()
    ),
    *(
        spec(
            _ssd_scan_fwd_pass_kernel,
            Budget(registers=64, shared=0, wide_loads=1),
            tile=PASS_TILE,
            constants={"BACKWARD": backward},
        )
        for backward in (0, 1)
    ),
)
