"""fact_scores in PyTorch, with a gradient that is a sum in a fixed order."""

from __future__ import annotations

from torch import Tensor

from ..checks import accumulator_dtype
from ..segments import ordered_sum


def fact_scores_fwd(
    head_score: Tensor,
    pair_score: Tensor,
    tail_score: Tensor,
    bias: Tensor,
    gathers: list[Tensor],
    sums: list[Tensor],
) -> Tensor:
    """l_e = a[head_q] + b[pair_q] + c[tail_q] + bias. Only the backward reads `sums`."""
    dtype = accumulator_dtype(head_score, pair_score, tail_score, bias)
    head, pair, tail, *row = gathers
    out = head_score.to(dtype).index_select(0, head)
    out += pair_score.to(dtype).index_select(0, pair)
    out += tail_score.to(dtype).index_select(0, tail)
    out.add_(bias.to(dtype))
    return out.index_select(0, row[0]) if row else out


def fact_scores_bwd(grad: Tensor, sums: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of grad over the facts with head v, of pair r, with tail v, and over all facts."""
    grad = grad.contiguous()  # sum().backward() sends a gradient with zero strides
    groupings = list(zip(sums[::2], sums[1::2], strict=True))
    for ptr, perm in groupings[3:]:
        grad = ordered_sum(grad, perm, ptr)
    return (*(ordered_sum(grad, perm, ptr) for ptr, perm in groupings[:3]), grad.sum())
