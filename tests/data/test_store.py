"""The packed store: its content, when it is built, and what remains after a fault."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from dragkit.data import arrays, file_packing, packing, store
from dragkit.data.arrays import open_sealed, seal_folder
from dragkit.data.packing import question_key
from dragkit.data.question_file import read_questions
from dragkit.data.relations import RelationVocab
from dragkit.data.store import PackedStore
from dragkit.data.subgraph import build_subgraph
from dragkit.errors import DataError, MissingInputError, WriteError


def test_content_equals_the_file(tiny_file: Path, tmp_path: Path) -> None:
    packed = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    questions = read_questions(tiny_file).questions
    vocab = RelationVocab()
    assert len(packed) == len(questions)
    for row, question in enumerate(questions):
        graph = build_subgraph(question, vocab)
        stored = packed.question(row)
        for name in ("id", "text", "answers", "topics", "line"):
            assert getattr(stored, name) == getattr(question, name), name
        assert sorted(stored.triples) == sorted(question.triples)
        assert stored.entities == graph.names
        assert stored.labels == tuple(graph.label.astype(int).tolist())
        assert [stored.entities[node] for node in stored.topic_nodes] == [
            name for name in question.topics if name in graph.names
        ]
        assert packed.num_facts(row) == packed.fact_counts[row] == len(question.triples)
        # A default id contains the name of the file, which must not influence the noise.
        has_default_id = question.id.startswith("heuristics_tiny")
        assert packed.question_key[row] == question_key("\n6" if has_default_id else question.id)
    assert packed.relation_names == vocab.names
    assert packed.num_relations == len(vocab)
    assert packed.question_texts == [question.text for question in questions]
    assert packed.question_key.min() >= 0
    expected = {
        "rows": 8,
        "questions": 8,
        "rejects": 0,
        "facts": sum(len(q.triples) for q in questions),
        "no_answer": 1,
        "empty_graph": 1,
        "duplicate_triples": 2,
        "topics_from_paths": 1,
        "topic_missing": 0,
        "answer_in_graph": 6,
        "labels_shortest": 6,
        "labels_paths": 1,
        "labels_none": 1,
    }
    assert {name: packed.summary[name] for name in expected} == expected
    with pytest.raises(IndexError):
        packed.question(8)


def test_topics_outside_the_graph_are_counted_and_logged(
    write_rows: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"question": "q", "triples": [["a", "r", "b"]], "answer": "b"}
    rows = [
        row | {"topic_entities": ["x"]},
        row,
        row | {"triples": []},
        row | {"topic_entities": ["a"]},
    ]
    with caplog.at_level(logging.WARNING):
        packed = PackedStore.build_or_open(write_rows(rows), cache_dir=tmp_path)
    assert packed.summary["topic_missing"] == 2
    assert packed.summary["no_topic"] == 2
    assert caplog.text.count("no topic entity in their graph") == 1


def test_a_second_opening_reads_no_row(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(store, "pack_file", never)
    copy = tmp_path / "other_name.jsonl"
    shutil.copy(tiny_file, copy)
    again = PackedStore.build_or_open(copy, cache_dir=tmp_path)
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.facts, first.facts)
    # The content is the same. A default id contains the name of the file that is opened.
    assert again.question(5).id == "other_name-6"
    assert again.question(4).id == "tiny-lone-answer"


def test_the_key_depends_on_content_options_and_builder(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(path: Path = tiny_file, **options: object) -> str:
        return PackedStore.build_or_open(path, cache_dir=tmp_path, **options).fingerprint  # type: ignore[arg-type]

    keys = [key(), key(label_rule="paths"), key(label_rule="shortest"), key(max_bad_fraction=0.1)]
    changed = tmp_path / "changed.jsonl"
    text = tiny_file.read_text(encoding="utf-8")
    changed.write_text(text.replace("Dunmarsh", "Dunmarch", 1), encoding="utf-8")
    keys.append(key(changed))
    monkeypatch.setattr(store, "BUILDER_VERSION", store.BUILDER_VERSION + 1)
    keys.append(key())
    assert len(set(keys)) == len(keys)


def test_labels_follow_the_rule(tiny_file: Path, tmp_path: Path) -> None:
    rules = {
        rule: PackedStore.build_or_open(tiny_file, cache_dir=tmp_path, label_rule=rule).summary
        for rule in ("auto", "shortest", "paths")
    }
    assert rules["shortest"]["labels_none"] == 2
    assert rules["paths"]["labels_shortest"] == 0
    assert rules["paths"]["labels_paths"] == 7


def test_unusable_rows_are_counted_and_listed_beside_the_store(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    good = {"question": "q", "triples": [["a", "r", "b"]]}
    bad = [b'{"question": "cut', b'["\xff"]']
    path = write_rows([good, bad[0], good, good, bad[1], good])
    with pytest.raises(DataError, match=r"rows\.jsonl:2: \$: not valid JSON"):
        PackedStore.build_or_open(path, cache_dir=tmp_path)
    # A refused file leaves nothing in the cache.
    assert list((tmp_path / store.CACHE_FOLDER).iterdir()) == []
    packed = PackedStore.build_or_open(path, cache_dir=tmp_path, max_bad_fraction=0.4)
    assert packed.summary["rejects"] == 2
    assert packed.summary["rows"] == packed.summary["questions"] + packed.summary["rejects"] == 6
    assert [line[:5] for line in (packed.folder / "rejects.txt").read_text().splitlines()] == [
        "2: $:",
        "5: $:",
    ]
    with pytest.raises(DataError):
        PackedStore.build_or_open(path, cache_dir=tmp_path, max_bad_fraction=0.3)


@pytest.mark.parametrize("name", ["facts.npy", "meta.json", "manifest.json"])
@pytest.mark.parametrize("fault", ["cut", "empty", "flip", "delete"])
def test_a_damaged_cache_is_rebuilt(name: str, fault: str, tiny_file: Path, tmp_path: Path) -> None:
    packed = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    expected, summary, damaged = packed.facts.copy(), packed.summary, packed.folder / name
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    if fault == "delete":
        damaged.unlink()
    else:
        damaged.write_bytes({"cut": content[:-4], "empty": b"", "flip": content}[fault])
    again = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    assert np.array_equal(again.facts, expected)
    assert again.summary == summary
    assert [p.name for p in again.folder.parent.iterdir()] == [again.folder.name]


@pytest.mark.parametrize("key", ["label_gaps", "unread"])
def test_a_cache_of_an_earlier_version_is_packed_again_under_its_name(
    key: str, tiny_file: Path, tmp_path: Path
) -> None:
    packed = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    meta = open_sealed(packed.folder)
    del meta[key]
    seal_folder(packed.folder, meta)
    again = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    assert again.fingerprint == packed.fingerprint
    assert set(open_sealed(again.folder)) == set(meta) | {key}


def _build(path: Path, cache: Path, slow: bool, results: object) -> None:
    if slow:
        seal = file_packing.seal_folder

        def slow_seal(folder: Path, meta: dict) -> None:
            results.put("written")  # type: ignore[attr-defined]
            time.sleep(60)
            seal(folder, meta)

        file_packing.seal_folder = slow_seal
    results.put(len(PackedStore.build_or_open(path, cache_dir=cache)))  # type: ignore[attr-defined]


def test_a_killed_builder_leaves_no_cache_and_the_next_one_removes_its_rest(
    tiny_file: Path, tmp_path: Path
) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    builder = context.Process(target=_build, args=(tiny_file, tmp_path, True, results))
    builder.start()
    assert results.get(timeout=60) == "written"
    os.kill(builder.pid, signal.SIGKILL)
    builder.join()
    left = list((tmp_path / store.CACHE_FOLDER).iterdir())
    assert left and all(path.name.startswith(".") for path in left)
    packed = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    assert len(packed) == 8
    assert list((tmp_path / store.CACHE_FOLDER).iterdir()) == [packed.folder]


def test_concurrent_builders_all_succeed(tiny_file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    builders = [
        context.Process(target=_build, args=(tiny_file, tmp_path, False, results)) for _ in range(4)
    ]
    for builder in builders:
        builder.start()
    assert [results.get(timeout=120) for _ in builders] == [8] * 4
    for builder in builders:
        builder.join()
    assert len(list((tmp_path / store.CACHE_FOLDER).iterdir())) == 1


def test_a_file_that_changes_while_it_is_read(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "growing.jsonl"
    shutil.copy(tiny_file, path)
    pack = store.pack_file

    def grow(*args: object, **options: object) -> None:
        pack(*args, **options)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes() * 2)

    monkeypatch.setattr(store, "pack_file", grow)
    with pytest.raises(DataError, match="changed while it was read"):
        PackedStore.build_or_open(path, cache_dir=tmp_path / "cache")


def test_a_file_that_is_removed_while_it_is_read(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "removed.jsonl"
    shutil.copy(tiny_file, path)
    pack = store.pack_file

    def remove(*args: object, **options: object) -> None:
        pack(*args, **options)  # type: ignore[arg-type]
        path.unlink()

    monkeypatch.setattr(store, "pack_file", remove)
    with pytest.raises(MissingInputError, match=r"removed\.jsonl: no such file"):
        PackedStore.build_or_open(path, cache_dir=tmp_path / "cache")


def test_a_cache_that_cannot_be_written(tiny_file: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(WriteError, match="DRAGKIT_CACHE"):
        PackedStore.build_or_open(tiny_file, cache_dir=blocked)


def test_a_pickled_store_maps_the_same_files(tiny_file: Path, tmp_path: Path) -> None:
    packed = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    sent = pickle.dumps(packed)
    assert len(sent) < 2000
    copy = pickle.loads(sent)
    assert copy.question(4) == packed.question(4)


def test_the_chunk_size_changes_nothing(
    random_rows: Callable[..., list[dict]],
    write_rows: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write_rows(random_rows(40, seed=1))
    one = PackedStore.build_or_open(path, cache_dir=tmp_path / "one")
    monkeypatch.setattr(packing, "_CHUNK_FACTS", 1)
    many = PackedStore.build_or_open(path, cache_dir=tmp_path / "many")
    for name in (*packing.ARRAYS, *(f"{name}_ptr" for name in packing.RAGGED)):
        assert np.array_equal(getattr(one, name), getattr(many, name)), name
    assert one.summary == many.summary


def test_made_up_ids_meet_no_given_one_whatever_the_file_is_called(
    write_rows: Callable[..., Path], tmp_path: Path
) -> None:
    """The content is accepted under every name, in every order, and its ids are distinct."""
    row = {"question": "q", "triples": [["a", "r", "b"]], "answer": "b"}
    rows = [row, row | {"id": "train-1"}, row | {"id": "train-3"}, row | {"id": "train-1'"}, row]
    expected = {
        "train": ["train-1''", "train-1", "train-3", "train-1'", "train-5"],
        "other": ["other-1", "train-1", "train-3", "train-1'", "other-5"],
    }
    for name in ("train", "other", "train"):
        path = write_rows(rows, f"{name}.jsonl")
        packed = PackedStore.build_or_open(path, cache_dir=tmp_path)
        assert [packed.question(number).id for number in range(5)] == expected[name]
        assert [question.id for question in read_questions(path).questions] == expected[name]
    again = write_rows([*rows, row | {"id": "train-3"}])
    with pytest.raises(DataError, match=r"6: \$.id: the same id as on line 3"):
        PackedStore.build_or_open(again, cache_dir=tmp_path)


def test_the_digest_of_a_large_file_is_kept_until_the_file_changes(
    tiny_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "large.jsonl", tmp_path / "cache"
    path.write_bytes(tiny_file.read_bytes())
    small = PackedStore.build_or_open(path, cache_dir=cache)
    assert not (cache / "digests").exists()
    monkeypatch.setattr(arrays, "_MAX_VERIFIED_BYTES", 10)
    hashed = []
    file_digest = arrays.file_digest
    monkeypatch.setattr(arrays, "file_digest", lambda p: hashed.append(p) or file_digest(p))

    def fingerprint() -> str:
        return PackedStore.build_or_open(path, cache_dir=cache).fingerprint

    # A file that was just written is hashed each time.
    assert [fingerprint() for _ in range(2)] == [small.fingerprint] * 2
    assert len(hashed) == 2
    os.utime(path, (1, 1))
    assert [fingerprint() for _ in range(3)] == [small.fingerprint] * 3
    assert len(hashed) == 3
    (note,) = (cache / "digests").iterdir()
    note.write_text("damaged")
    assert fingerprint() == small.fingerprint
    assert len(hashed) == 4
    path.write_text(tiny_file.read_text(encoding="utf-8").replace("Dunmarsh", "Dunmarch"))
    os.utime(path, (2, 2))
    assert fingerprint() != small.fingerprint
    assert len(hashed) == 5


def test_what_killed_builders_left_is_removed_after_a_day(tiny_file: Path, tmp_path: Path) -> None:
    root = tmp_path / store.CACHE_FOLDER
    for name in (".old.building", ".alive.building", ".new.building", ".older.h1pqrs"):
        (root / name).mkdir(parents=True)
        (root / name / "half").write_text("")
    (root / ".old.lock").touch()
    for path in root.iterdir():
        if path.name != ".new.building":
            os.utime(path, (1, 1))
    with FileLock(root / ".alive.lock"):
        packed = PackedStore.build_or_open(tiny_file, cache_dir=tmp_path)
    left = {path.name for path in root.iterdir()} - {".alive.lock"}
    assert left == {packed.folder.name, ".alive.building", ".new.building"}
