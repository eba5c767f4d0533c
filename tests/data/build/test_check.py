"""`data check`: its figures against a slow count, all errors in one pass, leaks, and outputs."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.__main__ import main
from dragkit.data.build.figures import read_figures
from dragkit.data.build.overlap import overlap, split_of_file
from tests.data.build.slow_figures import rows_of, slow_figures

NAMES = st.sampled_from(
    [
        "Tellum",
        "tellum",
        "Thé Lun",
        "The\u0301 Lun",
        "a|b",
        "null",
        " x",
        "x",
        "ｘ",
        "é" * 40,
        "m.0n",
    ]
)
RELATIONS = st.sampled_from(["geo.country.capital", "country capital", "twin", "r", "R"])
TRIPLES = st.lists(st.tuples(NAMES, RELATIONS, NAMES), max_size=9)
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=2)
ROWS = st.fixed_dictionaries(
    {
        "question": st.sampled_from(["who is X?", "Who  is x?", "", " ", "what is Tellum", "q"]),
        "triples": TRIPLES,
    },
    optional={
        "answer": st.one_of(NAMES, st.lists(NAMES, max_size=3), st.none()),
        "answers": st.lists(NAMES, max_size=2),
        "topic_entities": st.one_of(NAMES, st.lists(NAMES, max_size=3), st.just([" "])),
        "paths": PATHS,
        "group": st.sampled_from(["", "g", 5, "5", None]),
    },
)
FILES = st.lists(ROWS, min_size=1, max_size=6)
GOOD = {"question": "q", "triples": [["a", "r", "b"]], "topic_entities": "a", "answer": "b"}

ROOT = Path(__file__).resolve().parents[3]

Check = Callable[..., tuple[int, str, str, dict]]


def write(path: Path, rows: Sequence[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Runs the command. Returns exit code, stdout, stderr and the report."""

    def run(*arguments: object) -> tuple[int, str, str, dict]:
        report = tmp_path / "report.json"
        code = main(["check", *map(str, arguments), "--report", str(report)])
        out, err = capsys.readouterr()
        return code, out, err, json.loads(report.read_text()) if report.is_file() else {}

    return run


def assert_equal_to_the_slow_count(paths: Sequence[Path], report: dict) -> None:
    slow = [slow_figures(rows_of(path)) for path in paths]
    for mine, theirs in zip(report["files"], slow, strict=True):
        counts = mine["counts"]
        assert {name: counts.get(name, 0) for name in theirs["counts"]} == theirs["counts"]
        assert mine["hops_to_nearest_answer"] == theirs["hops"]
        assert sum(mine["without_positive_fact"].values()) == theirs["counts"]["labels_none"]
        for name, expected in theirs["per_question"].items():
            assert mine["per_question"][name] == pytest.approx(expected)
    for pair in report["shared"]:
        first, second = (slow[[str(p) for p in paths].index(name)] for name in pair["files"])
        for kind, values in first["keys"].items():
            assert pair[kind] == len(values & second["keys"][kind]), kind


