"""Files of questions built from a graph and questions: content, shards, faults and restarts."""

from __future__ import annotations

import gzip
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path

import networkx
import pytest

from dragkit.data.__main__ import main
from dragkit.data.build import building, cutting
from dragkit.data.build.building import build
from dragkit.data.build.settings import BuildSettings
from dragkit.data.question_file import read_questions
from dragkit.errors import ConfigError, CreateError, DataError, MissingInputError
from dragkit.selftest.toy import as_on_a_terminal

ENTITIES = [f"city {i}" for i in range(60)]


def _facts(seed: int = 0) -> list[tuple[str, str, str]]:
    draw = random.Random(seed)
    return sorted(
        {
            (draw.choice(ENTITIES), draw.choice(["near", "twin of", "in"]), draw.choice(ENTITIES))
            for _ in range(300)
        }
    )


def _source(folder: Path, count: int = 300, **changes: object) -> BuildSettings:
    """A graph and questions, some of which name their topics."""
    draw = random.Random(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kg.tsv").write_text("".join("\t".join(fact) + "\n" for fact in _facts()))
    with (folder / "qa.jsonl").open("w") as out:
        for number in range(count):
            topic, answer = draw.choice(ENTITIES), draw.choice(ENTITIES)
            row = {"question": f"what is near {topic.upper()}? ({number})", "answer": [answer]}
            if number % 2:
                row["topic_entities"] = [topic]
            out.write(json.dumps(row) + "\n")
    return BuildSettings(
        **{
            "questions": str(folder / "qa.jsonl"),
            "output": folder / "out",
            "graph": (folder / "kg.tsv",),
            "max_facts": 20,
            "workers": 1,
            **changes,
        }
    )


def _rows(folder: Path) -> dict[str, list[dict]]:
    return {
        path.name.split(".")[0]: [json.loads(line) for line in gzip.open(path)]
        for path in sorted(folder.glob("*.jsonl.gz"))
    }


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAGKIT_CACHE", str(tmp_path / "cache"))


def test_hops_give_what_a_graph_library_gives(tmp_path: Path) -> None:
    settings = _source(tmp_path, method="hops", hops=2, max_facts=10_000)
    message = build(settings)
    rows = _rows(settings.output)
    graph = networkx.MultiGraph([(h, t) for h, _, t in _facts()])
    assert set(rows) == {"train", "dev", "test"}
    for row in (row for split in rows.values() for row in split):
        topics = [name for name in ENTITIES if f"near {name.upper()}?" in row["question"]]
        assert row["topic_entities"] == topics
        assert row.get("topics_linked", False) == (int(row["question"].split("(")[1][:-1]) % 2 == 0)
        near = networkx.single_source_shortest_path_length(graph, topics[0], 1)
        expected = [f for f in _facts() if f[0] in near or f[2] in near]
        assert sorted(map(tuple, row["triples"])) == expected
        names = {name for h, _, t in expected for name in (h, t)}
        assert row["answers_in_subgraph"] == sum(name in names for name in row["answer"])
        assert row["answer_in_subgraph"] == (row["answers_in_subgraph"] > 0)
    every = [row for split in rows.values() for row in split]
    found = sum(row["answer_in_subgraph"] for row in every)
    assert f"{found}  {100 * found / 300:5.1f} %  have an answer in their subgraph" in message
    assert "150   50.0 %  have topics that were found in their text" in message
    # The files are what training reads.
    for name in rows:
        read_questions(settings.output / f"{name}.jsonl.gz")


def test_processes_and_shards_make_the_same_bytes(tmp_path: Path) -> None:
    build(_source(tmp_path))
    two = _source(tmp_path, output=tmp_path / "two", workers=2)
    build(two)
    flags = ["--graph", str(tmp_path / "kg.tsv"), "--questions", two.questions, "--max-facts", "20"]
    sharded = ["build", *flags, "--output", str(tmp_path / "shards"), "--workers", "1"]
    for index in (2, 3, 1):
        assert main([*sharded, "--shard", f"{index}/3"]) == 0
    assert not list((tmp_path / "shards").glob("*.gz"))
    assert main(["merge", str(tmp_path / "shards")]) == 0
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["build.json", "dev.jsonl.gz", "test.jsonl.gz", "train.jsonl.gz"]
    for other in ("two", "shards"):
        assert sorted(path.name for path in (tmp_path / other).iterdir()) == files
        for name in files:
            first, second = ((tmp_path / f / name).read_bytes() for f in ("out", other))
            assert first == second, (other, name)


def test_an_unfinished_build_is_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _source(tmp_path, shard=(0, 3))
    build(settings)
    assert main(["merge", str(settings.output)]) == 66
    assert "2 of 3 parts are missing, the first is 1" in capsys.readouterr().err
    assert main(["merge", str(tmp_path / "nothing")]) == 66


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    settings = _source(tmp_path, count=2000)
    build(_source(tmp_path, count=2000, output=tmp_path / "whole"))
    command = [sys.executable, "-m", "dragkit.data", "build", "--questions", settings.questions]
    command += ["--graph", str(tmp_path / "kg.tsv"), "--max-facts", "20", "--workers", "1"]
    command += ["--output", str(settings.output)]
    parts = settings.output / "parts"
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(parts.glob("*.json"))) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    made = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.json")}
    assert 3 <= len(made) < 16
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode == 0
    for name in ("train", "dev", "test"):
        file = f"{name}.jsonl.gz"
        assert (settings.output / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert not parts.exists()


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, "1"), (signal.SIGHUP, "2")])
def test_a_stopped_build_says_how_to_go_on(number: int, workers: str, tmp_path: Path) -> None:
    settings = _source(tmp_path, count=2000)
    command = [sys.executable, "-m", "dragkit.data", "build", "--questions", settings.questions]
    command += ["--graph", str(tmp_path / "kg.tsv"), "--max-facts", "20", "--workers", workers]
    command += ["--output", str(settings.output)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=as_on_a_terminal
    )
    while process.poll() is None and not list((settings.output / "parts").glob("*.json")):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 75, errors
    assert "Run the same command again" in errors


