"""A run with two checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.checkpoint.checkpoint_cases import save_steps


@pytest.fixture(scope="session")
def _two_saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two") / "run"
    save_steps(root, 10, 20)
    return root


@pytest.fixture
def run(_two_saved: Path, tmp_path: Path) -> Path:
    """A copy of a run with checkpoints at steps 10 and 20."""
    shutil.copytree(_two_saved, tmp_path / "run")
    return tmp_path / "run"
