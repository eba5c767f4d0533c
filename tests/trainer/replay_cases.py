"""Runs, phases and a stand-in for CUDA graphs, for the tests of replayed steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


class EagerCapture:
    """Stands in for `CudaCapture`: a replay runs the work again, on the same tensors."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        for _ in range(replay_module.WARM_UPS):
            work()

        def replay() -> None:
            self.replays += 1
            work()

        return replay


def phase1_run(tmp_path: Path, name: str = "run", **overrides: object) -> TrainingRun:
    """Phase 1 without dropout. `section__key=value` overrides settings."""
    settings = {key.replace("__", "."): value for key, value in overrides.items()}
    return make_run(tmp_path, 1, name, **{"retriever.dropout": 0.0} | settings)


def new_phase(training_run: TrainingRun, **changes: object) -> RetrieverPhase:
    """A new phase without replay. `changes` are settings of the retriever."""
    retriever = training_run.config.retriever.model_copy(update=changes)
    config = training_run.config.model_copy(update={"retriever": retriever})
    return RetrieverPhase(config, build_retriever(config, training_run.encoder))


def with_replay(
    phase: RetrieverPhase, dataset: QuestionDataset, capture: Callable, max_graphs: int = 16
) -> RetrieverPhase:
    """A phase around the same model whose steps are replayed."""
    samples = [dataset.collator(rows) for rows in dataset.batch_sampler.batches(0)]
    make_replay = partial(
        StepReplay, buckets=Buckets(samples), capture=capture, max_graphs=max_graphs
    )
    return RetrieverPhase(phase.config, phase.model, forward=phase.forward, make_replay=make_replay)


def gradients(phase: RetrieverPhase) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in phase.model.named_parameters()
    }


def assert_close(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    """Equal up to float32 rounding: padded products add more rows."""
    for name, value in expected.items():
        assert (actual[name] is None) == (value is None), name
        if value is not None:
            scale = value.abs().max().clamp(min=1e-2)
            assert (actual[name] - value).abs().max() <= 5e-6 * scale, name
