"""Triton backward of gather_rows: the ordered sum of segment_sum over places sorted by row."""

from __future__ import annotations

from torch import Tensor

from ..orders import RowOrder, row_order
from .forward import sum_rows


def gather_rows_bwd(
    grad: Tensor, rows: Tensor, place: Tensor | None, ptr: Tensor | None, num_rows: int
) -> Tensor:
    """Launches the ordered sum; see `dragkit::gather_rows_bwd`."""
    missing = place is None or ptr is None
    return sum_rows(grad, *(row_order(rows, num_rows) if missing else RowOrder(place, ptr)))
