"""Registration of dragkit::ssd_scan_fwd, ssd_scan_bwd and ssd_state_fwd.

The products of a chunk mix its rows under a mask, and zero times NaN is NaN. The PyTorch path
therefore computes non-finite rows as zeros, and writes NaN into the rows that depend on them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..checks import accumulator_dtype
from ..library import (
    empty_gradients,
    forbid_double_backward,
    register,
    register_gradient,
)
from .torch_impl import scan_backward, scan_forward, scan_states

if HAS_TRITON:
    from .backward import ssd_scan_bwd
    from .forward import ssd_scan_fwd, ssd_state_fwd
else:
    ssd_scan_bwd = ssd_scan_fwd = ssd_state_fwd = None

_NUM_DIFFERENTIABLE = 6


def known_finite(*tensors: Tensor) -> bool:
    """Whether all values are finite. False for CUDA tensors, so that the host never waits."""
    return all(not x.is_cuda and bool(x.sum().isfinite()) for x in tensors)


def nonfinite_rows(*tensors: Tensor) -> Tensor:
    """bool [T] rows in which some tensor has a non-finite value."""
    finite = [x.isfinite().flatten(1).all(1) for x in tensors]
    return ~torch.stack(finite).all(0)


def zero_rows(tensor: Tensor, rows: Tensor) -> Tensor:
    """A copy of the tensor with zeros in the given rows."""
    return tensor.masked_fill(rows.view(-1, *(1,) * (tensor.dim() - 1)), 0)


def fill_nan(tensor: Tensor, rows: Tensor) -> None:
    """Writes NaN into the given rows."""
    tensor.masked_fill_(rows.view(-1, *(1,) * (tensor.dim() - 1)), float("nan"))


def rows_from(nonfinite: Tensor, seq_pos: Tensor) -> Tensor:
    """bool [T] rows with a non-finite row at or before them in their sequence."""
    running_count = nonfinite.cumsum(0)
    sequence_start = (torch.arange(len(nonfinite), device=nonfinite.device) - seq_pos).clamp_(min=0)
    return running_count > running_count[sequence_start] - nonfinite[sequence_start].long()


def sequence_rows(nonfinite: Tensor, seq_pos: Tensor) -> Tensor:
    """bool [T] rows of the sequences that contain a non-finite row."""
    sequence = (seq_pos == 0).cumsum(0)
    running_count = torch.zeros(len(nonfinite) + 1, dtype=torch.int64, device=nonfinite.device)
    return running_count.index_add_(0, sequence, nonfinite.long())[sequence] > 0


def _torch_fwd(*inputs: Tensor) -> Tensor:
    """The scan of (x, dt, A, B, C, D, seq_pos). NaN stays in its sequence."""
    x, dt, A, B, C, D, seq_pos = inputs
    if known_finite(x, dt, B, C):
        return scan_forward(*inputs)
    nonfinite, nonfinite_C = nonfinite_rows(x, dt, B), nonfinite_rows(C)
    x, dt, B = (zero_rows(t, nonfinite) for t in (x, dt, B))
    y = scan_forward(x, dt, A, B, zero_rows(C, nonfinite_C), D, seq_pos)
    fill_nan(y, rows_from(nonfinite, seq_pos) | nonfinite_C)
    return y


def _torch_bwd(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    """Gradients of the six float inputs. A non-finite value makes all of its sequence NaN."""
    x, dt, A, B, C, D, seq_pos, output_mask = arguments
    by_row = (grad, x, dt, B, C)
    if known_finite(*by_row):
        return scan_backward(grad, *arguments)
    nonfinite = nonfinite_rows(*by_row)
    grad, x, dt, B, C = (zero_rows(t, nonfinite) for t in by_row)
    out = scan_backward(grad, x, dt, A, B, C, D, seq_pos, output_mask)
    nonfinite = sequence_rows(nonfinite, seq_pos)
    for d_input, t, wanted in zip(out, (x, dt, A, B, C, D), output_mask, strict=True):
        if wanted:
            # The gradients of A and D sum over all rows, so any non-finite row reaches them.
            fill_nan(d_input, nonfinite.any().expand(len(t)) if t is A or t is D else nonfinite)
    return out


def _torch_state(*inputs: Tensor) -> Tensor:
    """States of (x, dt, A, B, seq_pos) at `last_row`. NaN stays in its sequence."""
    x, dt, A, B, seq_pos, last_row = inputs
    if known_finite(x, dt, B):
        return scan_states(*inputs)
    nonfinite = nonfinite_rows(x, dt, B)
    x, dt, B = (zero_rows(t, nonfinite) for t in (x, dt, B))
    state = scan_states(x, dt, A, B, seq_pos, last_row)
    fill_nan(state, rows_from(nonfinite, seq_pos)[last_row])
    return state


def _fake(x: Tensor, *rest: object) -> Tensor:
    return x.new_empty(x.shape)


def _bwd_fake(grad: Tensor, *rest: object) -> tuple[Tensor, ...]:
    return empty_gradients(rest[:_NUM_DIFFERENTIABLE], rest[-2])


def _state_fake(*arguments: object) -> Tensor:
    x, dt, A, B, _, last_row, _ = arguments
    shape = (last_row.shape[0], *x.shape[1:], B.shape[2])
    return x.new_empty(shape, dtype=accumulator_dtype(x, dt, A, B))


def _setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    *tensors, ctx.triton = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: object, grad: Tensor) -> tuple[Tensor, ...]:
    mask = list(ctx.needs_input_grad[:_NUM_DIFFERENTIABLE])
    return torch.ops.dragkit.ssd_scan_bwd(grad, *ctx.saved_tensors, mask, ctx.triton)


_INPUTS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor seq_pos"
register(f"ssd_scan_fwd({_INPUTS}, bool triton) -> Tensor", _torch_fwd, _fake, triton=ssd_scan_fwd)
register(
    f"ssd_scan_bwd(Tensor grad, {_INPUTS}, bool[] output_mask, bool triton) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _torch_bwd,
    _bwd_fake,
    triton=ssd_scan_bwd,
)
register_gradient("ssd_scan_fwd", _backward, _setup)
forbid_double_backward("ssd_scan_bwd")
register(
    "ssd_state_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor seq_pos, Tensor last_row, "
    "bool triton) -> Tensor",
    _torch_state,
    _state_fake,
    triton=ssd_state_fwd,
)
