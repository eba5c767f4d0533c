"""The Mamba-2 scan over packed sequences, and its states at given rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import ssd_scan_ref, ssd_state_ref
from .tiles import scan_chunk

__all__ = ["scan_chunk", "ssd_scan", "ssd_scan_ref", "ssd_state", "ssd_state_ref"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_pos: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The state space scan of Mamba-2 over packed sequences.

    s_t = exp(A dt_t) s_{t-1} + dt_t x_t B_t^T
    y_t = s_t C_t + D x_t

    for every head, where s_{t-1} is 0 if `seq_pos` is 0. H / G consecutive heads share a row of B
    and of C. A padding row is a sequence of one row, with seq_pos 0.

    States, decays and sums are float32, or float64 if an argument is. The op saves only its inputs
    and recomputes the states in the backward. A gradient that no argument requires is not computed.
    A non-finite input makes later results of its sequence NaN, and all gradients of that
    sequence. Other sequences are not affected.

    Args:
        x: float [T, H, P] inputs.
        dt: float32 or float64 [T, H] step sizes, at least 0.
        A: float [H], negative.
        B, C: float [T, G, N], where G divides H.
        D: float [H].
        seq_pos: int32 [T] position of a row in its own sequence, from 0. Values are not checked.
        backend: "auto", "triton" or "torch".

    Returns:
        [T, H, P] with the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: the backend is "triton" and Triton cannot run here.

    Source: Dao and Gu 2024, section 6.
    """
    op = "ssd_scan"
    _check(op, x, dt, A, B, seq_pos)
    check_shape(op, "C", C, tuple(B.shape))
    check_shape(op, "D", D, (x.shape[1],))
    check_float(op, C=C, D=D)
    inputs = (x, dt, A, B, C, D)
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.ssd_scan_fwd(*inputs, seq_pos, triton)


def ssd_state(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    seq_pos: Tensor,
    last_row: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The states s_t of `ssd_scan` at given rows, from which decoding continues. No gradient.

    Args:
        x, dt, A, B, seq_pos: see ssd_scan.
        last_row: int64 [S] rows t, such as the last of each sequence. Values are not checked.
        backend: "auto", "triton" or "torch".

    Returns:
        float32, or float64 if an argument is, [S, H, P, N].

    Raises:
        ValueError: shapes or dtypes do not fit, or an argument requires a gradient outside of
            torch.no_grad().
        RuntimeError: the backend is "triton" and Triton cannot run here.
    """
    op = "ssd_state"
    _check(op, x, dt, A, B, seq_pos)
    check_shape(op, "last_row", last_row, (None,))
    if last_row.dtype != torch.int64:
        raise ValueError(f"{op}: last_row must be int64, got {last_row.dtype}")
    inputs = (x, dt, A, B)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise ValueError(f"{op}: this op has no gradient, call it under torch.no_grad()")
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.ssd_state_fwd(*inputs, seq_pos, last_row, triton)


def _check(op: str, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor) -> None:
    check_shape(op, "x", x, (None, None, None))
    rows, heads, _ = x.shape
    check_shape(op, "dt", dt, (rows, heads))
    check_shape(op, "A", A, (heads,))
    check_shape(op, "B", B, (rows, None, None))
    check_shape(op, "seq_pos", seq_pos, (rows,))
    check_float(op, x=x, dt=dt, A=A, B=B)
    check_index(op, seq_pos=seq_pos)
    if dt.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: dt must be float32 or float64, got {dt.dtype}")
    groups = B.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{op}: heads must be a multiple of groups, got x {tuple(x.shape)} "
            f"and B {tuple(B.shape)}"
        )
