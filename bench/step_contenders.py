"""Whole training steps to be timed: the trainer's own, its variants, and the same with PyG."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Batch

from bench.data import (
    BenchFile,
    pyg_questions,
    question_source,
    raw_questions,
    sizes,
    text_encoder,
    whole_batches,
)
from bench.measure import CPU, Contender, Tally, check_agreement
from bench.pyg_rearev import PackedPyGReaRev, pyg_batch
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.retriever.losses import retrieval_loss
from dragkit.trainer.build import build_joint, build_retriever, build_retriever_phase
from dragkit.trainer.compile import autocast
from dragkit.trainer.loop import Trainer
from dragkit.trainer.optim import build_optimizer
from dragkit.trainer.phase1 import RetrieverPhase

_BATCHES = 8


class OurStep:
    """The trainer's own step, fed by its own loader. Phase 2's counts its tokens."""

    def __init__(
        self, trainer: Trainer, batches: list[list[int]], tally: Tally | None = None
    ) -> None:
        self.trainer, self.batches, self.tally = trainer, batches, tally
        self.stream = self._stream()

    def _stream(self) -> Iterator[QuestionBatch]:
        while True:
            yield from self.trainer.load_batches(self.batches)

    def __call__(self) -> None:
        batch = next(self.stream)
        (done,) = self.trainer.train_step([batch])
        if self.tally is not None:
            self.tally.tokens += done.num_tokens
            self.tally.supervised += batch.target.ids.numel()


@dataclass(frozen=True, slots=True)
class Setup:
    """A trainer and the rows of its batches.

    Attributes:
        calls: steps of one timed round on a CPU.
    """

    file: BenchFile
    trainer: Trainer
    batches: list[list[int]]
    calls: int

    def ours(self, tally: Tally | None = None) -> Contender:
        """The trainer's step."""
        step = OurStep(self.trainer, self.batches, tally)
        return Contender("dragkit", step, False, self.calls, tally)

    def variants(self, *, compiled: bool) -> list[Contender]:
        """Phase 1's step as CUDA graphs on a GPU, and also compiled if `compiled`."""
        on_gpu = self.trainer.device.type == "cuda"
        kinds = [(False, True)] if on_gpu else []
        kinds += [(True, False)] if compiled else []
        kinds += [(True, True)] if compiled and on_gpu else []
        return [self._variant(*kind) for kind in kinds]

    def _variant(self, compiled: bool, replay: bool) -> Contender:
        trainer = self.trainer
        run = trainer.config.run.model_copy(update={"compile": compiled, "cuda_graphs": replay})
        config = trainer.config.model_copy(update={"run": run})
        data, device = trainer.train_set, trainer.device
        phase = build_retriever_phase(config, trainer.phase.model, device, data)
        other = Trainer(config, phase, data, None, trainer.run_dir, device)
        step = OurStep(other, self.batches)
        for _ in self.batches:  # compiles or records every size of batch
            step()
        words = ["compiled retriever"] * compiled + ["CUDA graphs"] * replay
        return Contender(", ".join(["dragkit", *words]), step, False, self.calls)

    def about(self) -> dict[str, object]:
        """The data, and what its first batch holds."""
        return {"data": self.file.name} | sizes(self.trainer.train_set.collator(self.batches[0]))

    def raw_batches(self) -> list[list[dict]]:
        """The same questions as lines of the file."""
        raw, texts = raw_questions(self.file.path), self.trainer.train_set.store.question_texts
        for row in {row for rows in self.batches for row in rows}:
            if raw[row]["question"] != texts[row]:
                raise ValueError(f"{self.file.path}: line {row + 1} is not row {row} of the store")
        return [[raw[row] for row in rows] for rows in self.batches]


def set_up(
    config: TrainConfig,
    file: BenchFile,
    cache: Path,
    run_dir: Path,
    *,
    batch: int,
    calls: int = 1,
    device: torch.device = CPU,
) -> Setup:
    """A trainer of the configured phase on the questions of a file."""
    encoder, joint = text_encoder(cache), config.run.phase == 2
    if joint:
        phase = build_joint(config, encoder, device)
    else:
        phase = RetrieverPhase(config, build_retriever(config, encoder).to(device))
    generator = phase.model.generator if joint else None
    source = question_source(file, config, cache, generator, batch)
    trainer = Trainer(config, phase, source, None, run_dir, device)
    return Setup(file, trainer, whole_batches(source, batch, _BATCHES), calls)


class PackedPyGStep:
    """The same step written with PyG: its collation, its operators, the same loss and AdamW."""

    def __init__(self, setup: Setup, *, per_fact: bool, compiled: bool = False) -> None:
        trainer = setup.trainer
        retriever = trainer.phase.model
        text_dim = retriever.pooling.project.in_features
        self.device = trainer.device
        self.model = PackedPyGReaRev(retriever.config, text_dim, per_fact=per_fact).to(self.device)
        self.model.load_state_dict(retriever.state_dict())
        self.call = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.config, self.relations = trainer.config, trainer.relations
        rows = sorted({row for rows in setup.batches for row in rows})
        questions = pyg_questions(trainer.train_set, rows)
        self.lists = [[questions[row] for row in rows] for rows in setup.batches]
        self.stream = cycle(self.lists)
        self.parameters = list(self.model.parameters())
        optim = trainer.config.optim
        group = {"params": self.parameters, "lr": optim.lr, "weight_decay": optim.weight_decay}
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

    def checked(self, setup: Setup, name: str) -> Contender:
        """This step, once logits and every gradient equal ours on the first batch in float32."""
        trainer = setup.trainer
        run = trainer.config.run.model_copy(update={"precision": "float32"})
        config = trainer.config.model_copy(update={"run": run})
        phase = RetrieverPhase(config, trainer.phase.model)
        batch = trainer.train_set.collator(setup.batches[0])
        phase.model.train()
        logits = phase.forward(batch.to(self.device), trainer.relations).fact_logits
        theirs = self.backward(pyg_batch(self.lists[0]), "float32")
        check_agreement(f"{name}: logits", logits, theirs, 1e-4)
        phase.training_step(batch, trainer.relations, phase.counts([batch]), 0)
        ours = dict(phase.model.named_parameters())
        for key, parameter in self.model.named_parameters():
            # A softmax does not depend on what all its scores have in common.
            if not key.startswith("node_score.bias"):
                check_agreement(f"{name}: gradient of {key}", ours[key].grad, parameter.grad, 1e-3)
        for model in (phase.model, self.model):
            model.zero_grad(set_to_none=True)
        return Contender(name, self, calls=setup.calls)
