"""Sums and softmax pieces over the rows of a ragged layout, in a fixed order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_ids(ptr: Tensor, num_rows: int) -> Tensor:
    """Segment of every row, without asking the device how long the segments are.

    Args:
        ptr: int [B+1] first row of each segment.
        num_rows: rows in all; those at or after `ptr[-1]` belong to no segment and get B.

    Returns:
        int64 [num_rows].
    """
    rows = torch.arange(num_rows, dtype=ptr.dtype, device=ptr.device)
    return torch.searchsorted(ptr[1:].contiguous(), rows, right=True)


def segment_ptr(segment: Tensor, num_segments: int) -> Tensor:
    """First row of every segment and the end of the last, the inverse of `segment_ids`.

    Args:
        segment: int [N], ascending; num_segments: B.

    Returns:
        int32 [B+1].
    """
    numbers = torch.arange(num_segments + 1, dtype=segment.dtype, device=segment.device)
    return torch.searchsorted(segment, numbers, out_int32=True)


def max_segment_length(ptr: Tensor) -> int:
    """Most rows of one segment; waits for the device."""
    return int((ptr[1:] - ptr[:-1]).max()) if ptr.shape[0] > 1 else 0


def padded_rows(ptr: Tensor, num_rows: int, width: int) -> Tensor:
    """Rows of every segment side by side.

    Args:
        ptr: int [B+1]; num_rows: rows in all; width: at least the rows of every segment.

    Returns:
        int64 [B, width], `num_rows` where a segment has no more.
    """
    column = torch.arange(width, device=ptr.device)
    rows = ptr[:-1].long().unsqueeze(1) + column
    return torch.where(rows < ptr[1:].unsqueeze(1), rows, num_rows)


def bag_sum(table: Tensor, rows: Tensor, ptr: Tensor, weight: Tensor | None = None) -> Tensor:
    """out_v = sum_{ptr[v] <= i < ptr[v+1]} weight_i table[rows_i]: gather, scale and sum in one.

    Not differentiable: for the inside of ops.

    Args:
        table: float32 or float64 [P, C].
        rows: int32 [E]; ptr: int32 [N+1]. Rows at or after `ptr[-1]` are left out or counted to the
            last segment, as PyTorch's device and dtype have it: padding has to weigh nothing.
        weight: like `table`, [E]; None stands for ones.

    Returns:
        [N, C].
    """
    # A table that requires a gradient would make embedding_bag prepare its own backward, and one
    # with gaps would be summed by another routine, with other roundings.
    table = table.detach().contiguous()
    return F.embedding_bag(
        rows, table, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def row_dots(table: Tensor, rows: Tensor, other: Tensor, other_rows: Tensor) -> Tensor:
    """<table[rows_e], other[other_rows_e]> for every e, without the gathered [E, C] tensors.

    Not differentiable: for the inside of ops.

    Args:
        table: [P, C], other: [N, C], float32 or float64; rows, other_rows: int32 [E].

    Returns:
        [E].
    """
    # The formula embedding_bag's own backward uses for per-sample weights (mode 0 is "sum").
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        other, table, rows, rows, other_rows, 0, -1
    )


def ordered_sum(value: Tensor, order: Tensor, ptr: Tensor) -> Tensor:
    """out_v = sum of value[order_i] over the segment v, in the order's sequence: [E] to [N]."""
    return bag_sum(value.unsqueeze(1), order, ptr).squeeze(1)
