"""dragkit::gather_rows_* and dragkit::segment_sum_*.

`by_row` holds perm and ptr of a GroupedIndex, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import HAS_TRITON
from ..library import forbid_double_backward, register, register_gradient
from . import torch_impl

if HAS_TRITON:
    from .backward import gather_rows_bwd
    from .forward import segment_sum_fwd
else:
    gather_rows_bwd = segment_sum_fwd = None


def _gather_fake(table: Tensor, rows: Tensor, *rest: object) -> Tensor:
    return table.new_empty(rows.shape[0], table.shape[1])


def _gather_bwd_fake(
    grad: Tensor, rows: Tensor, by_row: list[Tensor], num_rows: int, triton: bool
) -> Tensor:
    return grad.new_empty(num_rows, grad.shape[1])


def _gather_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    table, rows, by_row, ctx.triton = inputs
    ctx.num_rows = table.shape[0]
    ctx.save_for_backward(rows, *by_row)


def _gather_backward(ctx: object, grad: Tensor) -> Tensor:
    rows, *by_row = ctx.saved_tensors
    return torch.ops.dragkit.gather_rows_bwd(grad, rows, by_row, ctx.num_rows, ctx.triton)


def _segment_sum_fake(value: Tensor, segment: Tensor, num_segments: int, triton: bool) -> Tensor:
    return value.new_empty(num_segments, value.shape[1])


def _segment_sum_bwd_fake(grad: Tensor, segment: Tensor) -> Tensor:
    return grad.new_empty(segment.shape[0], grad.shape[1])


def _segment_sum_setup(ctx: object, inputs: tuple[object, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _segment_sum_backward(ctx: object, grad: Tensor) -> Tensor:
    return torch.ops.dragkit.segment_sum_bwd(grad, *ctx.saved_tensors)


register(
    "gather_rows_fwd(Tensor table, Tensor rows, Tensor[] by_row, bool triton) -> Tensor",
    torch_impl.gather_rows_fwd,
    _gather_fake,
    triton=torch_impl.gather_rows_fwd if HAS_TRITON else None,
)
register(
    "gather_rows_bwd(Tensor grad, Tensor rows, Tensor[] by_row, SymInt num_rows, bool triton)"
    " -> Tensor",
    torch_impl.gather_rows_bwd,
    _gather_bwd_fake,
    triton=gather_rows_bwd,
)
register(
    "segment_sum_fwd(Tensor value, Tensor segment, SymInt num_segments, bool triton) -> Tensor",
    torch_impl.segment_sum_fwd,
    _segment_sum_fake,
    triton=segment_sum_fwd,
)
register(
    "segment_sum_bwd(Tensor grad, Tensor segment) -> Tensor",
    torch_impl.segment_sum_bwd,
    _segment_sum_bwd_fake,
)
register_gradient("gather_rows_fwd", _gather_backward, _gather_setup)
register_gradient("segment_sum_fwd", _segment_sum_backward, _segment_sum_setup)
forbid_double_backward("gather_rows_bwd")
forbid_double_backward("segment_sum_bwd")
