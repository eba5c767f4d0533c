"""Loads a finished run and evaluates it. Its settings come from the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from dragkit import __version__
from dragkit.checkpoint.checkpoint import load_checkpoint
from dragkit.config import TrainConfig
from dragkit.data.cache import cache_root
from dragkit.data.store import StoredQuestion
from dragkit.errors import ConfigError, MissingInputError
from dragkit.eval.evaluate import EvaluationResult, evaluate
from dragkit.eval.types import Prediction
from dragkit.generator.fingerprint import generator_fingerprints
from dragkit.generator.generator import Generator
from dragkit.generator.load import check_generator, within_positions
from dragkit.generator.random_weights import is_random
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import build_joint, build_retriever, data_paths, setup_process
from dragkit.trainer.inputs import open_all
from dragkit.trainer.phase import Phase
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.phase2 import JointPhase
from dragkit.trainer.question_dataset import QuestionDataset, evaluation_batch_size
from dragkit.trainer.resume import (
    moved_with_run,
    require_same_inputs,
    resolve_checkpoint,
    saved_config,
)

logger = logging.getLogger(__name__)


class Run:
    """A trained model with its settings. `load_run` builds it.

    Attributes:
        checkpoint: folder of the checkpoint.
        step: optimizer steps up to the checkpoint.
        config: the run's configuration, with the device and what `load_run` changed.
        model: the retriever, or retriever and generator after phase 2, on the device.
    """

    def __init__(
        self,
        folder: str | Path,
        checkpoint: str | int = "best",
        device: str = "auto",
        *,
        seed: int | None = None,
        max_new_tokens: int | None = None,
    ) -> None:
        loaded = load_checkpoint(resolve_checkpoint(Path(folder), checkpoint))
        saved = moved_with_run(saved_config(loaded), loaded.folder.parent)
        changed: dict[str, object] = {"device": device}
        changed |= {} if seed is None else {"seed": seed}
        changed |= {} if max_new_tokens is None else {"val_max_new_tokens": max_new_tokens}
        run = type(saved.run).model_validate(saved.run.model_dump() | changed)
        self.config: TrainConfig = saved.model_copy(update={"run": run})
        self.checkpoint, self.step = loaded.folder, loaded.state.step
        if loaded.state.phase != "phase1" and is_random(self.config.generator_model):
            raise ConfigError(
                f"{folder}: the run's generator {self.config.generator_model} has random weights, "
                "so its answers mean nothing. metrics.jsonl in the run holds loss and throughput."
            )
        if loaded.state.phase != "phase1":
            self.config = within_positions(self.config)
        self._device = setup_process(self.config)
        self._encoder = TextEncoder(
            find_encoder(self.config.encoder.model), cache_root(self.config.data.cache_dir)
        )
        inputs = {"encoder": self._encoder.fingerprint}
        if loaded.state.phase != "phase1":
            name = self.config.generator_model
            folder = check_generator(self.config.generator, self._device, name=name)
            inputs |= generator_fingerprints(Path(folder))
        require_same_inputs(loaded, inputs, "Put the first ones in their place.")
        self._generator: Generator | None = None
        self._phase: Phase
        if loaded.state.phase == "phase1":
            retriever = build_retriever(self.config, self._encoder).to(self._device)
            self._phase = RetrieverPhase(self.config, retriever)
        else:
            joint = build_joint(self.config, self._encoder, self._device)
            self._generator, self._phase = joint.model.generator, joint
        self._phase.load(loaded)
        self.model: nn.Module = self._phase.model

    def default_data(self) -> str:
        """The run's test questions, else its validation questions.

        Raises:
            MissingInputError: the run has neither.
        """
        paths = data_paths(self.config)
        path = paths.test or paths.val
        if path is None:
            raise MissingInputError(
                f"{self.checkpoint.parent}: the run has neither test nor validation questions. "
                "Name a question file (--data FILE)."
            )
        return path

    def dataset(self, path: str | Path, batch_size: int | None = None) -> QuestionDataset:
        """Reads a question file for this run's model.

        Raises:
            DataError: the file holds unusable rows.
            MissingInputError: there is no such file.
        """
        size = batch_size or evaluation_batch_size(self.config, self._generator, self._device)
        return QuestionDataset(path, self.config, self._encoder, self._generator, size)

    def evaluate(
        self,
        data: str | Path | QuestionDataset | None = None,
        *,
        limit: int | None = None,
        batch_size: int | None = None,
        facts: Literal["retrieved", "gold"] = "retrieved",
    ) -> EvaluationResult:
        """Answers the questions of a file and scores the answers.

        Args:
            data: question file (JSONL or JSONL.gz), or an opened one. None takes `default_data()`.
            limit: number of questions from the start of the file. None takes all.
            batch_size: questions per batch. None takes 32 on a CPU, and what fits on a GPU.
            facts: facts of the prompts. "gold" takes the positive ones, which measures what the
                generator answers after perfect retrieval. A question without a positive fact keeps
                its retrieved ones. The log counts these questions.

        Returns:
            `report.means` by metric with `report.counts`, and one entry of `predictions` per
            question.

        Raises:
            ConfigError: `facts` is "gold" and the checkpoint is of phase 1, which answers nothing.
            DataError: the file holds unusable rows.
            MissingInputError: there is no such file.
            ValueError: `facts` is neither "retrieved" nor "gold".
        """
        if facts not in ("retrieved", "gold"):
            raise ValueError(f'facts must be "retrieved" or "gold", got {facts!r}')
        if isinstance(self._phase, JointPhase):
            self._phase.gold_only = facts == "gold"
        elif facts == "gold":
            raise ConfigError(
                f"facts: gold was given, but {self.checkpoint} is a checkpoint of phase 1, which "
                "generates no answers. Name a run of phase 2."
            )
        if not isinstance(data, QuestionDataset):
            data = self.dataset(data or self.default_data(), batch_size)
        result = evaluate(self._phase, data, self._device, limit=limit)
        if facts == "gold":
            asked = result.report.counts["asked"]
            labelled = result.report.num_scored.get("retrieval-recall", 0)
            logger.info(
                "%s: the prompts hold gold facts. %d of %d questions have none and keep their "
                "retrieved facts",
                data.path,
                asked - labelled,
                asked,
            )
        return result

    @torch.no_grad()
    def predictions(
        self,
        data: str | Path | QuestionDataset,
        *,
        batch_size: int | None = None,
        generate: bool = True,
    ) -> Iterator[tuple[StoredQuestion, Prediction]]:
        """Yields the questions of a file with what the model makes of them, in file order.

        Args:
            data, batch_size: as for `evaluate`.
            generate: False ranks facts only.

        Raises:
            DataError: the file holds unusable rows.
            MissingInputError: there is no such file.
        """
        if not isinstance(data, QuestionDataset):
            data = self.dataset(data, batch_size)
        self.model.eval()
        relations = data.relations.to(self._device)
        for batch in data.load(data.batch_sampler.in_file_order(None), self._device):
            batch = batch.to(self._device)
            for prediction in self._phase.predict(batch, relations, generate=generate):
                yield data.store.question(prediction.row), prediction


def load_run(folder: str | Path, checkpoint: str | int = "best", device: str = "auto") -> Run:
    """Loads a run for evaluation.

    Args:
        folder: folder of a run, or of one of its checkpoints.
        checkpoint: "best", "latest" or a step.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the run's generator has random weights.
        MissingInputError: there is no such run or checkpoint.
    """
    return Run(folder, checkpoint, device)


def evaluate_run(
    folder: str | Path,
    data: Sequence[str | Path] = (),
    checkpoint: str | int = "best",
    device: str = "auto",
) -> dict[str, dict[str, float]]:
    """Loads a run and evaluates it on question files.

    Args:
        folder: folder of a run, or of one of its checkpoints.
        data: question files. An empty sequence takes the run's test, else validation questions.
        checkpoint: "best", "latest" or a step.
        device: "auto", "cpu", "cuda" or "cuda:N".

    Returns:
        By file, the mean of each metric. `Run.evaluate` also gives the predictions.

    Raises:
        CheckpointError: the checkpoint is damaged.
        ConfigError: the run's generator has random weights.
        DataError: a file holds unusable rows.
        MissingInputError: there is no such run, checkpoint or file.
    """
    run = load_run(folder, checkpoint, device)
    paths = [str(path) for path in data] or [run.default_data()]
    return {path: dict(run.evaluate(path).report.means) for path in paths}


def evaluation_document(
    run: Run,
    data: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int | None = None,
    facts: Literal["retrieved", "gold"] = "retrieved",
) -> dict:
    """Evaluates question files for `python -m dragkit.evaluate`.

    Returns:
        JSON-ready versions, checkpoint and configuration, and by file report and predictions.
    """
    paths = list(dict.fromkeys(data or [run.default_data()]))
    files = {}
    for path, dataset in zip(
        paths, open_all([partial(run.dataset, path, batch_size) for path in paths]), strict=True
    ):
        result = run.evaluate(dataset, limit=limit, facts=facts)
        files[path] = {
            "data_fingerprint": dataset.store.fingerprint,
            "summary": dataset.store.summary,
            **result.report.to_dict(),
            "table": result.report.to_table(),
            "predictions": result.predictions,
        }
    return {
        "dragkit": __version__,
        "checkpoint": str(run.checkpoint),
        "step": run.step,
        "facts": facts,
        "config": run.config.model_dump(mode="json"),
        "files": files,
    }
