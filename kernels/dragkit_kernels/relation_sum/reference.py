"""relation_sum by its formula: plain PyTorch, differentiable."""

from __future__ import annotations

from torch import Tensor

from ..checks import accumulator_dtype
from ..orders import FactIndex


def relation_sum_ref(table: Tensor, *, fact_index: FactIndex) -> Tensor:
    """out_v = sum_{e: tail=v} n_e table[pair_e] + sum_{e: head=v} m_e table[pair_e]."""
    rows = table.to(accumulator_dtype(table)).index_select(0, fact_index.fact_pair)
    out = rows.new_zeros(fact_index.num_nodes, table.shape[1])
    out = out.index_add(0, fact_index.tail, rows * fact_index.tail_count.unsqueeze(1))
    out = out.index_add(0, fact_index.head, rows * fact_index.head_count.unsqueeze(1))
    return out.to(table.dtype)
