"""Numbers that must not depend on batches, and prompts at their limits."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dragkit.errors import DataError
from dragkit.selftest.numbers.small_joint import SmallJoint, invented_rows
from dragkit.selftest.outcome import Outcome, require

_LOSS_TOLERANCE, _GRADIENT_TOLERANCE, _LOGIT_TOLERANCE = 1e-6, 1e-5, 1e-5


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def _error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def accumulation(outcome: Outcome, root: Path) -> None:
    """Splits the 16 questions of a step into micro-batches. Loss and gradients stay the same.

    Args:
        outcome: counts the cases.
        root: folder of the questions.
    """
    draw, rows = random.Random(1), invented_rows(root, 16)
    for row in rows:
        row["answer"] = [" ".join(["north"] * draw.randint(1, 59))]
    worst = 0.0
    for estimator in ("straight_through", "leave_one_out"):
        draws = 2 if estimator == "leave_one_out" else 1
        settings = {"sampler.estimator": estimator, "sampler.num_draws": draws}
        toy = SmallJoint(root, rows, **settings)
        loss, expected = toy.gradients([toy.batch(range(16))])
        for size in (8, 4, 1, 5):
            with outcome.case(f"{estimator}, micro-batches of {size}"):
                split = [range(first, min(first + size, 16)) for first in range(0, 16, size)]
                other, gradients = toy.gradients([toy.batch(part) for part in split])
                difference, error = abs(other / loss - 1), _error(_flat(gradients), _flat(expected))
                worst = max(worst, error)
                require(difference <= _LOSS_TOLERANCE, f"the loss differs by {difference:.1e}")
                require(error <= _GRADIENT_TOLERANCE, f"the gradient differs by {error:.1e}")
    outcome.notes.append(f"accumulation: worst relative error of a gradient {worst:.1e}")


def batch_invariance(outcome: Outcome, root: Path, *, batches: int) -> None:
    """Answers 64 questions alone and in random batches. Logits and answers stay the same.

    Args:
        outcome: counts the questions, once for each batch that they are in.
        root: folder of the questions.
        batches: number of random batches.
    """
    draw, toy = random.Random(2), SmallJoint(root, invented_rows(root, 64))
    relations, predict = toy.dataset.relations, toy.phase.predict
    alone = [toy.target_logits(toy.batch([row]))[0] for row in range(64)]
    answers = [predict(toy.batch([row]), relations)[0] for row in range(64)]
    worst = 0.0
    for number in range(batches):
        rows = draw.sample(range(64), draw.randint(2, 64))
        together, predicted = (
            toy.target_logits(toy.batch(rows)),
            predict(toy.batch(rows), relations),
        )
        for row, logits, answer in zip(rows, together, predicted, strict=True):
            with outcome.case(f"question {row} in batch {number}"):
                error = float((logits - alone[row]).abs().max() / alone[row].abs().max())
                worst = max(worst, error)
                require(error <= _LOGIT_TOLERANCE, f"a logit differs by {error:.1e}")
                require(answer.text == answers[row].text, "another answer")
                require(answer.ranked == answers[row].ranked, "another order of the facts")
    outcome.notes.append(f"{batches} random batches: worst relative error of a logit {worst:.1e}")


def _crowded(rows: Sequence[dict]) -> list[dict]:
    """Questions whose facts exceed the prompt, all in lines of about one length."""
    crowded = []
    for row in rows:
        triples = [[f"Or{n:03d}", "place.place.part_of", f"Mel{n:03d}"] for n in range(60)]
        crowded.append(row | {"triples": triples + row["triples"]})
    return crowded


def prompt_limits(outcome: Outcome, root: Path) -> None:
    """Fills prompts to the last token, and leaves out answers. No loss is 0 for want of answers.

    Args:
        outcome: counts the cases.
        root: folder of the questions.
    """
    limit = 200
    settings = {"generator.max_prompt_tokens": limit, "sampler.k_facts": 40}
    toy = SmallJoint(root, _crowded(invented_rows(root, 4)), **settings)
    batch = toy.batch(range(4))
    layout = toy.phase.step.draw_and_prompt(batch, toy.dataset.relations, 0).layout
    lengths, supervised = layout.copy_lengths().result()
    for row in range(4):
        with outcome.case(f"the full prompt of question {row}"):
            require(bool(layout.left_out[row].any()), "nothing was left out")
            require(lengths[row] <= limit, f"{lengths[row]} tokens in a prompt of {limit}")
            size = int(batch.target.ptr[row + 1] - batch.target.ptr[row])
            require(supervised[row] == size, "the answer is not whole")
            kept = (~layout.left_out[row]).nonzero().max()
            room = limit - lengths[row]
            fact = (layout.end[row, 1:-2] - layout.end[row, :-3])[: kept + 1].max()
            require(room < 2 * fact, f"{room} tokens are free, although facts were left out")
    with outcome.case("a question and answers beyond the prompt"):
        long = invented_rows(root, 2)
        long[1]["answer"] = "north " * limit
        try:
            SmallJoint(root, long, **settings)
        except DataError as error:
            require(long[1]["id"] in str(error), "the question is not named")
        else:
            require(False, "it was accepted")
    mute = invented_rows(root, 6)
    for row in mute[2:]:
        row["answer"] = []
    toy = SmallJoint(root, mute, **{"loss.ret_loss_weight": 0.0})
    with outcome.case("questions without answers beside others"):
        loss, expected = toy.gradients([toy.batch([0, 1])])
        mixed, gradients = toy.gradients([toy.batch([0]), toy.batch([2, 3]), toy.batch([1, 4])])
        # Another packing sums in another order.
        require(abs(mixed / loss - 1) <= _GRADIENT_TOLERANCE, "they change the loss of the answers")
        error = _error(_flat(gradients), _flat(expected))
        require(error <= _GRADIENT_TOLERANCE, f"they change its gradient by {error:.1e}")
    with outcome.case("a step without an answer"):
        (output,) = toy.trainer.train_step([toy.batch([2, 3])])
        require("generator" not in output.parts, "an answer loss of 0 is reported")
