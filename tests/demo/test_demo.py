"""The demo set: its facts, its files, and its questions against a brute-force search."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

import dragkit
from dragkit.data.question_file import read_questions
from dragkit.demo import DemoFiles, demo_files
from dragkit.demo.build import main
from dragkit.demo.kb import knowledge_base, table_facts
from dragkit.demo.questions import Template, balanced_counts, enumerate_questions
from dragkit.demo.subgraph import ITERATIONS, FactRanker
from tests.demo.test_demo_tables import facts as table_facts_by_hand

DEMO = Path(dragkit.__file__).parent / "demo"
Row = dict[str, object]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def files(cache: Path) -> DemoFiles:
    return demo_files(cache)


@pytest.fixture(scope="module")
def rows(files: DemoFiles) -> dict[str, list[Row]]:
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in files
    }


@pytest.fixture(scope="module")
def facts() -> set[tuple[str, str, str]]:
    """All facts, read from the tables without the package's reader."""
    return table_facts_by_hand()


def walk(facts: set[tuple[str, str, str]], starts: set[str], step: str) -> set[str]:
    """Follows one step by scanning all facts."""
    if step.endswith("^-1"):
        return {h for h, r, t in facts if r == step[:-3] and t in starts}
    return {t for h, r, t in facts if r == step and h in starts}


def digest(files: DemoFiles) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def chains(row: Row) -> list[list[str]]:
    return [part.split(" ") for part in row["qtype"].split(" & ")]


def test_the_knowledge_base_is_large_and_clean(facts: set[tuple[str, str, str]]) -> None:
    assert len(facts) >= 3000
    assert len({relation for _, relation, _ in facts}) >= 20
    for fact in facts:
        for name in fact:
            assert name == " ".join(name.split()) and "^" not in name, fact


def test_counts_and_mix(rows: dict[str, list[Row]]) -> None:
    assert {name: len(split) for name, split in rows.items()} == {
        "train": 2400,
        "dev": 320,
        "test": 520,
    }
    everything = [row for split in rows.values() for row in split]
    kinds = Counter("and" if "&" in row["qtype"] else row["hops"] for row in everything)
    for kind, share in ((1, 0.45), (2, 0.35), (3, 0.12), ("and", 0.08)):
        assert abs(kinds[kind] / len(everything) - share) < 0.01
    per_chain = Counter(row["qtype"] for row in everything)
    assert max(per_chain.values()) <= 0.06 * len(everything)
    assert any("^-1" in chain for chain in per_chain) and len(per_chain) >= 100
    assert len({row["id"] for row in everything}) == len(everything)
    assert {row["dataset"] for row in everything} == {"demo"}
    # Nothing is asked twice.
    assert len({(*row["topic_entities"], row["qtype"]) for row in everything}) == len(everything)
    assert len({row["question"] for row in everything}) == len(everything)


def test_answers_are_those_of_a_brute_force_search(
    rows: dict[str, list[Row]], facts: set[tuple[str, str, str]]
) -> None:
    sample = random.Random(0).sample(rows["train"], 100) + rows["dev"] + rows["test"]
    for row in sample:
        reached = []
        for topic, chain in zip(row["topic_entities"], chains(row), strict=True):
            ends = {topic}
            for step in chain:
                ends = walk(facts, ends, step)
            reached.append(ends)
        assert row["answer"] == sorted(set.intersection(*reached)), row["id"]
        assert row["hops"] == max(map(len, chains(row)))


