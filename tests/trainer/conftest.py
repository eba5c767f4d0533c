"""The parts of a run whose steps are replayed."""

from __future__ import annotations

import pytest

from dragkit.data.packed import QuestionBatch
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.run import TrainingRun
from tests.trainer.replay_cases import MICRO_BATCHES, phase1_run


@pytest.fixture(scope="module")
def training_run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    """The parts of a run; a fixture for a module comes before the one that moves the cache."""
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    return phase1_run(tmp_path_factory.mktemp("replay"), data__cache_dir=cache)


@pytest.fixture(scope="module")
def dataset(training_run: TrainingRun) -> QuestionDataset:
    return training_run.source(training_run.paths.train, None, 3)


@pytest.fixture(scope="module")
def batches(dataset: QuestionDataset) -> list[QuestionBatch]:
    return [dataset.collator(rows) for rows in MICRO_BATCHES]
