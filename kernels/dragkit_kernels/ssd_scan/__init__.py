"""The Mamba-2 scan over a pack of sequences that lie end to end, and the states at their ends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from . import op as _op  # noqa: F401  (registers the ops)
from .reference import ssd_scan_ref, ssd_state_ref

__all__ = ["ssd_scan", "ssd_scan_ref", "ssd_state", "ssd_state_ref"]


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

    for every head, with a zero state where `seq_pos` is 0. Heads h G / H share maps: those of a
    group follow one another. Rows of padding are sequences too, with seq_pos 0 everywhere.

    States, decays and sums are float32 (float64 if an argument is); a gradient that nobody asks for
    is not computed. The backward keeps only the inputs. A number that is not
    finite makes NaN of the later results of its own sequence and, in the backward pass, of all its
    gradients, but leaves other sequences alone.

    Args:
        x: float [T, H, P] inputs.
        dt: float32 (or float64) [T, H] step sizes, not negative.
        A: float [H], negative; D: float [H].
        B, C: float [T, G, N], H a multiple of G.
        seq_pos: int32 [T] place of each row in its own sequence: 0 begins one, and within a
            sequence the next row has one more. Trusted, not checked.
        backend: "auto", "triton" or "torch".

    Returns:
        [T, H, P] with the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit.
        RuntimeError: Triton was asked for where it cannot run.

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
    """The states of `ssd_scan` after the last rows of sequences, to go on from token by token.

    Has no gradient.

    Args:
        x, dt, A, B, seq_pos: see ssd_scan.
        last: int64 [S] the last row of each wanted sequence, in any order. Trusted, not checked.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 (float64 if an argument is) [S, H, P, N].

    Raises:
        ValueError: shapes or dtypes do not fit, or an argument requires a gradient while gradients
            are recorded.
        RuntimeError: Triton was asked for where it cannot run.
    """
    op = "ssd_state"
    _check(op, x, dt, A, B, seq_pos)
    check_shape(op, "last_row", last_row, (None,))
    if last_row.dtype != torch.int64:
        raise ValueError(f"{op}: last_row must be int64, got {last_row.dtype}")
    inputs = (x, dt, A, B)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise ValueError(f"{op}: has no gradient; call it under torch.no_grad()")
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
