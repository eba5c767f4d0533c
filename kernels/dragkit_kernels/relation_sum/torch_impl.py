"""relation_sum in PyTorch with its gradient written out, without an [E, C] tensor."""

from __future__ import annotations

from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactIndex
from ..segments import bag_sum


def relation_sum_fwd(table: Tensor, index: list[Tensor]) -> Tensor:
    """Sums the rows of each node's facts in both directions (see `relation_sum`)."""
    facts, rows = FactIndex(*index), table.to(accumulator_dtype(table))

    def direction(count: Tensor, perm: Tensor, ptr: Tensor) -> Tensor:
        weight = count.index_select(0, perm).to(rows.dtype)
        return bag_sum(rows, facts.fact_pair.index_select(0, perm), ptr, weight)

    out = direction(facts.tail_count, facts.tail_perm, facts.tail_ptr)
    return out.add_(direction(facts.head_count, facts.head_perm, facts.head_ptr)).to(table.dtype)


def relation_sum_bwd(grad: Tensor, index: list[Tensor]) -> Tensor:
    """dtable_r = sum over the facts e of pair r of n_e grad[tail_e] + m_e grad[head_e]."""
    # contiguous() because sum().backward() sends a gradient with zero strides.
    facts, rows = FactIndex(*index), grad.to(accumulator_dtype(grad)).contiguous()

    def direction(count: Tensor, node: Tensor) -> Tensor:
        weight = count.index_select(0, facts.pair_perm).to(rows.dtype)
        return bag_sum(rows, node.index_select(0, facts.pair_perm), facts.pair_ptr, weight)

    d_table = direction(facts.tail_count, facts.tail).add_(direction(facts.head_count, facts.head))
    return d_table.to(grad.dtype)
