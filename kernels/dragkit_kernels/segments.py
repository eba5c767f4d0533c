"""Index arithmetic and ordered sums over the segments of a ragged layout, in PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_ids(ptr: Tensor, num_rows: int) -> Tensor:
    """Segment of every row, without waiting for the device.

    Args:
        ptr: int [B+1] first row of each segment.
        num_rows: number of rows. Rows at or after `ptr[-1]` are padding and get B.

    Returns:
        int64 [num_rows].
    """
    rows = torch.arange(num_rows, dtype=ptr.dtype, device=ptr.device)
    return torch.searchsorted(ptr[1:].contiguous(), rows, right=True)


def segment_ptr(segment: Tensor, num_segments: int) -> Tensor:
    """First row of every segment and the end of the last: the inverse of `segment_ids`.

    Args:
        segment: int [N], ascending.
        num_segments: B.

    Returns:
        int32 [B+1].
    """
    bounds = torch.arange(num_segments + 1, dtype=segment.dtype, device=segment.device)
    return torch.searchsorted(segment, bounds, out_int32=True)


def max_segment_length(ptr: Tensor) -> int:
    """Rows of the longest segment. The host waits for the device."""
    return int((ptr[1:] - ptr[:-1]).max()) if ptr.shape[0] > 1 else 0


def padded_rows(ptr: Tensor, num_rows: int, width: int) -> Tensor:
    """Row numbers of every segment as a padded matrix.

    Args:
        ptr: int [B+1] first row of each segment.
        num_rows: the value of padding.
        width: upper bound on the length of every segment.

    Returns:
        int64 [B, width].
    """
    column = torch.arange(width, device=ptr.device)
    rows = ptr[:-1].long().unsqueeze(1) + column
    return torch.where(rows < ptr[1:].unsqueeze(1), rows, num_rows)


def bag_sum(table: Tensor, rows: Tensor, ptr: Tensor, weight: Tensor | None = None) -> Tensor:
    """out_v = sum_{ptr[v] <= i < ptr[v+1]} weight_i table[rows_i], without the [E, C] tensor.

    It is not differentiable.

    Args:
        table: float32 or float64 [P, C].
        rows: int32 [E].
        ptr: int32 [N+1]. Depending on device and dtype, PyTorch adds rows at or after `ptr[-1]` to
            the last segment, so padding must have weight 0.
        weight: [E] with the dtype of `table`. None means ones.

    Returns:
        [N, C].
    """
    # detach: otherwise embedding_bag prepares its own backward. contiguous: strided tables take
    # another routine, which rounds differently.
    table = table.detach().contiguous()
    return F.embedding_bag(
        rows, table, ptr, mode="sum", per_sample_weights=weight, include_last_offset=True
    )


def row_dots(table: Tensor, rows: Tensor, other: Tensor, other_rows: Tensor) -> Tensor:
    """<table[rows_e], other[other_rows_e]> for every e, without the gathered [E, C] tensors.

    It is not differentiable.

    Args:
        table, other: float32 or float64 [P, C] and [N, C].
        rows, other_rows: int32 [E].

    Returns:
        [E].
    """
    # This is embedding_bag's gradient of its per-sample weights. Mode 0 is "sum".
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        other, table, rows, rows, other_rows, 0, -1
    )


def ordered_sum(value: Tensor, perm: Tensor, ptr: Tensor) -> Tensor:
    """out_v = sum of value[perm_i] over ptr[v] <= i < ptr[v+1], in that sequence: [E] to [N]."""
    return bag_sum(value.unsqueeze(1), perm, ptr).squeeze(1)
