"""The facts of a pack, grouped by tail, by head and by (graph, relation) pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_index, check_shape
from .segments import segment_ptr


class FactIndex(NamedTuple):
    """E facts, and their permutations by tail, by head and by (graph, relation) pair. All int32.

    Facts are numbered in triple order. Every sort is stable, so sums run in a fixed sequence. A
    fact may stand for several equal ones, and its counts say how many (docs/method.md, section 3).

    Attributes:
        head, tail: [E] node rows of each fact.
        tail_ptr, tail_perm: [N+1], [E]. tail_perm[tail_ptr[v]:tail_ptr[v+1]] are the facts whose
            tail is v, ascending.
        head_ptr, head_perm: [N+1], [E] the same by head.
        pair_ptr, pair_perm: [P+1], [E] the same by (graph, relation) pair.
        pair_relation, pair_graph: [P] relation row and graph of each pair, ascending by (graph,
            relation).
        fact_pair: [E] pair of each fact.
        head_count, tail_count: [E] number of equal facts at one head node, and at one tail node.
            Both are 1 for a fact that was not merged.
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
    num_nodes, num_pairs = fact_index.num_nodes, fact_index.num_pairs
    sizes = {"tail_ptr": num_nodes + 1, "head_ptr": num_nodes + 1, "pair_ptr": num_pairs + 1}
    sizes |= {"pair_relation": num_pairs, "pair_graph": num_pairs}
    for name, tensor in zip(fact_index._fields, fact_index, strict=True):
        size = sizes.get(name, fact_index.num_facts)
        # Every op call runs this, so names are formatted for an error only.
        if tensor.shape != (size,):
            check_shape(op, f"fact_index.{name}", tensor, (size,))
        if tensor.dtype != torch.int32:
            raise ValueError(f"{op}: fact_index.{name} must be int32, got {tensor.dtype}")


def contiguous_index(index: Sequence[Tensor]) -> FactIndex:
    """A FactIndex of contiguous tensors, from its fields as an op receives them."""
    return FactIndex(*(x.contiguous() for x in index))


class FactGroups(NamedTuple):
    """The E facts of the questions, grouped by the Q merged facts that stand for them. All int32.

    Attributes:
        row: [E] merged fact of each fact.
        ptr, fact: [Q+1], [E]. fact[ptr[q]:ptr[q+1]] are the facts of merged fact q.
    """

    row: Tensor
    ptr: Tensor
    fact: Tensor


class GroupedIndex(NamedTuple):
    """The positions of an int32 index tensor [P], grouped by the row that they hold. int32.

    Attributes:
        perm: [P] positions, ascending by row. Equal rows keep their sequence.
        ptr: [R+1]. The positions perm[ptr[r]:ptr[r+1]] hold row r.
    """

    perm: Tensor
    ptr: Tensor


def grouped_index(rows: Tensor, num_rows: int) -> GroupedIndex:
    """Groups the positions of an index tensor by row, without waiting for the device.

    Args:
        rows: int32 [P]. Rows of `num_rows` or more come last and belong to no group.
        num_rows: R.

    Raises:
        ValueError: `rows` does not have one dimension, or is not int32.
    """
    check_shape("grouped_index", "rows", rows, (None,))
    check_index("grouped_index", rows=rows)
    sorted_rows, perm = torch.sort(rows, stable=True)
    return GroupedIndex(perm.int(), segment_ptr(sorted_rows, num_rows))


def check_grouped_index(
    op: str, name: str, index: GroupedIndex, num_positions: int, num_rows: int
) -> None:
    """Raises ValueError unless `index` has the sizes for `num_positions` and `num_rows`."""
    check_shape(op, f"{name}.perm", index.perm, (num_positions,))
    check_shape(op, f"{name}.ptr", index.ptr, (num_rows + 1,))
    check_index(op, **{f"{name}.perm": index.perm, f"{name}.ptr": index.ptr})


def _group_by(key: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
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

    This runs on the host, once per graph, when a data set is packed. `concat_fact_indexes` then
    joins the graphs of a pack.

    Args:
        head, tail: int [E] node rows, 0..num_nodes-1.
        relation: int [E] relation rows, 0 or more.
        num_nodes: N.
        fact_graph: int [E] graph of each fact. None means one graph.
        head_count, tail_count: int [E], see FactIndex. None means ones.

    Returns:
        The index, on the device of `head`.

    Raises:
        ValueError: sizes differ, or a row is out of range.
    """
    op = "build_fact_index"
    for name, tensor in (
        ("tail", tail),
        ("relation", relation),
        ("fact_graph", fact_graph),
        ("head_count", head_count),
        ("tail_count", tail_count),
    ):
        if tensor is not None:
            check_shape(op, name, tensor, tuple(head.shape[:1]))
    check_shape(op, "head", head, (None,))
    head, tail, relation = head.long(), tail.long(), relation.long()
    graph = torch.zeros_like(head) if fact_graph is None else fact_graph.long()
    if head.numel():
        low = int(torch.stack([head, tail]).min())
        high = int(torch.stack([head, tail]).max())
        if low < 0 or high >= num_nodes:
            raise ValueError(f"{op}: node rows must be in 0..{num_nodes - 1}, got {low}..{high}")
        if int(relation.min()) < 0 or int(graph.min()) < 0:
            raise ValueError(f"{op}: relation and graph rows must not be negative")
    # A radix above the largest relation row keeps (graph, relation) keys apart.
    radix = int(relation.max()) + 1 if relation.numel() else 1
    keys, fact_pair = torch.unique(graph * radix + relation, return_inverse=True)
    tail_ptr, tail_perm = _group_by(tail, num_nodes)
    head_ptr, head_perm = _group_by(head, num_nodes)
    pair_ptr, pair_perm = _group_by(fact_pair, keys.numel())
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


def concat_fact_indexes(graphs: Sequence[FactIndex]) -> FactIndex:
    """Joins the indexes of single graphs into that of a pack, without sorting.

    Args:
        graphs: one graph each. Their relation rows already refer to the pack's relation list.

    Returns:
        The result of `build_fact_index` for the joined facts.

    Raises:
        ValueError: `graphs` is empty.
    """
    if not graphs:
        raise ValueError("concat_fact_indexes: at least one graph is needed")
    nodes = facts = pairs = 0
    columns: dict[str, list[Tensor]] = {name: [] for name in FactIndex._fields}
    for number, graph in enumerate(graphs):
        # Added to the values of a field. Fields not listed hold fact numbers or fact offsets.
        offset = {
            "head": nodes,
            "tail": nodes,
            "pair_relation": 0,
            "pair_graph": number,
            "fact_pair": pairs,
            "head_count": 0,
            "tail_count": 0,
        }
        for name, column in zip(graph._fields, graph, strict=True):
            # The leading zero of a later ptr repeats the last offset of the graph before it.
            values = column[1:] if name.endswith("_ptr") and number else column
            columns[name].append(values + offset.get(name, facts))
        nodes += graph.num_nodes
        facts += graph.num_facts
        pairs += graph.num_pairs
    return FactIndex(**{name: torch.cat(values) for name, values in columns.items()})
