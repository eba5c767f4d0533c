"""The facts of a pack in the three orders that forward and backward passes walk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_index, check_shape
from .segments import segment_ptr


class FactIndex(NamedTuple):
    """One set of E facts sorted by tail, by head and by (graph, relation); all int32.

    A fact's number is its place in the original triple order; every sort is stable, so sums run
    in a fixed sequence. A fact may stand for several equal ones (see docs/method.md, section 3):
    its counts say how many of them one head and one tail node has.

    Attributes:
        head, tail: [E] node rows of each fact.
        tail_ptr, tail_perm: [N+1], [E] facts whose tail is node v, `tail_perm[tail_ptr[v]:...]`.
        head_ptr, head_perm: [N+1], [E] the same by head.
        pair_ptr, pair_perm: [P+1], [E] the same by (graph, relation) pair.
        pair_relation, pair_graph: [P] relation row and graph of each pair, ascending by
            (graph, relation).
        fact_pair: [E] pair of each fact.
        head_count, tail_count: [E] facts like this one that start at a single head node, and that
            end in a single tail node; ones in a graph as it is.
    """

    head: Tensor
    tail: Tensor
    tail_ptr: Tensor
    tail_perm: Tensor
    head_ptr: Tensor
    head_perm: Tensor
    pair_ptr: Tensor
    pair_perm: Tensor
    pair_relation: Tensor
    pair_graph: Tensor
    fact_pair: Tensor
    head_count: Tensor
    tail_count: Tensor

    @property
    def num_nodes(self) -> int:
        """N."""
        return self.tail_ptr.shape[0] - 1

    @property
    def num_facts(self) -> int:
        """E."""
        return self.head.shape[0]

    @property
    def num_pairs(self) -> int:
        """P."""
        return self.pair_relation.shape[0]


def check_fact_index(op: str, fact_index: FactIndex) -> None:
    """Raises ValueError unless all fields are int32 and have the sizes of one set of facts."""
    facts, nodes, pairs = fact_index.num_facts, fact_index.num_nodes, fact_index.num_pairs
    sizes = {"tail_ptr": nodes + 1, "head_ptr": nodes + 1, "pair_ptr": pairs + 1}
    sizes |= {"pair_relation": pairs, "pair_graph": pairs}
    for name, tensor in zip(fact_index._fields, fact_index, strict=True):
        # The names of all fields would be formatted in every call.
        size = sizes.get(name, facts)
        if tensor.shape != (size,):
            check_shape(op, f"fact_index.{name}", tensor, (size,))
        if tensor.dtype != torch.int32:
            raise ValueError(f"{op}: fact_index.{name} must be int32, got {tensor.dtype}")


def contiguous_index(index: Sequence[Tensor]) -> FactIndex:
    """The fields of a FactIndex, as an op takes them, without gaps in memory."""
    return FactIndex(*(x.contiguous() for x in index))


class FactGroups(NamedTuple):
    """Which of the E facts of the questions a fact of `FactIndex` stands for; all int32.

    Attributes:
        row: [E] its row in the orders.
        ptr, fact: [Q+1], [E] the facts of row q, `fact[ptr[q]:ptr[q+1]]`; Q rows in the orders.
    """

    row: Tensor
    ptr: Tensor
    fact: Tensor


class GroupedIndex(NamedTuple):
    """Which places of an index tensor hold each of R rows; int32.

    Attributes:
        perm: [P] the places ascending by the row that they hold; equal rows keep their sequence.
        ptr: [R+1] `perm[ptr[r]:ptr[r+1]]` hold row r.
    """

    perm: Tensor
    ptr: Tensor


def grouped_index(rows: Tensor, num_rows: int) -> GroupedIndex:
    """Sorts the places of an index tensor by row, without asking the device for anything.

    Args:
        rows: int32 [P]; a row of `num_rows` or more belongs to none and comes last.
        num_rows: R.

    Raises:
        ValueError: `rows` does not have one dimension, or is not int32.
    """
    check_shape("grouped_index", "rows", rows, (None,))
    check_index("grouped_index", rows=rows)
    sorted_rows, perm = torch.sort(rows, stable=True)
    return GroupedIndex(perm.int(), segment_ptr(sorted_rows, num_rows))


def check_grouped_index(
    op: str, name: str, order: GroupedIndex, places: int, num_rows: int
) -> None:
    """Raises ValueError unless `order` sorts `places` places by `num_rows` rows."""
    check_shape(op, f"{name}.perm", order.perm, (places,))
    check_shape(op, f"{name}.ptr", order.ptr, (num_rows + 1,))
    check_index(op, **{f"{name}.perm": order.perm, f"{name}.ptr": order.ptr})


def _sort_by(key: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """Offsets [num_keys+1] and stable permutation [E] that group rows by key."""
    ptr = torch.zeros(num_keys + 1, dtype=torch.int32, device=key.device)
    ptr[1:] = torch.bincount(key, minlength=num_keys).cumsum(0)
    return ptr, torch.argsort(key, stable=True).to(torch.int32)


def build_fact_index(
    head: Tensor,
    tail: Tensor,
    relation: Tensor,
    num_nodes: int,
    fact_graph: Tensor | None = None,
    *,
    head_count: Tensor | None = None,
    tail_count: Tensor | None = None,
) -> FactIndex:
    """Sorts the facts of one graph or of a pack.

    Host work, done once per graph when a data set is packed; packs are then made with
    `concat_fact_indexes` or an equal concatenation.

    Args:
        head, tail: int [E] node rows, 0..num_nodes-1.
        relation: int [E] relation rows, 0 or more.
        num_nodes: N.
        fact_graph: int [E] graph of each fact; None means one graph.
        head_count, tail_count: int [E] see FactIndex; None means ones.

    Returns:
        The orders, on the device of `head`.

    Raises:
        ValueError: sizes differ, or a row is out of range.
    """
    for name, tensor in (
        ("tail", tail),
        ("relation", relation),
        ("fact_graph", fact_graph),
        ("head_count", head_count),
        ("tail_count", tail_count),
    ):
        if tensor is not None:
            check_shape("build_fact_index", name, tensor, tuple(head.shape[:1]))
    check_shape("build_fact_index", "head", head, (None,))
    head, tail, relation = head.long(), tail.long(), relation.long()
    graph = torch.zeros_like(head) if fact_graph is None else fact_graph.long()
    if head.numel():
        low = int(torch.stack([head, tail]).min())
        high = int(torch.stack([head, tail]).max())
        if low < 0 or high >= num_nodes:
            raise ValueError(
                f"build_fact_index: node rows must be in 0..{num_nodes - 1}, got {low}..{high}"
            )
        if int(relation.min()) < 0 or int(graph.min()) < 0:
            raise ValueError("build_fact_index: relation and graph rows must not be negative")
    # One relation row more than the largest keeps (graph, relation) keys apart.
    radix = int(relation.max()) + 1 if relation.numel() else 1
    keys, fact_pair = torch.unique(graph * radix + relation, return_inverse=True)
    tail_ptr, tail_perm = _sort_by(tail, num_nodes)
    head_ptr, head_perm = _sort_by(head, num_nodes)
    pair_ptr, pair_perm = _sort_by(fact_pair, keys.numel())
    ones = torch.ones_like(head, dtype=torch.int32)
    return FactIndex(
        head=head.int(),
        tail=tail.int(),
        tail_ptr=tail_ptr,
        tail_perm=tail_perm,
        head_ptr=head_ptr,
        head_perm=head_perm,
        pair_ptr=pair_ptr,
        pair_perm=pair_perm,
        pair_relation=(keys % radix).int(),
        pair_graph=torch.div(keys, radix, rounding_mode="floor").int(),
        fact_pair=fact_pair.int(),
        head_count=ones if head_count is None else head_count.int(),
        tail_count=ones if tail_count is None else tail_count.int(),
    )


def concat_fact_indexes(parts: Sequence[FactIndex]) -> FactIndex:
    """Joins the orders of single graphs into those of a pack, without sorting.

    Args:
        parts: one graph each, with relation rows that already count in the pack's relation list.

    Returns:
        What `build_fact_index` gives for the joined facts.

    Raises:
        ValueError: no parts.
    """
    if not parts:
        raise ValueError("concat_fact_indexes: at least one graph is needed")
    nodes = facts = pairs = 0
    columns: dict[str, list[Tensor]] = {name: [] for name in FactIndex._fields}
    for graph, part in enumerate(parts):
        offset = {
            "head": nodes,
            "tail": nodes,
            "pair_relation": 0,
            "pair_graph": graph,
            "fact_pair": pairs,
            "head_count": 0,
            "tail_count": 0,
        }
        for name, column in zip(part._fields, part, strict=True):
            # Later parts drop their leading zero: it is the previous part's last offset.
            piece = column[1:] if name.endswith("_ptr") and graph else column
            columns[name].append(piece + offset.get(name, facts))
        nodes += part.num_nodes
        facts += part.num_facts
        pairs += part.num_pairs
    return FactIndex(**{name: torch.cat(pieces) for name, pieces in columns.items()})
