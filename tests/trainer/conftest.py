"""A phase 1 run on invented questions, shared by the tests of a module."""

from __future__ import annotations

import pytest

from dragkit.data.packed import QuestionBatch
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.run import TrainingRun
from tests.trainer.replay_cases import MICRO_BATCHES, phase1_run


@pytest.fixture(scope="module")
def training_run(tmp_path_factory: pytest.TempPathFactory) -> TrainingRun:
    # The fixture that moves the cache has a narrower scope, so it does not act here.
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    return phase1_run(tmp_path_factory.mktemp("replay"), data__cache_dir=cache)


@pytest.fixture(scope="module")
def dataset(training_run: TrainingRun) -> QuestionDataset:
    return training_run.inputs.dataset(training_run.paths.train, None, 3)


@pytest.fixture(scope="module")
def batches(dataset: QuestionDataset) -> list[QuestionBatch]:
    return [dataset.collator(rows) for rows in MICRO_BATCHES]