@settings(max_examples=60, deadline=None)
@given(first=FILES, second=FILES)
def test_figures_equal_a_slow_count(
    first: list[dict], second: list[dict], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("files")
    for number, row in enumerate(second):
        row["id"] = f"q{number}"
    for number, row in enumerate(first[::2]):
        row["id"] = f"q{number}"
    paths = [write(folder / "a.train.jsonl", first), write(folder / "a.test.jsonl", second)]
    report = folder / "report.json"
    code = main(["check", *map(str, paths), "--report", str(report)])
    document = json.loads(report.read_text())
    assert_equal_to_the_slow_count(paths, document)
    shared = document["shared"][0]["text"]
    assert code == (65 if shared else 0) and bool(document["problems"]) == bool(shared)


@pytest.mark.parametrize(
    "names",
    [
        ("webqsp.train", "webqsp.test", "cwq.dev"),
        ("webqsp_epr_retrieved.dev", "cwq.test"),
        ("worldcup.dev", "metaqa.dev"),
    ],
    ids=lambda names: names[0],
)
def test_figures_of_real_sets_equal_a_slow_count(
    names: tuple[str, ...], kgqa_data: Path, check: Check
) -> None:
    paths = [kgqa_data / f"{name}.jsonl.gz" for name in names]
    code, _, _, report = check(*paths, "--allow_leakage")
    assert code == 0
    assert_equal_to_the_slow_count(paths, report)


def test_all_errors_of_all_files_in_one_pass(tmp_path: Path, check: Check) -> None:
    bad = tmp_path / "bad.train.jsonl"
    bad.write_bytes(b'{"question": "q"\n{"question": "q", "triples": [["a", "b"]]}\n')
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(json.dumps(GOOD).encode() * 9)[:-12])
    plain = tmp_path / "plain.jsonl.gz"
    plain.write_text("{}")
    (empty := tmp_path / "empty.jsonl").touch()
    last = write(tmp_path / "last.jsonl", [GOOD, {"question": 5, "triples": []}])
    code, out, err, report = check(bad, cut, plain, empty, last)
    assert code == 65
    for place in (
        *(f"{bad}:1: $: not valid JSON", f"{bad}:2: $.triples[0]: Expected a triple"),
        *(f"{cut}:", f"{plain}: the name ends in .gz", f"{empty}: holds no question"),
        f"{last}:2: $.question: Expected",
    ):
        assert place in err and any(problem.startswith(place) for problem in report["problems"])
    assert [f["counts"].get("questions", 0) for f in report["files"]] == [0, 0, 0, 0, 1]
    assert [f["counts"].get("unusable_rows", 0) for f in report["files"]] == [2, 1, 0, 0, 1]
    assert "last.jsonl" in out and "internal" not in err


def test_missing_files_are_listed_together_before_anything_is_read(
    tmp_path: Path, check: Check
) -> None:
    good = write(tmp_path / "good.jsonl", [GOOD])
    code, out, err, report = check(tmp_path / "goood.jsonl", good, tmp_path)
    assert (code, out, report) == (66, "", {})
    assert "Similar names" in err and f"{tmp_path}: a folder" in err


@pytest.mark.parametrize(
    ("question", "is_a_leak"),
    [
        *(("Who is X?", True), ("who  IS x?", True), ("ｗho is x?", True)),
        *(("who is x", False), ("who is xx?", False), ("", False)),
    ],
)
def test_a_question_in_two_splits(
    question: str, is_a_leak: bool, tmp_path: Path, check: Check
) -> None:
    train = write(tmp_path / "my_train.jsonl", [GOOD, GOOD | {"question": "who is x?"}])
    empty = GOOD | {"question": ""}
    test = write(tmp_path / "my_valid.jsonl", [empty, GOOD | {"question": question}])
    code, out, err, report = check(train, test)
    assert code == 65 * is_a_leak and ("two splits" in out)
    assert report["shared"][0]["two_splits"]
    message = f"{test}:2: $.question: the same question as on line 2 of {train}"
    assert (message in err) == is_a_leak == any(x.startswith(message) for x in report["problems"])
    assert check(train, test, "--allow-leakage")[0] == 0
    # The same question twice in one split, or in files of no known split, is no leak.
    same = write(tmp_path / "other_train.jsonl", rows_of(test))
    unknown = write(tmp_path / "questions.jsonl", rows_of(test))
    code, out, _, report = check(train, same, unknown)
    assert code == 0 and "leakage was not checked" in out
    assert report["shared"][0]["text"] == is_a_leak


