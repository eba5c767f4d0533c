"""Packs against orders built from scratch on the joined graph."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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


class Scratch:
    """Every field of a pack by way of names, one fact at a time."""

    def __init__(
        self, store: PackedStore, rows: list[int], classes: Callable[..., list[int]] | None
    ) -> None:
        self.columns: dict[str, list] = defaultdict(list)
        names = store.relation_names
        every = {r for row in rows for _, r, _ in store.question(row).triples}
        self.used = sorted(every, key=names.index)
        for graph, row in enumerate(rows):
            self.add(graph, store.question(row), classes)
        as_int = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
        c = {name: as_int(values) for name, values in self.columns.items()}
        empty = as_int([])
        get = lambda name: c.get(name, empty)  # noqa: E731
        nodes = len(self.columns["node_graph"])

        def fact_index(chosen: list[int]) -> FactIndex:
            at = torch.tensor(chosen, dtype=torch.int64)
            columns = [get(name)[at] for name in ("head", "tail", "relation")]
            counts = {name: get(name)[at] for name in ("head_count", "tail_count")}
            return build_fact_index(*columns, nodes, get("edge_graph")[at], **counts)

        self.fact_index = fact_index(list(range(len(self.columns["head"]))))
        self.topic_facts = fact_index(self.columns["near"])
        by_edge = sorted(range(len(self.columns["row"])), key=self.columns["row"].__getitem__)
        ends = np.cumsum(np.bincount(get("row").numpy(), minlength=self.fact_index.num_facts))
        self.groups = FactGroups(get("row"), as_int([0, *ends.tolist()]), as_int(by_edge))
        self.fields = {
            "topic_prob": torch.tensor(self.columns["topic_prob"], dtype=torch.float32),
            "label": torch.tensor(self.columns["label"], dtype=torch.float32),
        } | {
            name: get(name)
            for name in ("topic_node", "topic_graph", "node_count", "node_graph", "fact_graph")
        }
        self.relation_row = torch.tensor([names.index(r) for r in self.used], dtype=torch.int64)

    def add(
        self, graph: int, asked: StoredQuestion, classes: Callable[..., list[int]] | None
    ) -> None:
        c = self.columns
        names = list(asked.entities)
        topics = [name for name in dict.fromkeys(asked.topics) if name in names]
        of = classes(names, topics, asked.triples) if classes else list(range(len(names)))
        base, members = len(c["node_graph"]), Counter(of)
        node = {name: base + place for name, place in zip(names, of, strict=True)}
        started = sorted({node[name] for name in topics or names})
        for place in range(len(members)):
            share = 1 / len(topics or names) if base + place in started else 0
            c["topic_prob"].append(share)
            c["node_count"].append(members[place])
        c["node_graph"] += [graph] * len(members)
        c["topic_node"] += started
        c["topic_graph"] += [graph] * len(started)
        merged: dict[tuple, int] = {}
        for h, r, t in asked.triples:
            key = (node[h], self.used.index(r), node[t])
            if key not in merged:
                merged[key] = len(c["head"])
                same = [
                    (a, z)
                    for a, q, z in asked.triples
                    if (node[a], self.used.index(q), node[z]) == key
                ]
                c["head"].append(key[0])
                c["relation"].append(key[1])
                c["tail"].append(key[2])
                c["head_count"].append(sum(a == h for a, _ in same))
                c["tail_count"].append(sum(z == t for _, z in same))
                c["edge_graph"].append(graph)
                if key[0] in started or key[2] in started:
                    c["near"].append(merged[key])
            c["row"].append(merged[key])
        c["fact_graph"] += [graph] * len(asked.triples)
        c["label"] += asked.labels


def check(batch: QuestionBatch, expected: Scratch) -> None:
    graph = batch.graph
    assert torch.equal(batch.relation_row, expected.relation_row)
    pairs = [(name, getattr(graph, name), want) for name, want in expected.fields.items()]
    for part in ("fact_index", "topic_facts", "groups"):
        found, want = getattr(graph, part), getattr(expected, part)
        pairs += [(f"{part}.{n}", getattr(found, n), getattr(want, n)) for n in want._fields]
    for name, found, want in pairs:
        assert found.dtype == want.dtype, name
        assert torch.equal(found, want), name


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    "rows", [[0], [3, 1, 2], list(range(ROWS)), list(range(ROWS))[::-1], [5, 5, 5]]
)
def test_equal_to_orders_from_scratch(
    rows: list[int],
    merge: bool,
    random_rows: Callable[..., list[dict]],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    collator: Collator,
    slow_classes: Callable[..., list[int]],
) -> None:
    packed = PackedStore.build_or_open(
        write_rows(random_rows(ROWS, seed=7)), cache_dir=tmp_path, merge=merge
    )
    batch = collator(packed)(rows)
    expected = Scratch(packed, rows, slow_classes if merge else None)
    check(batch, expected)
    graph = batch.graph
    facts = [packed.num_facts(row) for row in rows]
    nodes = np.bincount(expected.fields["node_graph"].numpy(), minlength=len(rows))
    asked = sum(len(packed.question(row).entities) for row in rows)
    assert int(graph.node_count.sum()) == asked and (merge or graph.num_nodes == asked)
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
    collate: PackedCollator, slow_classes: Callable[..., list[int]], data: st.DataObject
) -> None:
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=12))
    check(collate(rows), Scratch(collate.store, rows, slow_classes))


def test_joined_packs_equal_one_pack(collate: PackedCollator) -> None:
    """Packing one by one and joining gives the pack of all, once relations count the same."""
    rows = list(range(0, ROWS, 2))
    whole = collate(rows)
    place = {int(row): i for i, row in enumerate(whole.relation_row)}
    parts = []
    for row in rows:
        single = collate([row])
        own = [
            place[int(r)] for r in single.relation_row[single.graph.fact_index.pair_relation.long()]
        ]
        parts.append(
            single.graph.fact_index._replace(pair_relation=torch.tensor(own, dtype=torch.int32))
        )
    joined = concat_fact_indexes(parts)
    for name, want in joined._asdict().items():
        assert torch.equal(getattr(whole.graph.fact_index, name), want), name


def test_questions_with_a_positive_fact_are_counted(collate: PackedCollator) -> None:
    hit = [
        any(label > 0.5 for label in collate.store.question(row).labels)
        for row in range(len(collate.store))
    ]
    assert any(hit) and not all(hit)
    for rows in (
        range(len(collate.store)),
        [hit.index(False)],
        [hit.index(True), hit.index(False)],
    ):
        assert collate(rows).num_labelled == sum(hit[row] for row in rows)


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


def test_wrong_rows(collate: PackedCollator) -> None:
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
        want = collate(rows)
        assert batch.rows == tuple(rows)
        assert torch.equal(batch.graph.fact_index.fact_pair, want.graph.fact_index.fact_pair)


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
    want = build_fact_index(
        fact_index.head,
        fact_index.tail,
        fact_index.pair_relation[fact_index.fact_pair.long()],
        graph.num_nodes,
        head_count=fact_index.head_count,
        tail_count=fact_index.tail_count,
    )
    for name, value in want._asdict().items():
        assert torch.equal(getattr(fact_index, name), value), name


def test_relation_tokens_leave_the_padding_out(collate: PackedCollator, collator: Collator) -> None:
    mask = torch.rand(collate.store.num_relations, 2, 4) < 0.5
    mask = mask.sort(2, descending=True).values  # texts of 0 to 4 tokens
    batch = collator(collate.store, mask=mask)(range(ROWS))
    rows, ptr = [], [0]
    for relation in batch.relation_row.tolist():
        for direction in (0, 1):
            first = (2 * relation + direction) * 4
            rows += [first + t for t in range(int(mask[relation, direction].sum()))]
            ptr.append(len(rows))
    tokens = batch.relation_tokens
    assert (tokens.ids.tolist(), tokens.ptr.tolist()) == (rows, ptr)
    assert tokens.ids.dtype == tokens.ptr.dtype == torch.int32
    assert tokens.max_row == max(b - a for a, b in zip(ptr, ptr[1:], strict=False))
