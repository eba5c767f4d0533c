"""Token rows: the texts of the prompts, each tokenised once, in the order of the pack."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dragkit.data import tokens
from dragkit.data.collate import PackedCollator
from dragkit.data.packed import TokenPack
from dragkit.data.store import PackedStore
from dragkit.data.tokens import TokenRows
from dragkit.generator.prompt import PromptTemplate

BOS, EOS = 256, 257


class ByteTokeniser:
    """Returns UTF-8 bytes as tokens and counts the texts."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.seen.update(texts)
        return [list(text.encode()) for text in texts]


@pytest.fixture
def packed(tiny_file: Path, tmp_path: Path) -> PackedStore:
    return PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)


def build(store: PackedStore, cache: Path, tokenize: object, **options: object) -> TokenRows:
    options = {"key": "bytes", "bos_ids": [BOS], "eos_ids": [EOS]} | options
    return TokenRows.build_or_open(store, tokenize, PromptTemplate(), cache_dir=cache, **options)  # type: ignore[arg-type]


def rows_of(pack: TokenPack) -> list[list[int]]:
    assert pack.ids.dtype == pack.ptr.dtype == torch.int32
    ptr = pack.ptr.tolist()
    rows = [pack.ids[a:b].tolist() for a, b in zip(ptr, ptr[1:], strict=False)]
    assert pack.max_row == max(map(len, rows), default=0)
    return rows


@pytest.mark.parametrize("chunk", [1, 3, 1 << 16])
def test_rows_are_the_texts_of_the_pack(
    packed: PackedStore,
    tmp_path: Path,
    collator: Callable[..., PackedCollator],
    chunk: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK_FACTS", chunk)
    rows = build(packed, tmp_path, ByteTokeniser())
    order = [7, 2, 0, 5]
    batch = collator(packed, rows)(order)
    text, questions = PromptTemplate(), [packed.question(row) for row in order]
    assert rows_of(batch.prefix) == [[BOS, *text.prefix(q.text).encode()] for q in questions]
    assert rows_of(batch.target) == [[*text.target(q.answers).encode(), EOS] for q in questions]
    words = {"tea.blend.contains": "blend contains", "sea.lighthouse.keeper": "lighthouse keeper"}
    lines = [bytes(row).decode() for row in rows_of(batch.facts)]
    assert len(lines) == batch.graph.num_facts
    for line, (head, relation, tail) in zip(
        lines, (t for q in questions for t in q.triples), strict=True
    ):
        start, end = f"{head}, ", f", {tail}\n"
        assert line.startswith(start) and line.endswith(end)
        if relation in words:
            assert line[len(start) : -len(end)] == words[relation]


def test_lengths(packed: PackedStore, tmp_path: Path) -> None:
    rows = build(packed, tmp_path, ByteTokeniser())
    text = PromptTemplate()
    questions = [packed.question(row) for row in range(len(packed))]
    assert rows.prefix_lengths.tolist() == [
        1 + len(text.prefix(q.text).encode()) for q in questions
    ]
    # A question without an answer has an empty target, without the end token.
    assert rows.target_lengths.tolist() == [
        1 + len(text.target(q.answers).encode()) if q.answers else 0 for q in questions
    ]
    assert rows.target_lengths[3] == 0


def test_each_fact_text_is_tokenised_once(
    write_rows: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "_CHUNK_FACTS", 4)
    row = {"question": "q", "triples": [["a", "x.y.r", "b"], ["a", "z.y.r", "b"], ["b", "r", "c"]]}
    packed = PackedStore.build_or_open(write_rows([row] * 5), cache_dir=tmp_path)
    count = ByteTokeniser()
    build(packed, tmp_path, count)
    facts = {text: n for text, n in count.seen.items() if text.startswith(("a,", "b,"))}
    assert facts == {"a, y r, b\n": 1, "b, r, c\n": 1}


def test_built_once_for_each_key(packed: PackedStore, tmp_path: Path) -> None:
    first, second = ByteTokeniser(), ByteTokeniser()
    built = build(packed, tmp_path, first)
    opened = build(packed, tmp_path, second)
    assert first.seen and not second.seen
    assert opened.folder == built.folder
    others = [
        build(packed, tmp_path, second, key="other").folder,
        build(packed, tmp_path, second, eos_ids=[]).folder,
        build(packed, tmp_path, second, bos_ids=[]).folder,
    ]
    assert len({built.folder, *others}) == 4
    copy = pickle.loads(pickle.dumps(built))
    assert np.array_equal(copy.prefix_lengths, built.prefix_lengths)


def test_a_tokeniser_that_loses_a_row(packed: PackedStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows for"):
        build(packed, tmp_path, lambda texts: [[1]] * (len(texts) - 1))
    assert list((tmp_path / "tokens").iterdir()) == []


def test_no_fact_at_all(
    write_rows: Callable[..., Path], tmp_path: Path, collator: Callable[..., PackedCollator]
) -> None:
    packed = PackedStore.build_or_open(
        write_rows([{"question": "q", "triples": [], "answer": "a"}]), cache_dir=tmp_path
    )
    rows = build(packed, tmp_path, ByteTokeniser())
    batch = collator(packed, rows)([0])
    assert rows_of(batch.facts) == []
    assert rows_of(batch.target) == [[*b" a", EOS]]


def test_a_target_has_whole_answers_with_those_in_the_graph_first(
    write_rows: Callable[..., Path], tmp_path: Path, collator: Callable[..., PackedCollator]
) -> None:
    row = {"question": "q", "triples": [["a", "r", "c"]], "answer": ["x", "c", "y", "a"]}
    packed = PackedStore.build_or_open(write_rows([row]), cache_dir=tmp_path)
    for max_answers, expected in ((1, ["c"]), (3, ["c", "a", "x"]), (9, ["c", "a", "x", "y"])):
        rows = build(packed, tmp_path, ByteTokeniser(), max_answers=max_answers)
        batch = collator(packed, rows)([0])
        assert rows_of(batch.target) == [[*PromptTemplate().target(expected).encode(), EOS]]


def test_facts_too_long_for_any_prompt(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    triples = [["a", "r", "b" * n] for n in (4, 30, 5, 31)]
    rows = [
        {"question": "all fit", "triples": triples[:1]},
        {"question": "two do not", "triples": triples},
        {"question": "none", "triples": []},
        {"question": "one does not", "triples": triples[1:3]},
    ]
    packed = PackedStore.build_or_open(write_rows(rows), cache_dir=tmp_path)
    tokens = build(packed, tmp_path, ByteTokeniser())
    # "a, r, bbbb" and its line end are 11 bytes.
    count, found = tokens.facts_over(np.array([11, 12, 12, 36]))
    assert (count, found.tolist()) == (3, [1, 3])
    assert tokens.facts_over(np.array([10, 38, -5, 37]))[0] == 1
    assert tokens.facts_over(np.full(4, -1))[0] == 7
    assert tokens.facts_over(np.full(4, 38))[0] == 0
    assert tokens.facts_over(np.full(4, -1))[1].tolist() == [0, 1, 3]
