"""Triton backward of gather_rows: the ordered sum of segment_sum over places sorted by row."""

from __future__ import annotations

from torch import Tensor

from ..orders import row_order
from .forward import sum_rows


def gather_rows_bwd(grad: Tensor, rows: Tensor, order: list[Tensor], num_rows: int) -> Tensor:
    """Launches the ordered sum; see `dragkit::gather_rows_bwd`."""
    return sum_rows(grad, *(order or row_order(rows, num_rows)))
