"""Collated packs against packs that are built from names, one fact at a time."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dragkit.data.collate import PackedCollator
from dragkit.data.packed import QuestionBatch
from dragkit.data.store import PackedStore, StoredQuestion
from dragkit_kernels import FactGroups, FactIndex, build_fact_index, concat_fact_indexes

ROWS = 40
Collator = Callable[..., PackedCollator]


@pytest.fixture(scope="module")
def collate(
    random_rows: Callable[..., list[dict]],
    collator: Collator,
    tmp_path_factory: pytest.TempPathFactory,
) -> PackedCollator:
    path = tmp_path_factory.mktemp("forty") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in random_rows(ROWS, seed=7)))
    return collator(PackedStore.build_or_open(path, cache_dir=path.parent))


class ReferencePack:
    """Every field of a pack, built from names one fact at a time.

    `partition` gives the merged node of every node. None merges no nodes.
    """

    def __init__(
        self, store: PackedStore, rows: list[int], partition: Callable[..., list[int]] | None
    ) -> None:
        self.columns: dict[str, list] = defaultdict(list)
        names = store.relation_names
        relations = {r for row in rows for _, r, _ in store.question(row).triples}
        self.relations = sorted(relations, key=names.index)
        for graph, row in enumerate(rows):
            self.add(graph, store.question(row), partition)
        self.fact_index = self.index(range(len(self.columns["head"])))
        self.topic_facts = self.index(self.columns["near_topic"])
        row = self.tensor("row")
        ends = np.cumsum(np.bincount(row.numpy(), minlength=self.fact_index.num_facts))
        ptr = torch.tensor([0, *ends.tolist()], dtype=torch.int32)
        self.groups = FactGroups(row, ptr, row.argsort(stable=True).int())
        self.fields = {name: self.tensor(name).float() for name in ("topic_prob", "label")} | {
            name: self.tensor(name)
            for name in ("topic_node", "topic_graph", "node_count", "node_graph", "fact_graph")
        }
        self.relation_row = torch.tensor(list(map(names.index, self.relations)), dtype=torch.int64)

    def tensor(self, name: str) -> Tensor:
        dtype = torch.float32 if name == "topic_prob" else torch.int32
        return torch.tensor(self.columns[name], dtype=dtype)

    def index(self, rows: Sequence[int]) -> FactIndex:
        chosen = torch.tensor(list(rows), dtype=torch.int64)
        head, tail, relation, head_count, tail_count, graph = (
            self.tensor(name)[chosen]
            for name in ("head", "tail", "relation", "head_count", "tail_count", "row_graph")
        )
        counts = {"head_count": head_count, "tail_count": tail_count}
        num_nodes = len(self.columns["node_graph"])
        return build_fact_index(head, tail, relation, num_nodes, graph, **counts)

    def add(
        self, graph: int, question: StoredQuestion, partition: Callable[..., list[int]] | None
    ) -> None:
        columns = self.columns
        names, triples = list(question.entities), question.triples
        topics = [name for name in dict.fromkeys(question.topics) if name in names]
        merged = partition(names, topics, triples) if partition else list(range(len(names)))
        base, members = len(columns["node_graph"]), Counter(merged)
        node = {name: base + row for name, row in zip(names, merged, strict=True)}
        topic_nodes = sorted({node[name] for name in topics or names})
        for row in range(len(members)):
            is_topic = base + row in topic_nodes
            columns["topic_prob"].append(1 / len(topics or names) if is_topic else 0)
            columns["node_count"].append(members[row])
        columns["node_graph"] += [graph] * len(members)
        columns["topic_node"] += topic_nodes
        columns["topic_graph"] += [graph] * len(topic_nodes)
        keys = [(node[h], self.relations.index(r), node[t]) for h, r, t in triples]
        row_of: dict[tuple, int] = {}
        for (h, _, t), key in zip(triples, keys, strict=True):
            if key not in row_of:
                row_of[key] = row = len(columns["head"])
                same = [(a, z) for (a, _, z), k in zip(triples, keys, strict=True) if k == key]
                values = (*key, sum(a == h for a, _ in same), sum(z == t for _, z in same), graph)
                fields = ("head", "relation", "tail", "head_count", "tail_count", "row_graph")
                for name, value in zip(fields, values, strict=True):
                    columns[name].append(value)
                if key[0] in topic_nodes or key[2] in topic_nodes:
                    columns["near_topic"].append(row)
            columns["row"].append(row_of[key])
        columns["fact_graph"] += [graph] * len(triples)
        columns["label"] += question.labels


def check(batch: QuestionBatch, expected: ReferencePack) -> None:
    graph = batch.graph
    assert torch.equal(batch.relation_row, expected.relation_row)
    pairs = [(name, getattr(graph, name), value) for name, value in expected.fields.items()]
    for part in ("fact_index", "topic_facts", "groups"):
        names = getattr(expected, part)._fields
        columns = zip(names, getattr(graph, part), getattr(expected, part), strict=True)
        pairs += [(f"{part}.{name}", actual, value) for name, actual, value in columns]
    for name, actual, value in pairs:
        assert actual.dtype == value.dtype, name
        assert torch.equal(actual, value), name


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    "rows", [[0], [3, 1, 2], list(range(ROWS)), list(range(ROWS))[::-1], [5, 5, 5]]
)
def test_equals_the_reference_pack(
    rows: list[int],
    merge: bool,
    random_rows: Callable[..., list[dict]],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    collator: Collator,
    slow_merged_nodes: Callable[..., list[int]],
) -> None:
    packed = PackedStore.build_or_open(
        write_rows(random_rows(ROWS, seed=7)), cache_dir=tmp_path, merge=merge
    )
    batch = collator(packed)(rows)
    expected = ReferencePack(packed, rows, slow_merged_nodes if merge else None)
    check(batch, expected)
    graph = batch.graph
    facts = [packed.num_facts(row) for row in rows]
    nodes = np.bincount(expected.fields["node_graph"].numpy(), minlength=len(rows))
    num_entities = sum(len(packed.question(row).entities) for row in rows)
    assert int(graph.node_count.sum()) == num_entities
    assert merge or graph.num_nodes == num_entities
    assert graph.fact_ptr.tolist() == np.cumsum([0, *facts]).tolist()
    assert graph.node_ptr.tolist() == np.cumsum([0, *nodes]).tolist()
    assert (graph.num_graphs, graph.num_nodes) == (len(rows), nodes.sum())
    assert (graph.num_facts, graph.max_facts) == (sum(facts), max(facts))
    assert graph.question_key.tolist() == packed.question_key[rows].tolist()
    assert batch.question_states.flatten().tolist() == rows
    assert batch.rows == tuple(rows)
    assert batch.prefix is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_choice_of_questions(
    collate: PackedCollator, slow_merged_nodes: Callable[..., list[int]], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=12))
    check(collate(rows), ReferencePack(collate.store, rows, slow_merged_nodes))


def test_joined_packs_equal_one_pack(collate: PackedCollator) -> None:
    """Joining packs of one question gives the pack of all, if they share a list of relations."""
    rows = list(range(0, ROWS, 2))
    whole = collate(rows)
    parts = []
    for row in rows:
        single = collate([row])
        index = single.graph.fact_index
        relation = torch.searchsorted(
            whole.relation_row, single.relation_row[index.pair_relation.long()]
        )
        parts.append(index._replace(pair_relation=relation.int()))
    for name, value in concat_fact_indexes(parts)._asdict().items():
        assert torch.equal(getattr(whole.graph.fact_index, name), value), name


def test_questions_with_a_positive_fact_are_counted(collate: PackedCollator) -> None:
    has_positive = [any(collate.store.question(row).labels) for row in range(ROWS)]
    with_positive, without = has_positive.index(True), has_positive.index(False)
    for rows in (range(ROWS), [without], [with_positive, without]):
        assert collate(rows).num_labelled == sum(has_positive[row] for row in rows)


def test_without_a_topic_every_member_has_the_same_probability(
    write_rows: Callable[..., Path], tmp_path: Path, collator: Collator
) -> None:
    path = write_rows([{"question": "q", "triples": [["a", "r", "b"], ["a", "r", "c"]]}])
    graph = collator(PackedStore.build_or_open(path, cache_dir=tmp_path))([0]).graph
    assert graph.node_count.tolist() == [1, 2]
    torch.testing.assert_close(graph.topic_prob, torch.full((2,), 1 / 3))


def test_only_empty_graphs(
    write_rows: Callable[..., Path], tmp_path: Path, collator: Collator
) -> None:
    path = write_rows([{"question": "q", "triples": []}] * 2)
    store = PackedStore.build_or_open(path, cache_dir=tmp_path)
    batch = collator(store)([0, 1])
    graph = batch.graph
    assert (graph.num_facts, graph.num_nodes, graph.max_facts) == (0, 0, 0)
    assert graph.fact_ptr.tolist() == graph.node_ptr.tolist() == [0, 0, 0]
    assert graph.fact_index.pair_ptr.tolist() == [0]
    assert batch.relation_row.tolist() == []


def test_wrong_rows_are_refused(collate: PackedCollator) -> None:
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    for rows in ([ROWS], [0, -1]):
        with pytest.raises(IndexError):
            collate(rows)


def test_loader_processes_give_the_same_batches(collate: PackedCollator) -> None:
    batches = [[3, 1], [8], [20, 21, 22]]
    loader = torch.utils.data.DataLoader(
        range(ROWS), batch_sampler=batches, collate_fn=collate, num_workers=1
    )
    for rows, batch in zip(batches, loader, strict=True):
        assert batch.rows == tuple(rows)
        for actual, expected in zip(batch.tensors(), collate(rows).tensors(), strict=True):
            assert torch.equal(actual, expected)


def test_shuffled_triples_give_the_same_pack(
    tiny_file: Path,
    write_rows: Callable[..., Path],
    tmp_path: Path,
    collator: Collator,
) -> None:
    draw = random.Random(5)
    rows = [json.loads(line) for line in tiny_file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["triples"] += row["triples"][:2]
        draw.shuffle(row["triples"])
    stores = [
        PackedStore.build_or_open(path, cache_dir=tmp_path)
        for path in (tiny_file, write_rows(rows))
    ]
    assert stores[0].fingerprint != stores[1].fingerprint
    first, second = (collator(s)(range(8)) for s in stores)  # type: ignore[arg-type]
    for part in ("fact_index", "topic_facts", "groups"):
        pairs = zip(getattr(first.graph, part), getattr(second.graph, part), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), part
    for name in ("topic_prob", "topic_node", "node_count", "label", "question_key"):
        assert torch.equal(getattr(first.graph, name), getattr(second.graph, name)), name


def test_a_question_of_200_000_facts(tmp_path: Path, collator: Collator) -> None:
    draw = np.random.default_rng(0)
    columns = draw.integers(0, [[50_000], [20_000], [50_000]], (3, 200_000)).T.tolist()
    facts = ",".join(f'["e{h}","r{r}","e{t}"]' for h, r, t in columns)
    path = tmp_path / "large.jsonl"
    path.write_text(f'{{"question":"q","topic_entities":["e1"],"triples":[{facts}]}}\n')
    store = PackedStore.build_or_open(path, cache_dir=tmp_path)
    graph = collator(store)([0]).graph
    assert graph.num_facts == len({tuple(fact) for fact in columns})
    fact_index = graph.fact_index
    assert fact_index.num_facts <= graph.num_facts and graph.num_nodes == len(graph.node_count)
    expected = build_fact_index(
        fact_index.head,
        fact_index.tail,
        fact_index.pair_relation[fact_index.fact_pair.long()],
        graph.num_nodes,
        head_count=fact_index.head_count,
        tail_count=fact_index.tail_count,
    )
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(fact_index, name), value), name


def test_relation_tokens_are_those_of_both_texts(
    collate: PackedCollator, collator: Collator
) -> None:
    # The texts have 0 to 4 tokens.
    length = torch.randint(5, (2 * collate.store.num_relations,)).tolist()
    first = [0, *itertools.accumulate(length)]
    batch = collator(collate.store, ptr=torch.tensor(first))(range(ROWS))
    rows, ptr = [], [0]
    for relation in batch.relation_row.tolist():
        for text in (2 * relation, 2 * relation + 1):
            rows += [first[text] + t for t in range(length[text])]
            ptr.append(len(rows))
    tokens = batch.relation_tokens
    assert (tokens.ids.tolist(), tokens.ptr.tolist()) == (rows, ptr)
    assert tokens.ids.dtype == tokens.ptr.dtype == torch.int32
    assert tokens.max_row == max(b - a for a, b in zip(ptr, ptr[1:], strict=False))
