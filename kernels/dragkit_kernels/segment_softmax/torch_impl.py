"""segment_softmax's gradient in PyTorch. Its forward is the reference."""

from __future__ import annotations

from torch import Tensor

from ..segments import segment_ids


def segment_softmax_bwd(grad: Tensor, p: Tensor, ptr: Tensor, count: Tensor | None) -> Tensor:
    """ds_v = p_v (dp_v - n_v sum_u p_u dp_u), the sum over v's graph."""
    segment = segment_ids(ptr, p.shape[0])
    weighted = p * grad
    total = p.new_zeros(ptr.shape[0]).index_add_(0, segment, weighted)
    counted = p if count is None else p * count
    return weighted.addcmul_(counted, total.index_select(0, segment), value=-1)
