"""Trains the bundled generator from a seed: python -m dragkit.tiny.warmup --out DIR --seed 0."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import platform
import random
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import nn

from dragkit.console import run_main, setup_console
from dragkit.data.relations import relation_text
from dragkit.demo.kb import package_text, table_facts
from dragkit.errors import WriteError
from dragkit.tiny.architecture import new_model
from dragkit.tiny.batches import PromptWriter, collate
from dragkit.tiny.curriculum import Curriculum
from dragkit.tiny.measure import answer_logits, exact_match_table
from dragkit.tiny.names import NameSource
from dragkit.tiny.tokenizer import SPECIAL, save_tokenizer, train_tokenizer, whole_pieces

logger = logging.getLogger(__name__)

STEPS = 3600
LEARNING_RATE = 1.5e-3
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
MAX_GRAD_NORM = 1.0
WARMUP_STEPS = 50
DECAY_FRACTION = 0.4
MIN_LR_RATIO = 0.02
MAX_SLOT_NOISE = 0.5
LOG_EVERY_STEPS = 100


def demo_texts() -> tuple[list[str], list[str]]:
    """Entity names of the demo, and the texts of its relations and questions."""
    facts = [fact for text in package_text("tables").values() for fact in table_facts(text)]
    names = sorted({name for head, _, tail in facts for name in (head, tail)})
    relations = sorted({relation_text(relation) for _, relation, _ in facts})
    lines = package_text("templates.tsv")["templates.tsv"].splitlines()[1:]
    questions = [line.split("\t")[-1] for line in lines]
    return names, relations + questions


def lr_multiplier(step: int, steps: int) -> float:
    """Factor on the learning rate at a step from 1: warm-up, constant, then linear decay."""
    decay = (1 - step / steps) / DECAY_FRACTION
    return min(1.0, step / WARMUP_STEPS) * min(1.0, max(MIN_LR_RATIO, decay))


def train(model: nn.Module, curriculum: Curriculum, steps: int) -> int:
    """Trains in place for `steps` optimizer steps and returns the number of training tokens."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: lr_multiplier(done + 1, steps)
    )
    model.train()
    tokens, start = 0, time.perf_counter()
    for step in range(1, steps + 1):
        batch = collate(curriculum.draw())
        # Rows of the copy stage have no slots.
        noise = 0.0 if curriculum.stage == "copy" else MAX_SLOT_NOISE
        logits, target = answer_logits(model, batch, noise)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        curriculum.observe(float((logits.argmax(-1) == target).float().mean()))
        tokens += batch.input_ids.numel()
        if step % LOG_EVERY_STEPS == 0:
            logger.info(
                "step %d of %d, %s with up to %d facts, loss %.2f, accuracy %s, %.0f s",
                step,
                steps,
                curriculum.stage,
                curriculum.num_facts,
                loss.item(),
                {name: round(value, 3) for name, value in curriculum.accuracy.items()},
                time.perf_counter() - start,
            )
    return tokens


def tensors_digest(model: nn.Module) -> str:
    """SHA-256 of the names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def warm_up(folder: Path, seed: int, steps: int, num_questions: int) -> dict:
    """Trains tokenizer and model, measures exact match, and writes the model's folder.

    Args:
        folder: folder to write. It is created if it does not exist.
        seed: seed of weights and training data.
        steps: number of optimizer steps.
        num_questions: questions per cell of the exact-match table. 0 skips the table.

    Returns:
        The record in provenance.json.

    Raises:
        WriteError: the folder cannot be written.
    """
    # With one thread sums have one order, so a seed gives the same bits again.
    torch.set_num_threads(1)
    names, texts = demo_texts()
    tokenizer = train_tokenizer(seed, names + texts)
    writer = PromptWriter(tokenizer)
    name_lists = {"pieces": tuple(whole_pieces(tokenizer)), "listed": tuple(names)}
    name_source = NameSource(random.Random(seed), **name_lists)
    vocabulary = tokenizer.get_vocab_size()
    curriculum = Curriculum(writer, name_source, range(len(SPECIAL), vocabulary))
    model = new_model(vocabulary, seed)
    start, cpu = time.perf_counter(), time.process_time()
    tokens = train(model, curriculum, steps)
    record = {
        "command": f"python -m dragkit.tiny.warmup --out DIR --seed {seed} --steps {steps}",
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": tokens,
        "training_s": round(time.perf_counter() - start, 1),
        "training_cpu_s": round(time.process_time() - cpu, 1),
        "threads": 1,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "machine": platform.machine(),
        "demo_texts_sha256": hashlib.sha256("\n".join(names + texts).encode()).hexdigest(),
        "float32_sha256": tensors_digest(model),
    }
    model.half()
    # The cache is off in training, but generation needs it.
    model.config.use_cache = True
    if num_questions:
        # Measure the written weights, which are rounded to half precision.
        table = exact_match_table(model.float(), writer, name_lists, num_questions=num_questions)
        record["exact_match"] = {"questions_per_cell": num_questions, "table": table}
        model.half()
    save(folder, model, tokenizer, record)
    return record


def save(folder: Path, model: nn.Module, tokenizer: Tokenizer, record: dict) -> None:
    """Writes the model's folder and adds the SHA-256 of the weights to the record.

    Raises:
        WriteError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        save_tokenizer(tokenizer, folder)
        weights = (folder / "model.safetensors").read_bytes()
        record["model_sha256"] = hashlib.sha256(weights).hexdigest()
        text = json.dumps(record, indent=2) + "\n"
        (folder / "provenance.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise WriteError(f"{folder}: cannot write the model: {error}. Change --out.") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run_main(_warm_up_command, argv)


def _warm_up_command(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m dragkit.tiny.warmup", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder of the model")
    add("--seed", type=int, default=0, help="seed of weights and training data (default 0)")
    add("--steps", type=int, default=STEPS, help=f"optimizer steps (default {STEPS})")
    add("--questions", type=int, default=128, help="questions per cell of the table (0 skips it)")
    args = parser.parse_args(argv)
    setup_console(debug=False)
    transformers.utils.logging.disable_progress_bar()
    record = warm_up(args.out, args.seed, args.steps, args.questions)
    logger.info("%s", json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
