"""Makes the shipped generator from nothing: python -m dragkit.tiny.warmup --out DIR --seed 0."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import logging
import platform
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from torch import nn

from dragkit.data.relations import relation_text
from dragkit.demo.kb import package_text, table_facts
from dragkit.errors import DragkitError, WriteError
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
MAX_NORM = 1.0
RAMP_STEPS = 50
DECAY_SHARE = 0.4
LAST_RATE_SHARE = 0.02
SLOT_NOISE = 0.5
LOG_EVERY = 100


def demo_texts() -> tuple[list[str], list[str]]:
    """Entity names of the demo, and the texts of its relations and questions; no facts."""
    facts = [fact for text in package_text("tables").values() for fact in table_facts(text)]
    names = sorted({name for head, _, tail in facts for name in (head, tail)})
    relations = sorted({relation_text(relation) for _, relation, _ in facts})
    lines = package_text("templates.tsv")["templates.tsv"].splitlines()[1:]
    questions = [line.split("\t")[-1] for line in lines]
    return names, relations + questions


def rate_at(step: int, steps: int) -> float:
    """Share of the learning rate at a step from 1: a short ramp, flat, then linear to nearly 0."""
    left = (1 - step / steps) / DECAY_SHARE
    return min(1.0, step / RAMP_STEPS) * min(1.0, max(LAST_RATE_SHARE, left))


def train(model: nn.Module, curriculum: Curriculum, steps: int) -> int:
    """Trains in place for `steps` optimizer steps; returns the tokens seen."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: rate_at(done + 1, steps))
    model.train()
    tokens, begin = 0, time.perf_counter()
    for step in range(1, steps + 1):
        batch = collate(curriculum.draw())
        noise = 0.0 if curriculum.stage == "copy" else SLOT_NOISE
        logits, target = answer_logits(model, batch, noise)
        loss = F.cross_entropy(logits, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        schedule.step()
        curriculum.observe(float((logits.argmax(-1) == target).float().mean()))
        tokens += batch.input_ids.numel()
        if step % LOG_EVERY == 0:
            logger.info(
                "step %d of %d, %s with up to %d facts, loss %.2f, accuracy %s, %.0f s",
                step,
                steps,
                curriculum.stage,
                curriculum.num_facts,
                loss.item(),
                {name: round(value, 3) for name, value in curriculum.accuracy.items()},
                time.perf_counter() - begin,
            )
    return tokens


def tensors_digest(model: nn.Module) -> str:
    """SHA-256 over names and bytes of all tensors, to compare two runs."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def warm_up(folder: Path, seed: int, steps: int, num_questions: int) -> dict:
    """Trains tokenizer and model from a seed, measures, and writes the model's folder.

    Args:
        folder: where to write; made when missing.
        seed: of everything random.
        steps: optimizer steps; the learning rate follows their share.
        num_questions: questions per cell of the exact-match table; 0 measures nothing.

    Returns:
        The provenance record, as written to provenance.json.

    Raises:
        WriteError: if the folder cannot be written.
    """
    torch.set_num_threads(1)
    names, texts = demo_texts()
    tokenizer = train_tokenizer(seed, names + texts)
    writer = PromptWriter(tokenizer)
    kinds = {"pieces": tuple(whole_pieces(tokenizer)), "listed": tuple(names)}
    source = NameSource(random.Random(seed), **kinds)
    vocabulary = tokenizer.get_vocab_size()
    curriculum = Curriculum(writer, source, range(len(SPECIAL), vocabulary))
    model = new_model(vocabulary, seed)
    begin, cpu = time.perf_counter(), time.process_time()
    tokens = train(model, curriculum, steps)
    record = {
        "command": f"python -m dragkit.tiny.warmup --out DIR --seed {seed} --steps {steps}",
        "seed": seed,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_tokens": tokens,
        "training_s": round(time.perf_counter() - begin, 1),
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
    # Training needs no cache; generation does.
    model.config.use_cache = True
    if num_questions:
        # What is measured is what is shipped: the weights after rounding to half precision.
        table = exact_match_table(model.float(), writer, kinds, num_questions=num_questions)
        record["exact_match"] = {"questions_per_cell": num_questions, "table": table}
        model.half()
    save(folder, model, tokenizer, record)
    return record


def save(folder: Path, model: nn.Module, tokenizer: Tokenizer, record: dict) -> None:
    """Writes the model's folder, and adds the hash of the written weights to the record.

    Raises:
        WriteError: if the folder cannot be made or written.
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
        message = f"{folder}: cannot write the model here ({error}); choose another --out"
        raise WriteError(message) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Command line of the warm-up."""
    parser = argparse.ArgumentParser(prog="python -m dragkit.tiny.warmup", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"optimizer steps ({STEPS})")
    parser.add_argument(
        "--questions",
        type=int,
        default=128,
        help="questions per cell of the table, 0 for none",
    )
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.disable_progress_bar()
    try:
        record = warm_up(args.out, args.seed, args.steps, args.questions)
    except DragkitError as error:
        logger.error("%s", error)
        return error.exit_code
    logger.info("%s", json.dumps(record, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