def test_what_is_built_already_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _source(tmp_path)
    first = build(settings)
    monkeypatch.setattr(building, "make_parts", lambda *_, **__: pytest.fail("built again"))
    assert build(settings) == first
    with pytest.raises(CreateError, match="another value of max_facts"):
        build(_source(tmp_path, max_facts=21))
    (tmp_path / "kg.tsv").write_text("a\tb\tc\n")
    with pytest.raises(CreateError, match="another value of inputs"):
        build(settings)


def test_questions_that_bring_facts_keep_them(tmp_path: Path) -> None:
    facts = [[f"n{i}", "r", f"n{i + 1}"] for i in range(30)]
    row = {"id": "q", "question": "?", "answer": ["n3"], "q_entity": ["n0"], "graph": facts}
    row |= {"a_entity": ["n3"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    base = {"questions": str(tmp_path / "train.jsonl"), "workers": 1}
    expected = {"whole": facts, "first": facts[:5], "near": facts[:5]}
    for name, changes in (
        ("whole", {}),
        ("first", {"limit_triples": 5}),
        ("near", {"max_facts": 5}),
    ):
        build(BuildSettings(**base, output=tmp_path / name, **changes))
        ((row,),) = _rows(tmp_path / name).values()
        assert sorted(row["triples"]) == sorted(expected[name])
        assert row["topic_entities"] == ["n0"]


def test_relations_are_excluded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = _source(tmp_path, exclude_relation=("twin of",))
    build(settings)
    relations = {
        t[1] for rows in _rows(settings.output).values() for r in rows for t in r["triples"]
    }
    assert relations == {"near", "in"}
    (tmp_path / "names.txt").write_text("in\nnearr\ntwins\n")
    flags = ["--graph", str(tmp_path / "kg.tsv"), "--questions", settings.questions]
    flags += ["--output", str(tmp_path / "b"), "--exclude-relations", str(tmp_path / "names.txt")]
    assert main(["build", *flags]) == 65
    message = capsys.readouterr().err
    assert f"{tmp_path / 'names.txt'}:2: relation: the graph has no relation 'nearr'" in message
    assert f"{tmp_path / 'names.txt'}:3: relation: the graph has no relation 'twins'" in message


def test_what_cannot_be_built_is_refused_before_anything_is_cut(tmp_path: Path) -> None:
    settings = _source(tmp_path)
    qa = tmp_path / "qa.jsonl"
    with pytest.raises(DataError, match="no question brings facts. Name the files"):
        build(_source(tmp_path, graph=(), max_facts=None))
    rows = [{"question": "?", "answer": "a", "topic_entities": ["City 1"]}] * 2
    qa.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"qa\.jsonl:1: 'City 1'. Use the names"):
        build(settings)
    qa.write_text('{"question": "who?", "answer": "a"}\n')
    with pytest.raises(DataError, match="none of 1 questions names a topic, and no name"):
        build(_source_of(settings, tmp_path / "b"))
    qa.write_text('{"question": "city 1?", "answer": "a"}\n{"question": 3}\n[]\n')
    with pytest.raises(DataError, match=r"(?s)qa\.jsonl:2: .*qa\.jsonl:3: .*2 of 3 rows"):
        build(_source_of(settings, tmp_path / "c"))
    with pytest.raises(ConfigError, match="restart"):
        build(_source(tmp_path / "d", restart=2.0))
    for name in ("b", "c"):
        assert not list((tmp_path / name / "parts").iterdir())


def test_all_missing_files_are_named_at_once(tmp_path: Path) -> None:
    settings = _source(
        tmp_path,
        graph=(tmp_path / "kg.tsb", tmp_path),
        aliases=tmp_path / "names.tsv",
        exclude_relations=tmp_path / "none.txt",
    )
    with pytest.raises(MissingInputError) as caught:
        build(settings)
    first, second, *others = str(caught.value).splitlines()
    assert "kg.tsb: no such file. Similar names" in first and "kg.tsv" in first
    assert "a folder, not a file" in second
    assert ["names.tsv" in others[0], "none.txt" in others[1], len(others)] == [True, True, 2]
    assert not settings.output.exists()


@pytest.mark.parametrize("header", ["question,answer,topic", "qid,query,answers,topic_entity"])
def test_usual_columns_of_a_table_are_read(header: str, tmp_path: Path) -> None:
    values = {"query": "which?", "question": "which?", "qid": "7"}
    names = header.split(",")
    row = ",".join(
        values.get(name, "a|b" if name.startswith("answer") else "city 1") for name in names
    )
    settings = _source(tmp_path, questions=str(tmp_path / "test.csv"))
    (tmp_path / "test.csv").write_text(f"{header}\n{row}\n")
    build(settings)
    ((found,),) = _rows(settings.output).values()
    assert (found["question"], found["answer"]) == ("which?", ["a", "b"])
    assert found["topic_entities"] == ["city 1"] and "topics_linked" not in found
    assert found["id"] == ("7" if "qid" in names else "test-2")


def _source_of(settings: BuildSettings, output: Path) -> BuildSettings:
    return BuildSettings(settings.questions, output, graph=settings.graph, workers=1)


def test_topics_outside_the_graph_are_listed(tmp_path: Path) -> None:
    settings = _source(tmp_path)
    with (tmp_path / "qa.jsonl").open("a") as out:
        row = {"question": "?", "answer": "a", "topic_entities": ["city 1", "Atlantis"]}
        out.write(json.dumps(row) + "\n")
    message = build(settings)
    assert "missing_topics.txt" in message
    assert (settings.output / "missing_topics.txt").read_text() == (
        f"{tmp_path / 'qa.jsonl'}:301: topics not in the graph: 'Atlantis'\n"
    )


def test_a_process_that_dies_ends_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = _source(tmp_path, count=2000)
    flags = ["--graph", str(tmp_path / "kg.tsv"), "--questions", settings.questions]
    flags += ["--output", str(settings.output), "--workers", "2"]
    wait = cutting.wait

    def kill_one(pending: set[Future[int]], **options: object) -> object:
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        return wait(pending, **options)

    monkeypatch.setattr(cutting, "wait", kill_one)
    assert main(["build", *flags]) == 74
    assert "Fewer --workers need less memory" in capsys.readouterr().err
