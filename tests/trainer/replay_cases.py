"""Runs, phases and a stand-in for recorded work, for the tests of replayed steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from dragkit.data.padding import Buckets
from dragkit.trainer import replay as replay_module
from dragkit.trainer.build import build_retriever
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit.trainer.replay import StepReplay
from dragkit.trainer.run import TrainingRun
from tests.trainer.run_cases import make_run

# Question 2 has an empty graph.
MICRO_BATCHES = [[0, 1, 2], [3, 4], [2], [5, 6, 7], [1, 5, 0], [2, 2, 2]]


class Rerun:
    """The interface of `CudaCapture`: recorded work is the work itself, on the same tensors."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        for _ in range(replay_module.WARM_UPS):
            work()

        def again() -> None:
            self.replays += 1
            work()

        return again


def phase1_run(tmp_path: Path, name: str = "run", **overrides: object) -> TrainingRun:
    """Phase 1 without dropout; `overrides` are settings with two underscores for a dot."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return make_run(tmp_path, 1, name, **{"retriever.dropout": 0.0} | settings)


def new_phase(training_run: TrainingRun, **changes: object) -> RetrieverPhase:
    """A fresh phase; `changes` are of the retriever."""
    retriever = training_run.config.retriever.model_copy(update=changes)
    config = training_run.config.model_copy(update={"retriever": retriever})
    return RetrieverPhase(config, build_retriever(config, training_run.encoder))


def with_replay(
    phase: RetrieverPhase, dataset: QuestionDataset, capture: Callable, max_graphs: int = 16
) -> StepReplay:
    samples = [dataset.collator(rows) for rows in dataset.batch_sampler.batches(0)]
    phase.replay = StepReplay(
        phase.loss,
        list(phase.model.parameters()),
        Buckets(samples),
        capture,
        max_graphs=max_graphs,
    )
    return phase.replay


def gradients(phase: RetrieverPhase) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in phase.model.named_parameters()
    }


def assert_close(ours: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """Equal but for the rounding of products with more rows."""
    for name, theirs in wanted.items():
        assert (ours[name] is None) == (theirs is None), name
        if theirs is not None:
            scale = theirs.abs().max().clamp(min=1e-2)
            assert (ours[name] - theirs).abs().max() <= 5e-6 * scale, name
