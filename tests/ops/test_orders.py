"""FactIndex and GroupedIndex against plain Python sorting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit_kernels import FactIndex, build_fact_index, concat_fact_indexes, grouped_index
from dragkit_kernels.testing import Adjacency, random_adjacency


def check_grouping(ptr: torch.Tensor, facts: torch.Tensor, keys: list[int], groups: int) -> None:
    """Asserts that ptr and facts list the facts of every group in ascending order."""
    bounds = ptr.tolist()
    assert len(bounds) == groups + 1
    for group in range(groups):
        listed = facts[bounds[group] : bounds[group + 1]].tolist()
        assert listed == [e for e, key in enumerate(keys) if key == group]


def test_perms_list_the_facts_of_every_node_and_pair(pack: Adjacency) -> None:
    fact_index = pack.fact_index
    assert all(x.dtype == torch.int32 for x in fact_index)
    check_grouping(
        fact_index.tail_ptr, fact_index.tail_perm, fact_index.tail.tolist(), fact_index.num_nodes
    )
    check_grouping(
        fact_index.head_ptr, fact_index.head_perm, fact_index.head.tolist(), fact_index.num_nodes
    )
    check_grouping(
        fact_index.pair_ptr,
        fact_index.pair_perm,
        fact_index.fact_pair.tolist(),
        fact_index.num_pairs,
    )
    keys = list(zip(pack.fact_graph.tolist(), pack.relation.tolist(), strict=True))
    pairs = list(
        zip(fact_index.pair_graph.tolist(), fact_index.pair_relation.tolist(), strict=True)
    )
    assert pairs == sorted(set(keys))
    assert [pairs[i] for i in fact_index.fact_pair.tolist()] == keys


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 12)), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_concatenated_graphs_equal_one_sorted_pack(sizes: list[tuple[int, int]], seed: int) -> None:
    whole = random_adjacency(sizes, 4, seed=seed)
    parts = []
    for g, (nodes, _) in enumerate(sizes):
        facts = slice(int(whole.fact_ptr[g]), int(whole.fact_ptr[g + 1]))
        first = int(whole.node_ptr[g])
        parts.append(
            build_fact_index(
                whole.fact_index.head[facts] - first,
                whole.fact_index.tail[facts] - first,
                whole.relation[facts],
                nodes,
                head_count=whole.fact_index.head_count[facts],
                tail_count=whole.fact_index.tail_count[facts],
            )
        )
    joined = concat_fact_indexes(parts)
    for name, got, want in zip(FactIndex._fields, joined, whole.fact_index, strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, want), name


def test_graphs_without_nodes_are_concatenated() -> None:
    empty = build_fact_index(*(torch.zeros(0, dtype=torch.int64) for _ in range(3)), 0)
    one = build_fact_index(torch.tensor([0]), torch.tensor([1]), torch.tensor([3]), 2)
    joined = concat_fact_indexes([empty, one, empty])
    assert joined.pair_graph.tolist() == [1]
    assert joined.tail_ptr.tolist() == [0, 0, 1]
    assert (joined.num_nodes, joined.num_facts, joined.num_pairs) == (2, 1, 1)


def test_wrong_arguments() -> None:
    two, three = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"tail must have shape \[2\], got \[3\]"):
        build_fact_index(two, three, two, 4)
    with pytest.raises(ValueError, match=r"node rows must be in 0..1, got 0..2"):
        build_fact_index(three, three, three, 2)
    with pytest.raises(ValueError, match="negative"):
        build_fact_index(two, two, two - 1, 4)
    with pytest.raises(ValueError, match=r"tail_count must have shape \[2\], got \[3\]"):
        build_fact_index(two, two, two, 4, tail_count=three)
    with pytest.raises(ValueError, match="at least one graph"):
        concat_fact_indexes([])


@given(st.lists(st.integers(0, 6), max_size=30))
def test_grouped_index_lists_the_positions_of_every_row(rows: list[int]) -> None:
    """Rows 5 and 6 are not below R = 5, so they come after the last group."""
    order = grouped_index(torch.tensor(rows).int(), 5)
    assert order.perm.dtype == order.ptr.dtype == torch.int32
    check_grouping(order.ptr, order.perm, rows, 5)
    assert sorted(order.perm.tolist()) == list(range(len(rows)))


def test_grouped_index_refuses_other_tensors() -> None:
    with pytest.raises(ValueError, match="grouped_index: rows must be int32"):
        grouped_index(torch.zeros(3, dtype=torch.int64), 2)
    with pytest.raises(ValueError, match=r"rows must have shape \[\*\], got \[1, 3\]"):
        grouped_index(torch.zeros(1, 3, dtype=torch.int32), 2)
