"""What an optimizer step changes: nothing frozen, and nothing at all on a number not finite."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from dragkit.data.packed import QuestionBatch
from dragkit.errors import ConfigError
from dragkit.generator.lora.coverage import adapted_layers
from dragkit.retriever.retriever import RetrieverOutput
from dragkit.selftest.numbers.small_joint import SmallJoint, expert_generator, invented_rows
from dragkit.selftest.outcome import Outcome, require
from dragkit.trainer.anomaly import NumericalError
from dragkit.trainer.phase import StepOutput

_QUESTIONS = 8


class _Fault(NamedTuple):
    """A number that is not finite.

    Attributes:
        name: of the component that it is put into.
        plant: puts a value into the next step of a toy, until the context is left.
        words: what the error must say.
    """

    name: str
    plant: Callable[[SmallJoint, float], AbstractContextManager[object]]
    words: str


def _in_logits(toy: SmallJoint, value: float) -> AbstractContextManager[object]:
    generator = toy.phase.model.generator
    original = generator.target_logits

    def planted(*args: object) -> Iterator[Tensor]:
        for number, rows in enumerate(original(*args)):
            mask = torch.zeros_like(rows, dtype=torch.bool)
            mask[0, 3] = number == 0
            yield rows.masked_fill(mask, value)

    return mock.patch.object(generator, "target_logits", planted)


def _in_loss(toy: SmallJoint, value: float) -> AbstractContextManager[object]:
    generator = toy.phase.model.generator
    original = generator.forward

    def planted(*args: object) -> object:
        out = original(*args)
        return out._replace(
            loss_sum=out.loss_sum * value, prompt_loss=torch.full_like(out.prompt_loss, value)
        )

    return mock.patch.object(generator, "forward", planted)


def _in_gradient(toy: SmallJoint, value: float) -> AbstractContextManager[object]:
    original = toy.phase.training_step

    def planted(*args: object) -> StepOutput:
        out = original(*args)
        grad = next(toy.phase.model.projector.parameters()).grad
        grad.view(-1)[0] = value
        return out

    return mock.patch.object(toy.phase, "training_step", planted)


def _in_fact_score(toy: SmallJoint, value: float) -> AbstractContextManager[object]:
    original, step = toy.phase.step.retrieve, toy.phase.step

    def planted(batch: QuestionBatch, *args: object) -> RetrieverOutput:
        output = original(batch, *args)
        # An infinite score of a positive fact is a certain one.
        wrong = int((batch.graph.label == 0).nonzero()[0])
        mask = torch.arange(len(output.fact_logits)) == wrong
        return output._replace(fact_logits=output.fact_logits.masked_fill(mask, value))

    return mock.patch.object(step, "retrieve", planted)


def _expert(toy: SmallJoint) -> tuple[str, nn.Parameter]:
    named = toy.phase.model.generator.model.named_parameters()
    return next((n, p) for n, p in named if "experts" in n and not p.requires_grad)


@contextmanager
def _in_expert(toy: SmallJoint, value: float) -> Iterator[None]:
    weight = _expert(toy)[1].data
    before = weight.clone()
    # One number of every expert, since not all of them get a token.
    weight.flatten(-2)[..., 0] = value
    try:
        yield
    finally:
        weight.copy_(before)


_FAULTS = (
    _Fault("logits", _in_logits, "the generator's logits at the answers, or their loss"),
    _Fault("the loss", _in_loss, "the generator's logits at the answers, or their loss"),
    _Fault("one gradient", _in_gradient, "the losses are finite, but the gradients of 1 param"),
    _Fault("a fact score", _in_fact_score, "the retriever's fact scores, or their loss"),
)
_EXPERT_FAULT = _Fault("an expert", _in_expert, "weights are not finite, first generator.")


def anomalies(outcome: Outcome, root: Path, *, steps: int) -> None:
    """Puts NaN and infinities into steps. No weight changes, and the error says where they are.

    Args:
        outcome: counts the faults.
        root: folder of the questions, the models and the records.
        steps: number of steps of each fault, one after the other.
    """
    rows = invented_rows(root, _QUESTIONS)
    toys = [(SmallJoint(root, rows), _FAULTS)]
    model = str(expert_generator(root / "experts"))
    toys.append((SmallJoint(root, rows, **{"generator.model": model}), (_EXPERT_FAULT,)))
    for toy, faults in toys:
        for fault in faults:
            for value in (math.nan, math.inf):
                for _ in range(steps):
                    with outcome.case(f"{value} in {fault.name}, step {toy.trainer.state.step}"):
                        _require_no_update(toy, fault, value)
                        toy.trainer.train_step([toy.batch(range(_QUESTIONS))])


def _require_no_update(toy: SmallJoint, fault: _Fault, value: float) -> None:
    trainer = toy.trainer
    before = [parameter.detach().clone() for parameter in trainer.parameters]
    record = trainer.run_dir / f"anomaly-{trainer.state.step:08d}.json"
    record.unlink(missing_ok=True)
    with fault.plant(toy, value):
        try:
            trainer.train_step([toy.batch(range(_QUESTIONS))])
        except NumericalError as error:
            require(fault.words.lower() in str(error).lower(), f"the error says: {error}")
        else:
            require(False, "the step was made")
    for old, parameter in zip(before, trainer.parameters, strict=True):
        require(torch.equal(old, parameter), "a weight has changed")
    require(record.is_file(), "there is no record")
    require(len(json.loads(record.read_text())["questions"]) == _QUESTIONS, "questions are missing")


def adapters_learn(outcome: Outcome, root: Path) -> None:
    """Trains two steps. Every adapter's B has a gradient in the first, every A in the second.

    Args:
        outcome: counts the adapters, once for each factor.
        root: folder of the questions and the models.
    """
    rows, models = invented_rows(root, _QUESTIONS), {"bundled": "tiny"}
    models["with experts"] = str(expert_generator(root / "experts"))
    for name, model in models.items():
        toy = SmallJoint(root, rows, **{"generator.model": model})
        norms: list[dict[str, float]] = []

        def record(_: object, toy: SmallJoint = toy, norms: list = norms) -> None:
            layers = adapted_layers(toy.phase.model.generator.model)
            norms.append(
                {
                    f"{layer} {factor}": float(factors[key].weight.grad.norm())
                    for layer, module in layers
                    for factor, factors in (("A", module.lora_A), ("B", module.lora_B))
                    for key in factors
                }
            )

        with mock.patch.object(toy.phase, "check_gradients", record):
            for _ in range(2):
                toy.trainer.train_step([toy.batch(range(_QUESTIONS))])
        for factor, step in (("B", 0), ("A", 1)):
            for layer, norm in norms[step].items():
                if layer.endswith(factor):
                    with outcome.case(f"{name}, {layer}, step {step + 1}"):
                        require(norm > 0, "no gradient")
    with outcome.case("a target that matches no module"):
        try:
            SmallJoint(root, rows, **{"generator.lora_targets": ["q_proj", "qq_proj"]})
        except ConfigError as error:
            require("qq_proj" in str(error), f"the error says: {error}")
        else:
            require(False, "it was accepted")


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def frozen_weights(outcome: Outcome, root: Path, *, steps: int) -> None:
    """Trains, and compares a hash of all frozen weights. Those that are trained all change.

    Args:
        outcome: counts one case for the frozen and one for the trained weights.
        root: folder of the questions.
        steps: number of steps.
    """
    toy = SmallJoint(root, invented_rows(root, _QUESTIONS))
    model = toy.phase.model
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: x for n, x in model.state_dict().items() if n not in trained}
    before = _digest(frozen)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if n in trained}
    for _ in range(steps):
        toy.trainer.train_step([toy.batch(range(_QUESTIONS))])
    with outcome.case("frozen weights"):
        require(frozen and _digest(frozen) == before, "they have changed")
    with outcome.case("trained weights"):
        same = [n for n, p in model.named_parameters() if n in trained and torch.equal(p, start[n])]
        require(not same, f"{len(same)} have not changed, first {same[:3]}")
    outcome.notes.append(f"{len(frozen)} frozen and {len(start)} trained tensors, {steps} steps")
