"""The earlier implementation's files, downloaded at a commit and checked, and its scripts."""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from dragkit.data.__main__ import main
from dragkit.data.build.released import FILES, download
from dragkit.errors import ConfigError, DataError, MissingInputError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = {name: f"content of {name}".encode() for name in FILES}
HASHES = {name: hashlib.sha256(data).hexdigest() for name, data in CONTENT.items()}


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A hub with the files, and the hashes that it records for them."""
    hashes = dict(HASHES)

    def fetch(repository: str, name: str, *, revision: str, local_dir: Path) -> str:
        assert revision == COMMIT
        path = Path(local_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CONTENT[name])
        return str(path)

    def metadata(url: str) -> SimpleNamespace:
        assert COMMIT in url
        return SimpleNamespace(etag=next(hashes[name] for name in FILES if url.endswith(name)))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", metadata)
    return hashes


def test_files_of_the_recorded_hash_are_kept(recorded: dict[str, str], tmp_path: Path) -> None:
    paths = download(COMMIT, tmp_path / "out", {})
    assert [path.read_bytes() for path in paths] == list(CONTENT.values())
    assert sorted((tmp_path / "out").iterdir()) == sorted(paths)
    download(COMMIT, tmp_path / "again", HASHES)


@pytest.mark.parametrize("given", [{}, {FILES[0]: "0" * 64}])
def test_another_hash_is_refused_and_the_file_removed(
    given: dict[str, str], recorded: dict[str, str], tmp_path: Path
) -> None:
    if not given:
        recorded[FILES[0]] = "f" * 64
    with pytest.raises(DataError, match=f"its SHA-256 is {HASHES[FILES[0]]}, but"):
        download(COMMIT, tmp_path, given)
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_a_hash_is_not_trusted(recorded: dict[str, str], tmp_path: Path) -> None:
    recorded[FILES[1]] = "an-etag-of-another-kind"
    with pytest.raises(DataError, match=f"--sha256 {FILES[1]}={HASHES[FILES[1]]}"):
        download(COMMIT, tmp_path, {})


def test_a_revision_that_may_change_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a commit of 40 hex digits, got 'main'"):
        download("main", tmp_path, {})
    with pytest.raises(ConfigError, match="64 hex digits of one of"):
        download(COMMIT, tmp_path, {FILES[0]: "abc"})


def test_an_unreachable_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(url: str) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(MissingInputError, match="no route. Check the network"):
        download(COMMIT, tmp_path, {})


@pytest.mark.parametrize("command", ["generate_webqsp_heuristics", "generate_cwq_heuristics"])
def test_the_earlier_generators_keep_the_first_facts(command: str, tmp_path: Path) -> None:
    facts = [[f"n{i}", "r", f"n{i + 1}"] for i in range(80)]
    rows = [
        {"id": f"q{i}", "question": "?", "answer": [f"n{i}"], "q_entity": ["n0"], "graph": facts}
        for i in (10, 70)
    ]
    source = tmp_path / "cwq_train.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for limit, expected in (([], 50), (["--limit_triples", "5"], 5)):
        output = tmp_path / f"out-{expected}"
        assert main([command, "--input", str(source), "--output", str(output), *limit]) == 0
        with gzip.open(output / "train.jsonl.gz") as lines:
            written = [json.loads(line) for line in lines]
        assert [row["triples"] for row in written] == [facts[:expected]] * 2
        assert [row["answer_in_subgraph"] for row in written] == [expected == 50, False]
