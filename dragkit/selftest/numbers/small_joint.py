"""A phase 2 on the bundled generator, in this process, for checks of its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dragkit.config import resolve_config
from dragkit.data.packed import QuestionBatch
from dragkit.generator.bundled import tiny_generator_path
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.selftest.toy import write_questions
from dragkit.trainer.build import build_joint
from dragkit.trainer.loop import Trainer
from dragkit.trainer.question_dataset import QuestionDataset

_SETTINGS: dict[str, object] = {
    "run.phase": 2,
    "run.device": "cpu",
    "retriever.hidden_dim": 8,
    "retriever.dropout": 0.0,
    "generator.max_prompt_tokens": 400,
    "generator.max_new_tokens": 8,
}


def rows_of(path: Path) -> list[dict]:
    """The JSON objects of a file of questions."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def invented_rows(root: Path, count: int) -> list[dict]:
    """`count` questions with their graphs, as JSON objects."""
    return rows_of(write_questions(root / "invented.jsonl", count))


def write_rows(path: Path, rows: Sequence[dict]) -> Path:
    """Writes questions as JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def expert_generator(folder: Path) -> Path:
    """Writes a model with experts and random weights, which reads the bundled tokens."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    bundled = tiny_generator_path()
    config = NemotronHConfig.from_pretrained(bundled)
    settings = config.to_dict() | {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "dtype": "float32",
    }
    torch.manual_seed(0)
    NemotronHForCausalLM(NemotronHConfig(**settings)).save_pretrained(folder)
    for file in bundled.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


class SmallJoint:
    """A trainer of phase 2 with random weights around the bundled generator.

    Args:
        root: folder of the run, the questions and the cache.
        rows: the training questions.
        settings: dotted settings.

    Attributes:
        trainer: steps of it take batches of `batch`.
        phase: its phase.
    """

    def __init__(self, root: Path, rows: Sequence[dict], **settings: object) -> None:
        path = write_rows(root / "questions.jsonl", rows)
        values = _SETTINGS | {"data.cache_dir": str(root / "cache")} | settings
        config, _ = resolve_config("tiny", None, values)
        cpu, encoder = torch.device("cpu"), TextEncoder(find_encoder(), root / "cache")
        self.phase = build_joint(config, encoder, cpu)
        self.dataset = QuestionDataset(
            path, config, encoder, self.phase.model.generator, len(rows), training=True
        )
        self.trainer = Trainer(config, self.phase, self.dataset, None, root, cpu)

    def batch(self, rows: Sequence[int]) -> QuestionBatch:
        """The questions `rows` as one micro-batch."""
        return self.dataset.collator(rows)

    def gradients(self, batches: Sequence[QuestionBatch]) -> tuple[float, list[Tensor]]:
        """Loss and gradients of the first optimizer step over micro-batches, without an update."""
        counts = self.phase.counts(batches)
        denominators = {name: float(max(count, 1)) for name, count in counts.items()}
        self.phase.model.train()
        self.trainer.optimizer.zero_grad(set_to_none=True)
        relations = self.dataset.relations
        outputs = [self.phase.training_step(b, relations, denominators, 0) for b in batches]
        grads = [
            torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in self.trainer.parameters
        ]
        return float(sum(out.loss for out in outputs)), grads

    def target_logits(self, batch: QuestionBatch) -> list[Tensor]:
        """Logits at the answers of each question, float32 [A, V], after its best facts."""
        model, relations = self.phase.model.eval(), self.dataset.relations
        with torch.no_grad():
            output = self.phase.retrieve(batch, relations)
            selection = model.fact_sampler.best(output.fact_logits, batch.graph)
            prompt = model.prompt(batch, selection.index, with_target=True)
            vectors = model.structural_vectors(output, batch, selection).flatten(0, 1)
            logits = torch.cat(list(model.generator.target_logits(prompt, vectors)))
        sizes = torch.bincount(prompt.question[prompt.target_row], minlength=len(batch.rows))
        return list(logits.split(sizes.tolist()))
