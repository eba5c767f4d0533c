"""Label noise and the training fraction: which data sets they touch, and resuming with them."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from dragkit.errors import Interrupted
from dragkit.trainer.inputs import RunInputs
from dragkit.trainer.question_dataset import QuestionDataset
from tests.trainer.run_cases import FIXTURE, assert_same, make_run, stop_after

DATA = {
    "data.val_heuristics_path": str(FIXTURE),
    "data.test_heuristics_path": str(FIXTURE),
    "optim.epochs": 1,
}
HANDICAPS = {"data.label_noise": 0.6, "data.train_fraction": 0.5}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, QuestionDataset]]:
    """The data sets that runs open, and whether each is for training."""
    seen: list[tuple[bool, QuestionDataset]] = []
    original = RunInputs.dataset

    def record(self: RunInputs, *args: object, training: bool = False) -> QuestionDataset:
        dataset = original(self, *args, training=training)
        seen.append((training, dataset))
        return dataset

    monkeypatch.setattr(RunInputs, "dataset", record)
    return seen


def test_both_phases_train_on_the_same_labels_and_evaluate_on_the_true_ones(
    tmp_path: Path,
    opened: list[tuple[bool, QuestionDataset]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        make_run(tmp_path, 2, **DATA, **HANDICAPS).execute()
    # What phase 2 reads is checked before phase 1 trains.
    second, first = (dataset for training, dataset in opened if training)
    assert first.tokens is None and second.tokens is not None
    store = first.store
    moved = first.collator.labels < store.labels
    assert moved.any()
    assert np.array_equal(first.collator.labels, second.collator.labels)
    assert first.batch_sampler.rows.tolist() == second.batch_sampler.rows.tolist()
    assert len(first) == len(second) == 4
    batch = first.collator(range(8))
    assert batch.graph.label.tolist() == first.collator.labels.tolist()
    assert batch.num_labelled == sum(any(store.question(row).labels) for row in range(8))
    others = [dataset for training, dataset in opened if not training]
    assert len(others) == 3
    for dataset in others:
        assert dataset.collator.labels is None and len(dataset) == 8
    text = f"moved {moved.sum()} of {store.labels.sum()} positive labels"
    assert caplog.text.count(text) == caplog.text.count("uses 4 of 8 questions") == 1


def test_questions_without_their_labels_still_train(
    tmp_path: Path, opened: list[tuple[bool, QuestionDataset]], caplog: pytest.LogCaptureFixture
) -> None:
    """A quarter of the questions keeps its labels, moved or not. All questions are seen."""
    fewer = {"data.label_fraction": 0.25}
    with caplog.at_level(logging.INFO):
        for name, settings in (("clean", {}), ("noisy", {"data.label_noise": 0.6})):
            make_run(tmp_path, 2, name, **DATA, **fewer, **settings).execute()
    noise = make_run(tmp_path, 1, "noise", **DATA, **{"data.label_noise": 0.6})
    moved = noise.inputs.dataset(noise.paths.train, None, 3, training=True).collator.labels
    clean, _, noisy, _, _ = (dataset for training, dataset in opened if training)
    store = clean.store
    question = np.repeat(np.arange(8), store.fact_counts)
    for dataset, labels in ((clean, store.labels), (noisy, moved)):
        assert len(dataset) == 8
        kept = dataset.collator.labels.astype(bool)
        labelled = {row for row in range(8) if kept[question == row].any()}
        assert 0 < len(labelled) <= 2
        for row in labelled:
            in_row = question == row
            assert np.array_equal(kept[in_row], labels[in_row].astype(bool))
    assert "in 2 of 8 questions" in caplog.text


def test_by_default_training_uses_the_stored_labels_and_every_question(
    tmp_path: Path, opened: list[tuple[bool, QuestionDataset]]
) -> None:
    run = make_run(tmp_path, 1, **DATA)
    train = run.inputs.dataset(run.paths.train, None, 3, training=True)
    assert train.collator.labels is None
    assert train.batch_sampler.rows.tolist() == list(range(8))


def test_a_resumed_run_keeps_labels_and_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = HANDICAPS | {"optim.batch_size": 1, "run.seed": 3}
    make_run(tmp_path, 1, "whole", **settings).execute()
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Interrupted):
            make_run(tmp_path, 1, "cut", **settings).execute()
    # The checkpoint tells the handicaps.
    del settings["data.label_noise"], settings["data.train_fraction"]
    make_run(tmp_path, 1, "cut", **settings, **{"run.resume": True}).execute()
    assert_same(tmp_path / "whole", tmp_path / "cut")
