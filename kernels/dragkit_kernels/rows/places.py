"""Which rows the places of a selection of facts hold."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Places(NamedTuple):
    """int32 [L] head node, pair and tail node of every place; N, P and N where it is empty."""

    head: Tensor
    pair: Tensor
    tail: Tensor


def places_of(
    index: Tensor,
    head: Tensor,
    fact_pair: Tensor,
    tail: Tensor,
    group_row: Tensor | None,
    num_nodes: int,
    num_pairs: int,
) -> Places:
    """The rows behind facts `index`, int32 [L], -1 for an empty place."""
    empty, fact = index < 0, index.clamp(min=0)
    if (head if group_row is None else group_row).shape[0] == 0:  # then all places are empty
        return Places(*(index.new_full(index.shape, n) for n in (num_nodes, num_pairs, num_nodes)))
    row = fact if group_row is None else group_row.index_select(0, fact)
    return Places(
        head.index_select(0, row).masked_fill(empty, num_nodes),
        fact_pair.index_select(0, row).masked_fill(empty, num_pairs),
        tail.index_select(0, row).masked_fill(empty, num_nodes),
    )
