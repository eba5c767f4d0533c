"""The Mamba-2 scan over a pack of sequences that lie end to end, and the states at their ends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import resolve_backend
from ..checks import check_float, check_index, check_shape, widest
from . import op as _op  # noqa: F401  (registers the ops)

__all__ = ["ssd_scan", "ssd_state"]


def ssd_scan(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    out_of: Tensor,
    skip: Tensor,
    position: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The state space scan of Mamba-2 over packed sequences.

    s_t = exp(rate dt_t) s_{t-1} + dt_t x_t into_t^T
    y_t = s_t out_of_t + skip x_t

    for every head, with a zero state where `position` is 0. Heads h G / H share maps: those of a
    group follow one another. Rows of padding are sequences too, such as position 0 everywhere.

    States, decays and sums are float32 (float64 if an argument is); a gradient that nobody asks for
    is not computed. Nothing but the inputs is kept for the backward pass. A number that is not
    finite makes NaN of the later results of its own sequence and, in the backward pass, of all its
    gradients, but leaves other sequences alone.

    Args:
        x: float [T, H, P] inputs.
        dt: float32 (or float64) [T, H] step sizes, not negative.
        rate: float [H], negative; skip: float [H].
        into, out_of: float [T, G, N], H a multiple of G.
        position: int32 [T] place of each row in its own sequence: 0 begins one, and within a
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
    _check(op, x, dt, rate, into, position)
    check_shape(op, "out_of", out_of, tuple(into.shape))
    check_shape(op, "skip", skip, (x.shape[1],))
    check_float(op, out_of=out_of, skip=skip)
    inputs = (x, dt, rate, into, out_of, skip)
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.ssd_scan_fwd(*inputs, position, triton)


def ssd_state(
    x: Tensor,
    dt: Tensor,
    rate: Tensor,
    into: Tensor,
    position: Tensor,
    last: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The states of `ssd_scan` after the last rows of sequences, to go on from token by token.

    Has no gradient.

    Args:
        x, dt, rate, into, position: see ssd_scan.
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
    _check(op, x, dt, rate, into, position)
    check_shape(op, "last", last, (None,))
    if last.dtype != torch.int64:
        raise ValueError(f"{op}: last must be int64, got {last.dtype}")
    inputs = (x, dt, rate, into)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        raise ValueError(f"{op}: has no gradient; call it under torch.no_grad()")
    triton = resolve_backend(op, widest(*inputs), backend) == "triton"
    return torch.ops.dragkit.ssd_state_fwd(*inputs, position, last, triton)


def _check(op: str, x: Tensor, dt: Tensor, rate: Tensor, into: Tensor, position: Tensor) -> None:
    check_shape(op, "x", x, (None, None, None))
    rows, heads, _ = x.shape
    check_shape(op, "dt", dt, (rows, heads))
    check_shape(op, "rate", rate, (heads,))
    check_shape(op, "into", into, (rows, None, None))
    check_shape(op, "position", position, (rows,))
    check_float(op, x=x, dt=dt, rate=rate, into=into)
    check_index(op, position=position)
    if dt.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{op}: dt must be float32 or float64, got {dt.dtype}")
    groups = into.shape[1]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"{op}: heads must be a multiple of groups, got x {tuple(x.shape)} "
            f"and into {tuple(into.shape)}"
        )