def test_rows_agree_with_the_knowledge_base(
    rows: dict[str, list[Row]], facts: set[tuple[str, str, str]]
) -> None:
    for name, split in rows.items():
        for row in split:
            triples = {tuple(triple) for triple in row["triples"]}
            assert triples <= facts and len(triples) == len(row["triples"]) == 50
            names = {name for head, _, tail in triples for name in (head, tail)}
            assert 1 <= len(row["answer"]) <= 12
            assert not set(row["answer"]) & set(row["topic_entities"])
            assert row["answers_in_subgraph"] == len(names & set(row["answer"]))
            assert row["answer_in_subgraph"] == (row["answers_in_subgraph"] > 0)
            assert row["graph_size"] <= len(facts)
            for topic in row["topic_entities"]:
                assert topic[1:] in row["question"], row["question"]
            assert not re.search(r"[{}]|  |the The |the the ", row["question"])
            assert row["question"][-1] in "?."
            if name == "train":
                assert len(row["paths"]) == row["gold_paths_total"]
            else:
                assert not row["gold_forced"] and len(row["paths"]) <= row["gold_paths_total"]


def test_listed_paths_are_all_gold_paths_inside_the_subgraph(rows: dict[str, list[Row]]) -> None:
    for row in [*rows["dev"], *rows["test"], *rows["train"][:300]]:
        triples = {tuple(triple) for triple in row["triples"]}
        expected = []
        used = []
        for topic, chain in zip(row["topic_entities"], chains(row), strict=True):
            found = [[topic]]
            for step in chain:
                found = [p + [end] for p in found for end in walk(triples, {p[-1]}, step)]
            found = [path for path in found if path[-1] in row["answer"]]
            expected += found
            used += [chain] * bool(found)
        assert sorted(row["paths"]) == sorted(expected), row["id"]
        assert sorted(row["relation_paths"]) == sorted(map(list, {tuple(c) for c in used}))


def test_most_gold_paths_survive_and_distractors_remain(rows: dict[str, list[Row]]) -> None:
    blind = rows["dev"] + rows["test"]
    reachable = 0
    for row in blind:
        starts = defaultdict(set)
        for path in row["paths"]:
            starts[path[-1]].add(path[0])
        reachable += any(len(s) == len(row["topic_entities"]) for s in starts.values())
    assert 0.85 < reachable / len(blind) < 1.0
    for row in rows["train"] + blind:
        on_path = {frozenset(step) for path in row["paths"] for step in zip(path, path[1:])}  # noqa: B905
        distractors = [t for t in row["triples"] if frozenset((t[0], t[2])) not in on_path]
        assert len(distractors) >= 15, row["id"]
    relations = [len({relation for _, relation, _ in row["triples"]}) for row in blind]
    assert sum(relations) / len(relations) > 10


def test_the_package_reader_takes_the_files(files: DemoFiles) -> None:
    read = read_questions(files.dev)
    assert len(read.questions) == 320 and not read.rejects
    assert read.questions[0].topics and read.questions[0].paths


