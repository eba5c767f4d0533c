"""Every file of settings that YAML or a human broke ends with 2 or 66 and its name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from dragkit.config.__main__ import main

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30)
)
BROKEN = {
    "template": "data:\n  heuristics_path: {{ questions }}\n",
    "list as a key": "? [a, b]\n: 1\n",
    "mapping as a key in a section": "optim:\n  ? {a: 1}\n  : 2\n",
    "date": "run:\n  seed: 2024-13-45\n",
    "int tag": "run:\n  seed: !!int nine\n",
    "float tag": "optim:\n  lr: !!float small\n",
    "bool tag": "run:\n  val_generation: !!bool perhaps\n",
    "timestamp tag": "run:\n  seed: !!timestamp noon\n",
    "binary tag": "run:\n  checkpoint_dir: !!binary 'a'\n",
    "python tag": "run:\n  seed: !!python/object/apply:os.getcwd []\n",
    "own tag": "run:\n  seed: !ENV SEED\n",
    "long number": f"run:\n  seed: {'9' * 5000}\n",
    "deep": "run: " + "[" * 5000,
    "bomb": f"{BOMB}run:\n  seed: *a29\n",
    "circle": "run: &r\n  seed: *r\n",
    "two documents": "run:\n  seed: 1\n---\nrun:\n  seed: 2\n",
    "tab": "run:\n\tseed: 1\n",
    "open bracket": "run: [1\n",
    "unknown anchor": "run: *nowhere\n",
    "merge of a number": "run:\n  <<: 3\n",
    "list": "- run\n- optim\n",
    "text": "seed 3\n",
    "null byte": "run:\n  seed: \0\n",
    "given twice": "run:\n  seed: 1\n  seed: 2\n",
    "given twice, once dotted": "run.seed: 1\nrun:\n  seed: 2\n",
    "given twice, the section first": "run:\n  seed: 1\nrun.seed: 2\n",
    "given twice in a block": "phase1:\n  run:\n    seed: 1\n  run.seed: 2\n",
    "block in a block": "phase1:\n  phase1:\n    run: {seed: 1}\n",
    "bomb of merges": "a0: &a0 {x: 1}\n"
    + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 30)),
    "too long": f"run:\n  seed: {'9' * 1_000_000}\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_settings_exit_2_with_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(BROKEN[kind])
    start = time.monotonic()
    assert main(["show", "--config", str(path)]) == 2
    shown = capsys.readouterr()
    assert str(path) in shown.err and shown.out == ""
    assert len(shown.err) < 5000 and time.monotonic() - start < 10


@pytest.mark.parametrize("data", [b"run:\n  seed: \xe9\n", "run: 1".encode("utf-16")])
def test_settings_that_are_not_utf_8_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(data)
    assert main(["show", "--config", str(path)]) == 2
    assert "mine.yaml: is not UTF-8" in capsys.readouterr().err


def test_what_is_no_file_of_settings_exits_66(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "settings.yaml").write_text("")
    for name, reason in (
        ("folder", "directory"),
        ("pipe", "named pipe"),
        ("setings.yaml", "settings.yaml"),
        ("settings.yaml/below", "Not a directory"),
        ("n" * 300, "too long"),
    ):
        assert main(["show", "--config", str(tmp_path / name)]) == 66
        shown = capsys.readouterr().err
        assert name in shown and reason in shown


def test_a_line_is_named_where_a_value_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("optim:\n  lr: 1.0e-4\nrun:\n  seed: 2024-13-45\n")
    assert main(["show", "--config", str(path)]) == 2
    assert "mine.yaml:4: not valid YAML: '2024-13-45'" in capsys.readouterr().err
