"""Training steps as ways to be timed: the trainer's own, its variants, and the same with PyG."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

from bench.data import pyg_questions, raw_questions, text_encoder
from bench.measure import Tally, Way, check_agreement
from bench.pyg_rearev import PackedPyGReaRev, pyg_batch
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.retriever.losses import retrieval_loss
from dragkit.trainer.build import build_retriever, maybe_replay
from dragkit.trainer.compile import autocast, compile_retriever
from dragkit.trainer.loop import Trainer
from dragkit.trainer.optim import build_optimizer
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.question_dataset import QuestionSource

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class OurStep:
    """The trainer's own step, fed by the source's own loader; phase 2's counts its tokens."""

    def __init__(
        self, trainer: Trainer, batches: list[list[int]], tally: Tally | None = None
    ) -> None:
        self.trainer, self.batches, self.tally = trainer, batches, tally
        self.stream = self._stream()

    def _stream(self) -> Iterator[QuestionBatch]:
        while True:
            yield from self.trainer.train.load(self.batches, self.trainer.device)

    def __call__(self) -> None:
        batch = next(self.stream)
        (done,) = self.trainer.train_step([batch])
        if self.tally is not None:
            self.tally.tokens += done.num_tokens
            self.tally.supervised += batch.target.ids.numel()


def phase1_trainer(
    config: TrainConfig,
    source: QuestionSource,
    cache: Path,
    run_dir: Path,
    device: torch.device = CPU,
) -> Trainer:
    phase = RetrieverPhase(config, build_retriever(config, text_encoder(cache)).to(device))
    return Trainer(config, phase, source, None, run_dir, device)


def other_way(trainer: Trainer, *, compiled: bool, replay: bool) -> Trainer:
    """A trainer of the same weights, with its step compiled or replayed as a CUDA graph."""
    # Whether batches go to page-locked memory is the source's, and a replay makes its own copies.
    config, source = trainer.config, copy(trainer.train)
    phase = RetrieverPhase(config, trainer.phase.model)
    if compiled:
        phase.forward = compile_retriever(phase.model)
    if replay:
        maybe_replay(phase, source, config, trainer.device)
    return Trainer(config, phase, source, None, trainer.run_dir, trainer.device)


def replayed_way(trainer: Trainer, batches: list[list[int]], batch: int, steps: int) -> list[Way]:
    """Our step as CUDA graphs, once every size is recorded; on a GPU only."""
    if trainer.device.type != "cuda":
        return []
    step = OurStep(other_way(trainer, compiled=False, replay=True), batches)
    for _ in batches:
        step()
    return [Way("dragkit, CUDA graphs", step, batch, steps)]


def compiled_ways(
    trainer: Trainer,
    batches: list[list[int]],
    batch: int,
    steps: int,
    request: pytest.FixtureRequest,
) -> list[Way]:
    """Our step with `--compile`, once every kind of batch is compiled; only when asked for."""
    if not request.config.getoption("--bench-compiled"):
        return []
    on_gpu = trainer.device.type == "cuda"
    ways = []
    for replay in (False, True) if on_gpu else (False,):
        step = OurStep(other_way(trainer, compiled=True, replay=replay), batches)
        for _ in batches:
            step()
        name = "dragkit, compiled retriever" + (", CUDA graphs" if replay else "")
        ways.append(Way(name, step, batch, steps))
    return ways


class PackedPyGStep:
    """The same step written with PyG: its collation, its operators, the same loss and AdamW."""

    def __init__(
        self, trainer: Trainer, batches: list[list[int]], *, per_fact: bool, compiled: bool = False
    ) -> None:
        retriever = trainer.phase.model
        text_dim = retriever.pooling.project.in_features
        self.device = trainer.device
        self.model = PackedPyGReaRev(retriever.config, text_dim, per_fact=per_fact).to(self.device)
        self.model.load_state_dict(retriever.state_dict())
        self.call = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.config, self.relations = trainer.config, trainer.relations
        questions = pyg_questions(trainer.train, sorted({row for rows in batches for row in rows}))
        self.lists = [[questions[row] for row in rows] for rows in batches]
        self.stream = cycle(self.lists)
        self.parameters = list(self.model.parameters())
        optim = trainer.config.optim
        group = {
            "params": self.parameters,
            "lr": optim.lr,
            "weight_decay": optim.weight_decay,
        }
        self.optimizer = build_optimizer([group], self.device)

    def backward(self, batch: Batch, precision: str) -> Tensor:
        """Forward and backward; returns the logits."""
        batch = batch.to(self.device)
        with autocast(precision, self.device):
            logits = self.call(batch, self.relations).float()
        loss = retrieval_loss(
            logits,
            batch.label,
            batch.fact_ptr,
            rho=self.config.loss.rho,
            margin=self.config.loss.margin,
        )
        positive = torch.segment_reduce(batch.label, "sum", offsets=batch.fact_ptr) > 0
        (loss / positive.sum().clamp(min=1)).backward()
        return logits

    def __call__(self) -> None:
        self.backward(pyg_batch(next(self.stream)), self.config.run.precision)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, trainer: Trainer, rows: list[int], name: str) -> None:
        """Logits and every gradient equal ours on one batch, in float32."""
        run = trainer.config.run.model_copy(update={"precision": "float32"})
        config = trainer.config.model_copy(update={"run": run})
        batch, phase = trainer.train.collator(rows), RetrieverPhase(config, trainer.phase.model)
        phase.model.train()
        logits = phase.forward(batch.to(self.device), trainer.relations).fact_logits
        theirs = self.backward(pyg_batch(self.lists[0]), "float32")
        check_agreement(f"{name}: logits", logits, theirs, 1e-4)
        phase.training_step(batch, trainer.relations, phase.counts([batch]), 0)
        ours = dict(phase.model.named_parameters())
        for key, parameter in self.model.named_parameters():
            # Nothing reads a last layer's distribution, nor does a softmax its scores' common part.
            if not key.startswith("node_score.bias"):
                check_agreement(f"{name}: gradient of {key}", ours[key].grad, parameter.grad, 1e-3)
        for model in (phase.model, self.model):
            model.zero_grad(set_to_none=True)


def raw_batches(source: QuestionSource, batches: list[list[int]]) -> list[list[dict]]:
    raw = raw_questions(source.path)
    texts = source.store.question_texts
    for row in {row for rows in batches for row in rows}:
        if raw[row]["question"] != texts[row]:
            raise ValueError(f"{source.path}: line {row + 1} is not row {row} of the store")
    return [[raw[row] for row in rows] for rows in batches]
