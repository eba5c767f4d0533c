"""Packs against orders built from scratch on the joined graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.collate import PackedCollator
from dragkit.data.packed import QuestionBatch
from dragkit.data.store import PackedStore
from dragkit_kernels import build_fact_orders, concat_fact_orders

ROWS = 40


@pytest.fixture
def packed(
    random_rows: Callable[..., list[dict]], write_rows: Callable[..., Path], tmp_path: Path
) -> PackedStore:
    return PackedStore.build_or_open(write_rows(random_rows(ROWS, seed=7)), cache_dir=tmp_path)


def from_scratch(store: PackedStore, rows: list[int]) -> dict[str, torch.Tensor]:
    """Every field of a pack by way of names, one fact at a time."""
    used = sorted(
        {r for row in rows for _, r, _ in store.question(row).triples},
        key=store.relation_names.index,
    )
    head, tail, relation, fact_graph, node_graph, topic, label = [], [], [], [], [], [], []
    for graph, row in enumerate(rows):
        asked = store.question(row)
        base = len(node_graph)
        node = {name: base + place for place, name in enumerate(asked.entities)}
        for h, r, t in asked.triples:
            head.append(node[h])
            tail.append(node[t])
            relation.append(used.index(r))
        known = [name for name in dict.fromkeys(asked.topics) if name in node]
        start = known or list(node)
        topic += [1 / len(start) if name in start else 0 for name in asked.entities]
        fact_graph += [graph] * len(asked.triples)
        node_graph += [graph] * len(node)
        label += asked.labels
    as_int = lambda values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    orders = build_fact_orders(
        as_int(head), as_int(tail), as_int(relation), len(node_graph), as_int(fact_graph)
    )
    return orders._asdict() | {
        "relation": as_int(relation),
        "topic": torch.tensor(topic, dtype=torch.float32),
        "node_graph": as_int(node_graph),
        "fact_graph": as_int(fact_graph),
        "label": torch.tensor(label, dtype=torch.float32),
        "relation_row": torch.tensor(
            [store.relation_names.index(r) for r in used], dtype=torch.int64
        ),
    }


def check(batch: QuestionBatch, expected: dict[str, torch.Tensor]) -> None:
    graph = batch.graph
    for name, want in expected.items():
        found = batch.relation_row if name == "relation_row" else getattr(graph, name, None)
        found = getattr(graph.orders, name) if found is None else found
        assert found.dtype == want.dtype, name
        assert torch.equal(found, want), name


@pytest.mark.parametrize(
    "rows", [[0], [3, 1, 2], list(range(ROWS)), list(range(ROWS))[::-1], [5, 5, 5]]
)
def test_equal_to_orders_from_scratch(
    packed: PackedStore, rows: list[int], zero_states: object
) -> None:
    batch = PackedCollator(packed, zero_states)(rows)  # type: ignore[arg-type]
    check(batch, from_scratch(packed, rows))
    graph = batch.graph
    facts = [packed.num_facts(row) for row in rows]
    nodes = [len(packed.question(row).entities) for row in rows]
    assert graph.fact_ptr.tolist() == np.cumsum([0, *facts]).tolist()
    assert graph.node_ptr.tolist() == np.cumsum([0, *nodes]).tolist()
    assert (graph.num_graphs, graph.num_nodes) == (len(rows), sum(nodes))
    assert (graph.num_facts, graph.max_facts) == (sum(facts), max(facts))
    assert graph.question_key.tolist() == packed.question_key[rows].tolist()
    assert batch.question_states.flatten().tolist() == rows
    assert batch.rows == tuple(rows)
    assert batch.prefix is None


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
def test_any_choice_of_questions(store_of_forty: PackedStore, data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=12))
    batch = PackedCollator(store_of_forty, _NoStates())(rows)  # type: ignore[arg-type]
    check(batch, from_scratch(store_of_forty, rows))


class _NoStates:
    def rows(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(rows), 0, 1), torch.zeros(len(rows), 0, dtype=torch.bool)


@pytest.fixture(scope="module")
def store_of_forty(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    import json
    import random

    draw = random.Random(11)
    folder = tmp_path_factory.mktemp("forty")
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(ROWS):
            names = [f"e{i}" for i in range(draw.randint(1, 6))]
            facts = [
                [draw.choice(names), f"r{draw.randrange(5)}", draw.choice(names)]
                for _ in range(draw.choice([0, 1, 9]))
            ]
            row = {"question": f"q{number}", "triples": facts, "topic_entities": names[:1]}
            file.write(json.dumps(row) + "\n")
    return PackedStore.build_or_open(path, cache_dir=folder)


def test_joined_packs_equal_one_pack(packed: PackedStore, zero_states: object) -> None:
    """Packing one by one and joining gives the pack of all, once relations count the same."""
    collate = PackedCollator(packed, zero_states)  # type: ignore[arg-type]
    rows = list(range(0, ROWS, 2))
    whole = collate(rows)
    place = {int(row): i for i, row in enumerate(whole.relation_row)}
    parts = []
    for row in rows:
        single = collate([row])
        own = [place[int(r)] for r in single.relation_row[single.graph.orders.pair_relation.long()]]
        parts.append(
            single.graph.orders._replace(pair_relation=torch.tensor(own, dtype=torch.int32))
        )
    joined = concat_fact_orders(parts)
    for name, want in joined._asdict().items():
        assert torch.equal(getattr(whole.graph.orders, name), want), name


def test_permuted_questions_permute_the_pack(packed: PackedStore, zero_states: object) -> None:
    collate = PackedCollator(packed, zero_states)  # type: ignore[arg-type]
    rows = [4, 9, 17, 30]
    first, turned = collate(rows), collate(rows[::-1])
    assert torch.equal(first.relation_row, turned.relation_row)
    for place in range(4):
        other = 3 - place
        for name, ptr in (("label", "fact_ptr"), ("relation", "fact_ptr"), ("topic", "node_ptr")):
            a, b = getattr(first.graph, ptr)[place : place + 2].tolist()
            c, d = getattr(turned.graph, ptr)[other : other + 2].tolist()
            assert torch.equal(getattr(first.graph, name)[a:b], getattr(turned.graph, name)[c:d])


def test_only_empty_graphs(
    write_rows: Callable[..., Path], tmp_path: Path, zero_states: object
) -> None:
    path = write_rows([{"question": "q", "triples": []}] * 2)
    store = PackedStore.build_or_open(path, cache_dir=tmp_path)
    batch = PackedCollator(store, zero_states)([0, 1])  # type: ignore[arg-type]
    graph = batch.graph
    assert (graph.num_facts, graph.num_nodes, graph.max_facts) == (0, 0, 0)
    assert graph.fact_ptr.tolist() == graph.node_ptr.tolist() == [0, 0, 0]
    assert graph.orders.pair_ptr.tolist() == [0]
    assert batch.relation_row.tolist() == []


def test_wrong_rows(packed: PackedStore, zero_states: object) -> None:
    collate = PackedCollator(packed, zero_states)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one"):
        collate([])
    for rows in ([ROWS], [0, -1]):
        with pytest.raises(IndexError):
            collate(rows)


def test_loader_processes_give_the_same_batches(packed: PackedStore, zero_states: object) -> None:
    collate = PackedCollator(packed, zero_states)  # type: ignore[arg-type]
    batches = [[3, 1], [8], [20, 21, 22]]
    loader = torch.utils.data.DataLoader(
        range(ROWS), batch_sampler=batches, collate_fn=collate, num_workers=1
    )
    for rows, batch in zip(batches, loader, strict=True):
        want = collate(rows)
        assert batch.rows == tuple(rows)
        assert torch.equal(batch.graph.orders.fact_pair, want.graph.orders.fact_pair)


def test_shuffled_triples_give_the_same_pack(
    tiny_file: Path, write_rows: Callable[..., Path], tmp_path: Path, zero_states: object
) -> None:
    import json
    import random

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
    first, second = (PackedCollator(s, zero_states)(range(8)) for s in stores)  # type: ignore[arg-type]
    for name, value in first.graph.orders._asdict().items():
        assert torch.equal(value, getattr(second.graph.orders, name)), name
    for name in ("relation", "topic", "label", "question_key"):
        assert torch.equal(getattr(first.graph, name), getattr(second.graph, name)), name


def test_a_question_of_200_000_facts(tmp_path: Path, zero_states: object) -> None:
    draw = np.random.default_rng(0)
    columns = draw.integers(0, [[50_000], [20_000], [50_000]], (3, 200_000)).T.tolist()
    facts = ",".join(f'["e{h}","r{r}","e{t}"]' for h, r, t in columns)
    path = tmp_path / "large.jsonl"
    path.write_text(f'{{"question":"q","topic_entities":["e1"],"triples":[{facts}]}}\n')
    store = PackedStore.build_or_open(path, cache_dir=tmp_path)
    graph = PackedCollator(store, zero_states)([0]).graph  # type: ignore[arg-type]
    assert graph.num_facts == len({tuple(fact) for fact in columns})
    want = build_fact_orders(graph.orders.head, graph.orders.tail, graph.relation, graph.num_nodes)
    for name, value in want._asdict().items():
        assert torch.equal(getattr(graph.orders, name), value), name
