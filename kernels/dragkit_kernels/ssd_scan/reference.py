"""The Mamba-2 scan by its recurrence, row by row: plain PyTorch with autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import accumulator_dtype


def ssd_scan_ref(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    seq_pos: Tensor,
) -> Tensor:
    """s_t = exp(A dt_t) s_{t-1} + dt_t x_t B_t^T, y_t = s_t C_t + D x_t.

    s_{t-1} is 0 where `seq_pos` is 0. Autograd saves the states of all rows.

    Args:
        x, dt, A, B, C, D, seq_pos: see ssd_scan.

    Returns:
        [T, H, P] with the dtype of `x`.
    """
    dtype = accumulator_dtype(x, dt, A, B, C, D)
    states = _states(x, dt, A, B, seq_pos, dtype)
    C = C.to(dtype).repeat_interleave(x.shape[1] // C.shape[1], 1)
    y = (states * C.unsqueeze(2)).sum(3)
    return (y + D.to(dtype).unsqueeze(1) * x.to(dtype)).to(x.dtype)


def ssd_state_ref(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor, last_row: Tensor
) -> Tensor:
    """[S, H, P, N] the states s_t at the rows t of `last_row`, see ssd_state."""
    return _states(x, dt, A, B, seq_pos, accumulator_dtype(x, dt, A, B))[last_row]


def _states(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, seq_pos: Tensor, dtype: torch.dtype
) -> Tensor:
    """[T, H, P, N] the state s_t of every row t."""
    x, dt, A, B = (t.to(dtype) for t in (x, dt, A, B))
    B = B.repeat_interleave(x.shape[1] // B.shape[1], 1)
    decay = (A * dt).exp()[:, :, None, None]
    gain = (dt.unsqueeze(2) * x).unsqueeze(3) * B.unsqueeze(2)
    # Select instead of multiplying by 0: a NaN of the previous sequence must not leak.
    begins = (seq_pos == 0).view(-1, 1, 1, 1)
    state = torch.zeros_like(gain[:1])
    states = [state[:0]]
    for t in range(len(gain)):
        row = slice(t, t + 1)
        state = torch.where(begins[row], 0.0, state) * decay[row] + gain[row]
        states.append(state)
    return torch.cat(states)
