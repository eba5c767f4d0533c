"""The parts of a run whose steps are replayed."""

from __future__ import annotations

import pytest

from dragkit.data.packed import QuestionBatch
from dragkit.trainer.question_dataset import QuestionSource
from dragkit.trainer.run import Run
from tests.trainer.replay_cases import MICRO_BATCHES, command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The parts of a run; a fixture for a module comes before the one that moves the cache."""
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    return command(tmp_path_factory.mktemp("replay"), data__cache_dir=cache)


@pytest.fixture(scope="module")
def source(made: Run) -> QuestionSource:
    return made.source(made.paths.train, None, 3)


@pytest.fixture(scope="module")
def batches(source: QuestionSource) -> list[QuestionBatch]:
    return [source.collator(rows) for rows in MICRO_BATCHES]
