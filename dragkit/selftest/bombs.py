"""Small files that would take a careless reader much time, much memory, or another meaning."""

from __future__ import annotations

import gzip
import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from dragkit.checkpoint.checkpoint import load_checkpoint
from dragkit.config import GeneratorConfig, load_config
from dragkit.data.question_file import read_questions
from dragkit.errors import DragkitError
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.load import check_generator
from dragkit.selftest.damages import rewrite_manifest
from dragkit.selftest.outcome import Outcome, require
from dragkit.selftest.saves import save

_LIMIT_S, _LIMIT_MIB = 1.0, 200
_DEPTH, _ZEROS = 100_000, 100_000_000
_CHECKPOINT = "step-00000010"
_INDEX = "model.safetensors.index.json"
_LEVELS = range(1, 30)


def _deep(start: bytes) -> bytes:
    return start + b"[" * _DEPTH + b"]" * _DEPTH + b"}"


def _yaml_bomb(first: str, line: str) -> bytes:
    """Lines of nine aliases each, of which each names the line before: 9^29 values."""
    lines = [line.format(i=i, nine=", ".join([f"*a{i - 1}"] * 9)) for i in _LEVELS]
    return "\n".join([first, *lines]).encode()


def _line_bombs(size: int) -> dict[str, bytes]:
    start = b'{"question": "q", "triples": [], '
    return {
        "a deep value": _deep(b'{"question": "q", "triples": '),
        "a deep value that is not read": _deep(start + b'"x": '),
        "a long number": start + b'"id": ' + b"9" * size + b"}",
        "a key twice": start + b'"question": "r"}',
        "a key twice, once in escapes": start + b'"qu\\u0065stion": "r"}',
        "a line of zeros in gzip": gzip.compress(bytes(_ZEROS)),
        "gzip in gzip": gzip.compress(gzip.compress(b"{}")),
    }


def _settings_bombs(size: int) -> dict[str, bytes]:
    return {
        "a deep list": b"optim: " + b"[" * _DEPTH,
        "deep blocks": b"".join(b" " * i + b"a:\n" for i in range(1000)),
        "a long number": b"run:\n  seed: " + b"9" * size,
        "aliases of aliases": _yaml_bomb("a0: &a0 [x]", "a{i}: &a{i} [{nine}]"),
        "merges of merges": _yaml_bomb("a0: &a0 {x: 1}", "a{i}: &a{i} {{<<: [{nine}]}}"),
        "a key twice": b"run:\n  seed: 1\n  seed: 2\n",
        "a key twice, once dotted": b"run.seed: 1\nrun:\n  seed: 2\n",
    }


def _json_bombs(content: bytes, size: int) -> dict[str, bytes]:
    """What a JSON file becomes: its first key is given twice, or another value is a bomb."""
    start = content.rstrip().removesuffix(b"}").rstrip()
    first = next(iter(json.loads(content)))
    return {
        "a deep value": _deep(start + b', "x": '),
        "a long number": start + b', "x": ' + b"9" * size + b"}",
        "a key twice": start + b', "' + first.encode() + b'": null}',
        "a list": b"[" * _DEPTH,
    }


def bombs(outcome: Outcome, root: Path, *, digits: int) -> None:
    """Offers each bomb to its reader: a documented error, at once, in little memory.

    Args:
        outcome: counts the cases.
        root: folder of the files.
        digits: length of the longest number.
    """
    place = root / "bombs"
    place.mkdir()
    for kind, content in _line_bombs(digits).items():
        _offer(outcome, kind, "questions", place / "questions.jsonl", content, read_questions)
    for kind, content in _settings_bombs(digits).items():
        _offer(outcome, kind, "settings", place / "settings.yaml", content, _read_settings)
    model = place / "model"
    shutil.copytree(tiny_generator_path(), model)
    for name in ("config.json", "tokenizer_config.json"):
        intact = (model / name).read_bytes()
        for kind, content in _json_bombs(intact, digits).items():
            # The library reads a tokenizer's settings, and takes the last of two values.
            if name == "config.json" or kind in ("a deep value", "a list"):
                _offer(outcome, kind, name, model / name, content, _check_model)
        (model / name).write_bytes(intact)
    (model / "model.safetensors").rename(model / "part.safetensors")
    names = [{"weight_map": {"a": f"{lead}/part.safetensors"}} for lead in ("..", str(place))]
    lists = _json_bombs(b'{"weight_map": {"a": "part.safetensors"}}', digits)
    lists |= {f"a file elsewhere, {n}": json.dumps(x).encode() for n, x in enumerate(names)}
    (place / "part.safetensors").write_bytes((model / "part.safetensors").read_bytes())
    for kind, content in lists.items():
        _offer(outcome, kind, "the list of weights", model / _INDEX, content, _check_model)
    save(place, 10, 1.0)
    intact = (place / _CHECKPOINT / "state.json").read_bytes()
    for kind, content in _json_bombs(intact, digits).items():
        _offer(outcome, kind, "state.json", place / _CHECKPOINT / "state.json", content, _load)


def _read_settings(path: Path) -> object:
    return load_config(file=path)


def _check_model(path: Path) -> object:
    return check_generator(GeneratorConfig(), torch.device("cpu"), name=str(path.parent))


def _load(path: Path) -> object:
    rewrite_manifest(path.parent)
    return load_checkpoint(path.parent)


def _offer(
    outcome: Outcome,
    kind: str,
    name: str,
    path: Path,
    content: bytes,
    read: Callable[[Path], object],
) -> None:
    path.write_bytes(content)
    with outcome.case(f"{name}: {kind}"), _limits():
        try:
            read(path)
        except DragkitError as error:
            place = str(path.parent)
            require(place in str(error), f"the message names no file: {str(error)[:100]}")
            require(error.exit_code in (2, 65, 66), f"exit code {error.exit_code}")
        else:
            require(False, "accepted")


@contextmanager
def _limits() -> Iterator[None]:
    """Requires that a block is quick and takes little memory more than before."""
    before, began = _memory_mib("VmRSS"), time.process_time()
    # The kernel forgets the highest use so far.
    Path("/proc/self/clear_refs").write_text("5")
    yield
    seconds, more = time.process_time() - began, _memory_mib("VmHWM") - before
    require(seconds < _LIMIT_S, f"took {seconds:.1f} s")
    require(more < _LIMIT_MIB, f"took {more:.0f} MiB")


def _memory_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024
