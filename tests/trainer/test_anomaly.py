"""A step whose numbers are not finite is not made, and a step without a loss reports none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dragkit.data.packed import QuestionBatch
from dragkit.trainer.anomaly import NumericalError
from dragkit.trainer.phase1 import RetrieverPhase
from tests.trainer.run_cases import FIXTURE, logged, make_run


def in_score(phase: RetrieverPhase, value: float) -> None:
    original = phase.retrieve

    def planted(batch: QuestionBatch, *args: object, **options: object) -> object:
        output = original(batch, *args, **options)
        negative = int((batch.graph.label == 0).nonzero()[0])
        mask = torch.arange(len(output.fact_logits)) == negative
        return output._replace(fact_logits=output.fact_logits.masked_fill(mask, value))

    phase.retrieve = planted


def in_weight(phase: RetrieverPhase, value: float) -> None:
    phase.model.start.weight.data[0, 0] = value


def in_gradient(phase: RetrieverPhase, value: float) -> None:
    phase.model.start.weight.register_hook(lambda grad: grad.clone().fill_(value))


@pytest.mark.parametrize(
    ("plant", "value", "cause"),
    [
        # Its gradient is 0, so only the loss tells.
        (in_score, math.inf, "weights are finite, but the retriever's fact scores"),
        (in_score, math.nan, "weights are finite, but the retriever's fact scores"),
        (in_weight, math.nan, "1 weights are not finite, first start.weight"),
        (in_gradient, math.inf, "losses are finite, but the gradients of 1 param.*start.weight"),
    ],
)
def test_the_first_component_that_is_not_finite_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[RetrieverPhase, float], None],
    value: float,
    cause: str,
) -> None:
    original, phases = RetrieverPhase.training_step, []

    def planted(self: RetrieverPhase, *args: object) -> object:
        if not phases:
            plant(self, value)
            weights = {n: p.detach().clone() for n, p in self.model.named_parameters()}
            phases.append((self.model, weights))
        return original(self, *args)

    monkeypatch.setattr(RetrieverPhase, "training_step", planted)
    with pytest.raises(NumericalError, match=cause):
        make_run(tmp_path, 1).execute()
    ((model, before),) = phases
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)
    record = json.loads((tmp_path / "run" / "anomaly-00000000.json").read_text())
    assert record["questions"] and record["parts"]
    assert bool(record["weights_not_finite"]) == (plant is in_weight)


def test_a_step_without_labels_or_answers_reports_no_loss_for_them(tmp_path: Path) -> None:
    """A 0 would look like a perfect score, and lower the mean."""
    rows = [json.loads(line) for line in FIXTURE.read_text().splitlines()]
    whole = next(row for row in rows if row.get("answer") and row.get("paths"))
    mute = whole | {"answer": [], "answers": [], "id": "mute"}
    blank = mute | {"paths": [], "topic_entities": [], "id": "blank"}
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in (whole, mute, blank)))
    settings = {"data.heuristics_path": str(data), "optim.batch_size": 1, "optim.epochs": 1}
    settings["run.test_before_training"] = False
    make_run(tmp_path, 2, "run", **settings).execute()
    names = {"retrieval", "generator", "token_accuracy", "loss"}
    lines = [line["train"] for line in logged(tmp_path / "run") if "train" in line]
    assert sorted(len(names.intersection(line)) for line in lines) == [0, 2, 4]
    assert all(line.get("loss") != 0.0 for line in lines)
    first = tmp_path / "run" / "phase1"
    losses = [line["train"].get("loss") for line in logged(first) if "train" in line]
    assert losses.count(None) == 1 and 0.0 not in losses
