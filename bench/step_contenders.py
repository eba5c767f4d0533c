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
from bench.results import Comparison
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.retriever.losses import retrieval_loss
from dragkit.trainer.build import build_joint, build_retriever, build_retriever_phase
from dragkit.trainer.compile import autocast
from dragkit.trainer.loop import Trainer
from dragkit.trainer.optim import build_optimizer
from dragkit.trainer.phase1 import RetrieverPhase

_NUM_BATCHES = 8


class OurStep:
    """The trainer's own step, fed by its own loader. In phase 2 it counts its tokens."""

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
        (output,) = self.trainer.train_step([batch])
        if self.tally is not None:
            self.tally.tokens += output.num_tokens
            self.tally.supervised += batch.target.ids.numel()


@dataclass(frozen=True, slots=True)
class StepSetup:
    """A trainer on the questions of a file.

    Attributes:
        batches: rows of each batch.
        calls: steps of one timed round on a CPU.
    """

    file: BenchFile
    trainer: Trainer
    batches: list[list[int]]
    calls: int

    @classmethod
    def make(
        cls,
        config: TrainConfig,
        file: BenchFile,
        cache_dir: Path,
        run_dir: Path,
        *,
        batch: int,
        calls: int = 1,
        device: torch.device = CPU,
    ) -> StepSetup:
        """Packs the questions and builds the trainer. `batch` is the questions of a step."""
        encoder, joint = text_encoder(cache_dir), config.run.phase == 2
        if joint:
            phase = build_joint(config, encoder, device)
        else:
            phase = RetrieverPhase(config, build_retriever(config, encoder).to(device))
        generator = phase.model.generator if joint else None
        source = question_source(file, config, cache_dir, generator, batch)
        trainer = Trainer(config, phase, source, None, run_dir, device)
        return cls(file, trainer, whole_batches(source, batch, _NUM_BATCHES), calls)

    def ours(self, tally: Tally | None = None) -> Contender:
        """The trainer's step."""
        step = OurStep(self.trainer, self.batches, tally)
        return Contender("dragkit", step, False, self.calls, tally)

    def variants(self, *, compiled: bool) -> list[Contender]:
        """Phase 1's step as CUDA graphs on a GPU, and also compiled if `compiled`."""
        on_gpu = self.trainer.device.type == "cuda"
        options = [(False, True)] if on_gpu else []
        options += [(True, False)] if compiled else []
        options += [(True, True)] if compiled and on_gpu else []
        return [self._variant(*option) for option in options]

    def _variant(self, compiled: bool, replay: bool) -> Contender:
        trainer = self.trainer
        run = trainer.config.run.model_copy(update={"compile": compiled, "cuda_graphs": replay})
        config = trainer.config.model_copy(update={"run": run})
        data, device = trainer.train_set, trainer.device
        phase = build_retriever_phase(config, trainer.phase.model, device, data)
        other = Trainer(config, phase, data, None, trainer.run_dir, device)
        step = OurStep(other, self.batches)
        # Every size of batch is compiled or recorded before the timing.
        for _ in self.batches:
            step()
        words = ["compiled retriever"] * compiled + ["CUDA graphs"] * replay
        return Contender(", ".join(["dragkit", *words]), step, False, self.calls)

    def comparison(self, title: str, **about: object) -> Comparison:
        """An empty comparison with the data, the sizes of the first batch and `about`."""
        batch = self.trainer.train_set.collator(self.batches[0])
        about = {"data": self.file.name} | sizes(batch) | about
        return Comparison(title, about, [], questions=len(self.batches[0]))

    def raw_batches(self) -> list[list[dict]]:
        """The same questions as lines of the file.

        Raises:
            ValueError: the lines of the file and the rows of the store do not correspond.
        """
        raw, texts = raw_questions(self.file.path), self.trainer.train_set.store.question_texts
        for row in {row for rows in self.batches for row in rows}:
            if raw[row]["question"] != texts[row]:
                raise ValueError(f"{self.file.path}: line {row + 1} is not row {row} of the store")
        return [[raw[row] for row in rows] for rows in self.batches]


class PackedPyGStep:
    """The same step with PyG's collation and operators, the same loss and AdamW."""

    def __init__(self, setup: StepSetup, *, per_fact: bool, compiled: bool = False) -> None:
        trainer = setup.trainer
        retriever = trainer.phase.model
        text_dim = retriever.pooling.project.in_features
        self.device, self.config = trainer.device, trainer.config
        self.relations = trainer.relations
        self.model = PackedPyGReaRev(retriever.config, text_dim, per_fact=per_fact).to(self.device)
        # The same weights, so that logits and gradients can be compared.
        self.model.load_state_dict(retriever.state_dict())
        # Dynamic sizes, because every batch has another number of nodes and facts.
        self.call = torch.compile(self.model, dynamic=True) if compiled else self.model
        rows = sorted({row for rows in setup.batches for row in rows})
        questions = pyg_questions(trainer.train_set, rows)
        self.batches = [[questions[row] for row in rows] for rows in setup.batches]
        self.stream = cycle(self.batches)
        self.parameters = list(self.model.parameters())
        optim = self.config.optim
        group = {"params": self.parameters, "lr": optim.lr, "weight_decay": optim.weight_decay}
        self.optimizer = build_optimizer([group], self.device)

    def backward(self, batch: Batch, precision: str) -> Tensor:
        """Forward and backward. Returns the logits, float32 [E]."""
        batch = batch.to(self.device)
        with autocast(precision, self.device):
            logits = self.call(batch, self.relations).float()
        rho, margin = self.config.loss.rho, self.config.loss.margin
        loss = retrieval_loss(logits, batch.label, batch.fact_ptr, rho=rho, margin=margin)
        positive = torch.segment_reduce(batch.label, "sum", offsets=batch.fact_ptr) > 0
        (loss / positive.sum().clamp(min=1)).backward()
        return logits

    def __call__(self) -> None:
        self.backward(pyg_batch(next(self.stream)), self.config.run.precision)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def checked(self, setup: StepSetup, name: str) -> Contender:
        """This step, once logits and gradients equal ours on the first batch in float32.

        Raises:
            ValueError: logits or gradients differ.
        """
        trainer = setup.trainer
        # Mixed precision rounds at other places in PyG, so float32 is compared.
        run = trainer.config.run.model_copy(update={"precision": "float32"})
        phase = RetrieverPhase(trainer.config.model_copy(update={"run": run}), trainer.phase.model)
        batch = trainer.train_set.collator(setup.batches[0])
        phase.model.train()
        logits = phase.forward(batch.to(self.device), trainer.relations).fact_logits
        peer_logits = self.backward(pyg_batch(self.batches[0]), "float32")
        check_agreement(f"{name}: logits", logits, peer_logits, 1e-4)
        phase.training_step(batch, trainer.relations, phase.counts([batch]), 0)
        ours = dict(phase.model.named_parameters())
        for key, parameter in self.model.named_parameters():
            # A softmax does not depend on its scores' bias, whose gradient is rounding.
            if not key.startswith("node_score.bias"):
                what = f"{name}: gradient of {key}"
                check_agreement(what, ours[key].grad, parameter.grad, 1e-3, order=2)
        # The timed steps start without gradients.
        for model in (phase.model, self.model):
            model.zero_grad(set_to_none=True)
        return Contender(name, self, calls=setup.calls)