@pytest.mark.parametrize(
    ("name", "split"),
    [
        *(("webqsp_cwq_large.train.jsonl.gz", "train"), ("qa-dev.jsonl", "dev")),
        *(("Validation.jsonl", "dev"), ("val.jsonl", "dev"), ("test-00000-of-2.jsonl", "test")),
        *(("latest.jsonl", None), ("train_test.jsonl", None), ("questions.jsonl", None)),
        ("train_train.jsonl", "train"),
    ],
)
def test_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of_file(Path("train") / name) == split


def test_repeated_questions_and_groups(tmp_path: Path, check: Check) -> None:
    other = GOOD | {"triples": [["a", "s", "b"]]}
    shuffled = GOOD | {"triples": [["a", "s", "b"], ["a", "r", "b"]], "group": 7}
    rows = [GOOD, other, shuffled, shuffled | {"triples": shuffled["triples"][::-1]}]
    train = write(tmp_path / "train.jsonl", rows)
    more = write(tmp_path / "more.jsonl", [GOOD | {"group": "7", "question": "another"}])
    _, out, _, report = check(train, more)
    counts = report["files"][0]["counts"]
    assert (counts["repeated_texts"], counts["repeated_questions"]) == (3, 1)
    assert report["shared"][0]["group"] == 1 and "share 1 groups, 1 pairs" in out


def test_relations_that_are_read_as_the_same_words(tmp_path: Path) -> None:
    names = ["a.b.c", "x.b.c", "b_c", "b c", "d"]
    rows = [GOOD | {"triples": [["a", name, "b"] for name in names]}]
    figures, error = read_figures(write(tmp_path / "rows.jsonl", rows))
    assert error is None
    assert figures.counts["relations_with_shared_words"] == 4


def test_long_questions_and_keys_that_are_not_read(tmp_path: Path, check: Check) -> None:
    rows = [GOOD | {"question": "w " * 128}, GOOD | {"question": "w " * 129}]
    rows.append({k: v for k, v in GOOD.items() if k != "answer"} | {"a_entity": ["b"]})
    _, out, _, report = check(write(tmp_path / "rows.jsonl", rows))
    assert report["files"][0]["counts"]["long_questions"] == 1
    assert "keys that are not read: `a_entity` for `answer` (1 questions)" in out


def test_default_ids_of_two_files_are_not_the_same(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    files = [write(tmp_path / name, [GOOD]) for name in ("a.jsonl", "x/a.jsonl")]
    first, second = (read_figures(path)[0] for path in files)
    assert overlap(first.keys, second.keys).id == 0


def test_tables_are_as_wide_as_a_page(tmp_path: Path, check: Check) -> None:
    (tmp_path / "x").mkdir()
    names = [f"{'long_' * n}name.jsonl" for n in range(8)] + ["x/name.jsonl"]
    _, out, _, _ = check(*(write(tmp_path / name, [GOOD]) for name in names))
    tables = out.split("\n\n")[:-1]
    assert len(tables) > 1 and max(map(len, "\n".join(tables).splitlines())) <= 100
    assert all(out.count(f"{name} ") + out.count(f"{name}\n") for name in names)


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("check", ">&-"),
        ("check", "> /dev/full"),
        ("stats", "> /dev/full"),
        ("show rows-1", "| true; exit ${PIPESTATUS[0]}"),
    ],
)
def test_standard_output_that_cannot_be_written_exits_74(
    command: str, output: str, tmp_path: Path
) -> None:
    rows = write(tmp_path / "rows.jsonl", [GOOD] * 3)
    told = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m dragkit.data {command} {rows} {output}"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert told.returncode == 74 and "standard output" in told.stderr
    assert "Traceback" not in told.stderr and "Exception ignored" not in told.stderr


@pytest.mark.parametrize("report", ["folder", "/proc/report.json"])
def test_a_report_that_cannot_be_created_is_refused_first(
    report: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    good = write(tmp_path / "good.jsonl", [GOOD])
    assert main(["check", str(good), "--report", str(tmp_path / report)]) == 73
    out, err = capsys.readouterr()
    assert out == "" and "--report" in err
