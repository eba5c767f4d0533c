"""gather_rows and segment_sum by their formulas: plain PyTorch, differentiable."""

from __future__ import annotations

from torch import Tensor


def gather_rows_ref(table: Tensor, rows: Tensor) -> Tensor:
    """out_i = table[rows_i]."""
    return table[rows.long()]


def segment_sum_ref(value: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """out_b = sum of value_t over the t with segment_t = b."""
    out = value.new_zeros(num_segments, *value.shape[1:])
    return out.index_add(0, segment.long(), value)
