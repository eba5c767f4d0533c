"""Shared fixtures: where the real KGQA data lies, and a seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def kgqa_data() -> Path:
    """The folder of published KGQA sets; a test that asks for it is skipped where it is absent."""
    named = os.environ.get("DRAGKIT_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (folder / "sample.jsonl").is_file():
        pytest.skip(f"no KGQA data in {folder}; set DRAGKIT_DATA to a folder with sample.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _process_state() -> Iterator[None]:
    """Every test starts from one seed, and training's process-wide settings end with it."""
    torch.manual_seed(0)
    # By hand: monkeypatch cannot put back what a module answers for by `__getattr__`.
    tf32 = torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.set_flush_denormal(False)


@pytest.fixture(autouse=True)
def _private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing a test builds reaches the user's cache."""
    if not os.environ.get("DRAGKIT_CACHE"):
        monkeypatch.setenv("DRAGKIT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
