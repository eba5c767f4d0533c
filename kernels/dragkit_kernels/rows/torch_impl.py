"""gather_rows and segment_sum in PyTorch. Each is the gradient of the other.

On a CPU index_add adds in the order of the rows. On a GPU it adds in the order in which threads
arrive, so the results of two runs may differ there.
"""

from __future__ import annotations

from torch import Tensor

from ..checks import accumulator_dtype


def gather_rows_fwd(table: Tensor, rows: Tensor, by_row: list[Tensor]) -> Tensor:
    """out_i = table[rows_i]. The kernels' path uses it too."""
    return table.index_select(0, rows)


def gather_rows_bwd(grad: Tensor, rows: Tensor, by_row: list[Tensor], num_rows: int) -> Tensor:
    """dtable_r = sum of grad_i over the i with rows_i = r."""
    return segment_sum_fwd(grad, rows, num_rows)


def segment_sum_fwd(value: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """out_b = sum of value_t over the t with segment_t = b, in float32 or float64."""
    dtype = accumulator_dtype(value)
    out = value.new_zeros(num_segments, value.shape[1], dtype=dtype)
    # index_add is several times as fast with int64 rows.
    return out.index_add_(0, segment.long(), value.to(dtype)).to(value.dtype)


def segment_sum_bwd(grad: Tensor, segment: Tensor) -> Tensor:
    """dvalue_t = grad[segment_t], on any device."""
    return grad.index_select(0, segment)
