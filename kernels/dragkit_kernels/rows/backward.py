"""Triton backward of gather_rows: the sum of segment_sum, over gradients grouped by table row."""

from __future__ import annotations

from torch import Tensor

from ..orders import grouped_index
from .forward import sum_rows


def gather_rows_bwd(grad: Tensor, rows: Tensor, by_row: list[Tensor], num_rows: int) -> Tensor:
    """Launches the sum (see `dragkit::gather_rows_bwd`)."""
    return sum_rows(grad, *(by_row or grouped_index(rows, num_rows)))
