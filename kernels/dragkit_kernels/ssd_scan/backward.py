"""Triton backward of the scan: the gradient of x, and the launches of all gradients.

Gradients of steps and of maps are kernels of their own: together they would need more registers
than there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import spec
from .backward_maps import _ssd_scan_bwd_maps_kernel
from .backward_steps import DOT_BLOCK, _ssd_scan_bwd_steps_kernel
from .decays import (
    chunk_rows,
    decay_logs,
    finite,
    flaw,
    load_rows,
    load_state,
    product,
    scores,
    sees,
)
from .states import chunk_states
from .tiles import GRADIENT_BUDGETS, TILES, rows_of, scan_tile


@triton.jit(do_not_specialize=["num_rows", "num_heads", "heads"])
def _ssd_scan_bwd_x_kernel(
    grad_ptr,
    x_ptr,
    dt_ptr,
    log_ptr,
    into_ptr,
    out_of_ptr,
    skip_ptr,
    position_ptr,
    d_state_ptr,
    d_x_ptr,
    direct_ptr,
    fed_ptr,
    d_skip_ptr,
    num_rows,
    num_heads,
    heads,
    num_width,
    num_states,
    stride_grad,
    stride_x,
    stride_into,
    stride_out_of,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    LOW: tl.constexpr,
):
    """Gradient of x for the rows of a chunk and a head: dt_j v_j + (skip + dt_j own_j) dy_j, where
    v_j = sum_{i>j} exp(log_i - log_j) (out_of_i . into_j) dy_i + exp(log_end - log_j) dS into_j and
    own_j = out_of_j . into_j. Also direct_j = x_j . v_j, and the sums over the rows of x_j . dy_j
    and of dt_j times the second part of direct_j."""
    pid_h, chunk = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    first, offs_q, live, position, last = chunk_rows(position_ptr, chunk, num_rows, Q)
    kind = x_ptr.dtype.element_ty
    into_ptr += first * stride_into + pid_h // heads * num_states
    out_of_ptr += first * stride_out_of + pid_h // heads * num_states
    d_state_ptr += tl.program_id(0).to(tl.int64) * num_width * num_states
    at_log = pid_h.to(tl.int64) * num_rows + first + offs_q
    log = tl.load(log_ptr + at_log, mask=live, other=0.0)
    dt_ptr += first * num_heads + pid_h
    dt = tl.load(dt_ptr + offs_q * num_heads, mask=live, other=0.0)
    score, own = scores(
        into_ptr, out_of_ptr, log, offs_q, live, position, num_states, stride_into, stride_out_of,
        kind, Q, BLOCK_N, LOW,
    )  # fmt: skip
    feeds = live & (Q - 1 - offs_q <= last)
    whole = tl.sum(tl.where(offs_q == Q - 1, log, 0.0), 0)
    to_end = tl.exp2(tl.where(feeds, whole - log, 0.0))
    by_grad = tl.load(skip_ptr + pid_h).to(tl.float32) + dt * own
    direct = tl.zeros((Q,), tl.float32)
    fed, x_grad = direct, direct
    grad_ptr += first * stride_grad + pid_h * num_width
    x_ptr += first * stride_x + pid_h * num_width
    for begin in tl.range(0, num_width, BLOCK_P, num_stages=1):
        offs_p = begin + tl.arange(0, BLOCK_P)
        value = tl.zeros((Q, BLOCK_P), tl.float32)
        for start in tl.range(0, num_states, BLOCK_N, num_stages=1):
            offs_n = start + tl.arange(0, BLOCK_N)
            into = load_rows(into_ptr, offs_q, live, stride_into, offs_n, num_states)
            d_state = load_state(d_state_ptr, offs_p, num_width, offs_n, num_states)
            value = product(into, tl.trans(d_state), value, LOW, kind)
        value = tl.where(feeds[:, None], value * to_end[:, None], 0.0)
        x = load_rows(x_ptr, offs_q, live, stride_x, offs_p, num_width)
        fed += tl.sum(value * x, 1)
        grad = load_rows(grad_ptr, offs_q, live, stride_grad, offs_p, num_width)
        x_grad += tl.sum(grad * x, 1)
        # Rows that are not finite act on those they see by a sum, not in the products.
        spoiled = tl.where(sees(offs_q, position), flaw(grad)[:, None], 0.0)
        value += tl.sum(spoiled, 0)[:, None]
        value = product(tl.trans(score), finite(grad), value, LOW, kind)
        direct += tl.sum(value * x, 1)
        if d_x_ptr is not None:
            d_x = value * dt[:, None] + grad * by_grad[:, None]
            at = (first * num_heads + pid_h) * num_width
            at += offs_q[:, None] * (num_heads * num_width) + offs_p[None, :]
            mask = live[:, None] & (offs_p < num_width)[None, :]
            tl.store(d_x_ptr + at, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
    if direct_ptr is not None:
        tl.store(direct_ptr + at_log, direct, mask=live)
        tl.store(fed_ptr + tl.program_id(0), tl.sum(tl.where(feeds, fed * dt, 0.0), 0))
    if d_skip_ptr is not None:
        tl.store(d_skip_ptr + tl.program_id(0), tl.sum(x_grad, 0))


def ssd_scan_bwd(
    grad: Tensor,
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Launches what output_mask asks for; see `dragkit::ssd_scan_bwd`."""
    inputs = (x, dt, rate, into, out_of, skip)
    out = [
        t.new_empty(t.shape if wanted else (0,))
        for t, wanted in zip(inputs, output_mask, strict=True)
    ]
    if x.numel() == 0:
        return tuple(t.zero_() for t in out)
    num_rows, num_heads, num_width = x.shape
    groups, num_states = into.shape[1:]
    tile = scan_tile(grad, x, into, out_of)
    grad, x, into, out_of = (rows_of(t) for t in (grad, x, into, out_of))
    dt, rate, skip, position = (t.contiguous() for t in (dt, rate, skip, position))
    log, through = decay_logs(dt, rate, position, tile.chunk)
    sizes = (num_heads // groups, num_width, num_states, grad.stride(0), x.stride(0))
    strides = (into.stride(0), out_of.stride(0))
    to_x, to_dt, to_rate, to_into, to_out_of, to_skip = output_mask
    to_step = to_dt or to_rate
    chunks = through.shape[1]
    state = d_state = direct = fed = None
    if to_step or to_out_of:
        state = chunk_states(x, dt, log, through, into, position, tile)
    if to_x or to_step or to_into or to_skip:
        d_state = chunk_states(grad, dt, log, through, out_of, position, tile, backward=True)
    if to_x or to_step or to_skip:
        direct, fed = (log.new_empty(s) if to_step else None for s in (log.shape, through.shape))
        d_skip = log.new_empty(chunks, num_heads) if to_skip else None
        _ssd_scan_bwd_x_kernel[(chunks * num_heads,)](
            *(grad, x, dt, log, into, out_of, skip, position, d_state),
            *(out[0] if to_x else None, direct, fed, d_skip),
            *(num_rows, num_heads, *sizes, *strides),
            **tile.options,
        )
        if to_skip:
            out[5].copy_(d_skip.sum(0))
    if to_step:
        d_rate = log.new_empty(chunks, num_heads) if to_rate else None
        _ssd_scan_bwd_steps_kernel[(chunks * num_heads,)](
            *(grad, x, dt, rate, log, through, into, out_of, position, state, d_state),
            *(direct, fed, out[1] if to_dt else None, d_rate),
            *(num_rows, num_heads, *sizes, *strides),
            DOT_BLOCK=DOT_BLOCK,
            **tile.options,
        )
        if to_rate:
            out[2].copy_(d_rate.sum(0))
    grid = (chunks * groups, triton.cdiv(num_states, tile.states))
    for wanted, place, other, its_state, is_into in (
        (to_into, 3, out_of, d_state, 1),
        (to_out_of, 4, into, state, 0),
    ):
        if wanted and num_states > 0:
            _ssd_scan_bwd_maps_kernel[grid](
                *(grad, x, dt, log, other, position, its_state, out[place]),
                *(num_rows, groups, *sizes, other.stride(0)),
                INTO=is_into,
                **tile.options,
            )
    return tuple(out)


KERNELS = tuple(
    spec(_ssd_scan_bwd_x_kernel, GRADIENT_BUDGETS[tile], tile=tile, dtype=dtype)
    for dtype, tile in TILES.items()
)
