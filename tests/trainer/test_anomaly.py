"""A step whose numbers are not finite is not made, and a step without a loss reports none."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dragkit.checkpoint.checkpoint import flatten_optimizer_state
from dragkit.data.packed import QuestionBatch
from dragkit.distributed.ranks import Ranks
from dragkit.generator.to_host import AsyncToHost
from dragkit.trainer import loop
from dragkit.trainer.anomaly import FiniteCheck, NumericalError
from dragkit.trainer.phase import StepOutput
from dragkit.trainer.phase1 import RetrieverPhase
from tests.trainer.run_cases import FIXTURE, assert_same, logged, make_run


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


class LateCheck(FiniteCheck):
    """The check as on a GPU: the optimizer skips the update, and the host learns of it later."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings | {"late": True})


def ended_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, check: type, bad_step: int, **settings: object
) -> tuple[str, dict[str, torch.Tensor], int]:
    """The error, the weights and moments, and the micro-batches begun of a run with a bad step."""
    trainers, begun, original = [], [], loop.Trainer.train_step

    def planted(self: loop.Trainer, batches: list) -> object:
        trainers.append(self)
        if self.state.step == bad_step:
            self.phase.model.start.weight.register_hook(lambda grad: grad * math.nan)
        begun.append(self.state.step)
        return original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Trainer, "train_step", planted)
        patch.setattr(loop, "FiniteCheck", check)
        with pytest.raises(NumericalError) as error:
            make_run(folder, 1, **settings).execute()
    trainer = trainers[-1]
    state = flatten_optimizer_state(trainer.optimizer, trainer.parameter_names)
    weights = {name: p.detach() for name, p in trainer.phase.model.named_parameters()}
    assert error.value.exit_code == 70
    return str(error.value), state | weights, len(begun) - 1 - bad_step


# 3 steps in an epoch, 2 epochs.
@pytest.mark.parametrize(
    ("bad_step", "settings", "steps_later"),
    [
        (0, {"run.log_every_steps": 4}, 1),
        (1, {"run.log_every_steps": 4}, 1),
        # Its numbers are due for the log.
        (3, {"run.log_every_steps": 4}, 0),
        # A checkpoint is due.
        (2, {"run.log_every_steps": 4}, 0),
        (0, {"run.log_every_steps": 4, "run.save_every_steps": 1}, 0),
        # The last step of all, after lines of the log.
        (5, {}, 0),
    ],
)
def test_a_check_one_step_late_ends_the_run_as_one_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad_step: int,
    settings: dict[str, object],
    steps_later: int,
) -> None:
    now, late = tmp_path / "now", tmp_path / "late"
    error, state, _ = ended_run(now, monkeypatch, FiniteCheck, bad_step, **settings)
    late_error, late_state, later = ended_run(late, monkeypatch, LateCheck, bad_step, **settings)
    assert late_error == error.replace(str(now), str(late)) and f"step {bad_step}:" in error
    assert later == steps_later
    # An optimizer that has not updated yet has no moments and says so, or has zeros.
    state = {name: value for name, value in state.items() if not name.endswith("/fresh")}
    assert late_state.keys() >= state.keys()
    for name, value in late_state.items():
        assert torch.equal(value, state.get(name, torch.zeros_like(value))), name
    record = f"run/anomaly-{bad_step:08d}.json"
    assert (late / record).read_text() == (now / record).read_text()
    assert len(list((late / "run").glob("anomaly-*"))) == 1
    is_logged = [(x / "run" / "metrics.jsonl").exists() for x in (now, late)]
    assert is_logged == [bad_step > 4] * 2
    kept = [sorted(path.name for path in (x / "run").glob("step-*")) for x in (now, late)]
    assert kept[0] == kept[1] and bool(kept[0]) == (bad_step > 2)


class BesideBadRank(Ranks):
    """Rank 0 of two ranks. The loss of the other rank is infinite."""

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        tensor += math.inf

    def all_gather_object(self, value: list) -> list:
        return [value, [["theirs"], [{"retrieval": "inf"}], []]]


@pytest.mark.parametrize("late", [False, True])
def test_every_rank_stops_for_the_loss_of_one(tmp_path: Path, late: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    optimizer = torch.optim.AdamW([weight], fused=True)
    names = SimpleNamespace(question_id=lambda row: f"question {row}")
    model = torch.nn.ParameterDict({"weight": weight})
    cpu = torch.device("cpu")
    check = FiniteCheck(
        tmp_path, model, {"weight": weight}, optimizer, names, BesideBadRank(), cpu, late=late
    )
    loss = torch.tensor(1.5)
    output = StepOutput(loss, {"retrieval": loss}, 1, 1, 0)
    with pytest.raises(NumericalError, match="retriever's fact scores"):
        check.check(7, [4], [output])
        optimizer.step()
        check.settle()
    assert weight.tolist() == [1, 1] and weight.grad is None
    record = json.loads((tmp_path / "anomaly-00000007.json").read_text())
    assert record["questions"] == ["question 4", "theirs"]


def test_a_late_check_changes_nothing_in_a_good_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path, 1, "now").execute()
    monkeypatch.setattr(loop, "FiniteCheck", LateCheck)
    make_run(tmp_path, 1, "late").execute()
    assert_same(tmp_path / "now", tmp_path / "late")


def test_a_late_check_waits_for_no_step_that_is_not_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's numbers are read after the next step's backward has been queued."""
    events: list[str] = []
    result, backward = AsyncToHost.result, RetrieverPhase.training_step

    def read(copy: AsyncToHost) -> list:
        events.append("read")
        return result(copy)

    def step(self: RetrieverPhase, *args: object) -> object:
        output = backward(self, *args)
        events.append("backward")
        return output

    monkeypatch.setattr(loop, "FiniteCheck", LateCheck)
    monkeypatch.setattr(AsyncToHost, "result", read)
    monkeypatch.setattr(RetrieverPhase, "training_step", step)
    make_run(tmp_path, 1, **{"run.log_every_steps": 100, "optim.epochs": 1}).execute()
    assert events == ["backward", "backward", "read", "backward", "read", "read"]


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