def test_the_same_bytes_under_another_hash_seed(files: DemoFiles, tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-m", "dragkit.demo.build", "--out", str(tmp_path)]
    root = str(DEMO.parents[1])
    path = os.pathsep.join([root, os.path.join(root, "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / path.name) for path in files]
    assert digest(DemoFiles(*(tmp_path / path.name for path in files))) == digest(files)


def test_the_cache_is_filled_once(files: DemoFiles, cache: Path) -> None:
    times = [path.stat().st_mtime_ns for path in files]
    assert demo_files(cache) == files
    assert [path.stat().st_mtime_ns for path in files] == times
    assert list((cache / "demo").iterdir()) == [files.train.parent]


def test_an_unwritable_folder_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--out", str(tmp_path / "file" / "demo")]) == 74
    assert "cannot write" in capsys.readouterr().err


def test_every_template_and_article_is_used(rows: dict[str, list[Row]]) -> None:
    header, *lines = (DEMO / "templates.tsv").read_text(encoding="utf-8").splitlines()
    assert header == "chain\tquestion"
    wordings = Counter(line.split("\t")[0] for line in lines)
    assert min(wordings.values()) >= 3 and len(set(lines)) == len(lines)
    assert set(wordings) == {row["qtype"] for row in rows["train"]}
    questions = " ".join(row["question"] for split in rows.values() for row in split)
    for expected in ("the United States", "the Danube River", "the euro", "the Latin script"):
        assert expected in questions
    assert "the France" not in questions and "a architect" not in questions


def test_table_facts_split_cells_and_skip_empty_ones() -> None:
    text = "king\tking.son\tking.seat\nLear\t\tDover\nPriam\tHector; Paris\tTroy\n"
    assert list(table_facts(text)) == [
        ("Lear", "king.seat", "Dover"),
        ("Priam", "king.son", "Hector"),
        ("Priam", "king.son", "Paris"),
        ("Priam", "king.seat", "Troy"),
    ]


def test_enumeration_skips_useless_questions() -> None:
    kb = knowledge_base([("a", "x.to", "b"), ("b", "x.to", "a"), ("c", "x.to", "b")])
    there = Template("x.to", (("x.to",),), ("{x}?",))
    assert [(q.topics, q.answers) for q in enumerate_questions(kb, there)] == [
        (("a",), ("b",)),
        (("b",), ("a",)),
        (("c",), ("b",)),
    ]
    back = Template("x.to x.to", (("x.to", "x.to"),), ("{x}?",))
    assert [(q.topics, q.answers) for q in enumerate_questions(kb, back)] == [(("c",), ("a",))]
    # Each topic alone leads to b only, so the second one adds nothing.
    both = Template("x.to & x.to", (("x.to",), ("x.to",)), ("{x} {y}?",))
    assert not list(enumerate_questions(kb, both))
    crowd = knowledge_base(("hub", "x.to", f"n{i}") for i in range(13))
    assert not list(enumerate_questions(crowd, there))


def test_balanced_counts_take_equal_shares() -> None:
    assert balanced_counts([5, 5, 5], 9) == [3, 3, 3]
    assert balanced_counts([1, 9, 9], 9) == [1, 4, 4]
    assert balanced_counts([2, 3], 5) == [2, 3]
    assert balanced_counts([4, 0], 0) == [0, 0]
    with pytest.raises(ValueError, match="6 questions are wanted"):
        balanced_counts([2, 3], 6)


def test_ranks_are_those_of_a_dense_random_walk() -> None:
    rng = random.Random(3)
    names = [f"n{i}" for i in range(12)]
    pool = [(a, f"r.{k}", b) for a in names for b in names for k in "xyz" if a != b]
    kb = knowledge_base([*rng.sample(pool, 40), ("far", "r.x", "away")])
    topics = ("n1", "n4")
    place = {name: i for i, name in enumerate(kb.entities)}
    dense = np.zeros((len(place), len(place)))
    share: dict[tuple[str, int], float] = {}
    for start in kb.entities:
        steps = defaultdict(list)
        for index, (head, relation, tail) in enumerate(kb.facts):
            if head == start:
                steps[relation].append((index, tail))
            if tail == start:
                steps["back " + relation].append((index, head))
        for ways in steps.values():
            for index, end in ways:
                probability = 1 / len(steps) / len(ways)
                dense[place[end], place[start]] += probability
                share[start, index] = share.get((start, index), 0.0) + probability
    seed = np.zeros(len(place))
    seed[[place[topic] for topic in topics]] = 0.5
    flow = seed
    for _ in range(ITERATIONS):
        flow = 0.25 * seed + 0.75 * dense @ flow
    rank = [
        flow[place[head]] * share[head, i] + flow[place[tail]] * share[tail, i]
        for i, (head, _, tail) in enumerate(kb.facts)
    ]
    ranker, keys = FactRanker(kb, restart=0.25), np.array([7], dtype=np.uint64)
    order, reached = ranker.rank([topics], keys, len(kb.facts))
    ranked = np.array(rank)[order[0]]
    assert np.all(np.diff(ranked) <= 2e-11)
    assert sorted(order[0]) == list(range(len(kb.facts)))
    assert np.array_equal(ranker.rank([topics], keys, 5)[0], order[:, :5])
    assert reached[0] == len(kb.facts) - 1 and kb.facts[order[0, -1]] == ("far", "r.x", "away")
