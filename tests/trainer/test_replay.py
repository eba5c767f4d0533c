"""Replayed steps against plain ones. Without a GPU, what would be recorded is run again instead."""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from dragkit.config import load_config
from dragkit.data.capacity import Buckets, pad_batch
from dragkit.data.packed import QuestionBatch
from dragkit.errors import Interrupted
from dragkit.trainer import build as build_module
from dragkit.trainer import replay as replay_module
from dragkit.trainer.build import build_retriever
from dragkit.trainer.checkpoint import find_checkpoint, load_checkpoint
from dragkit.trainer.compile import compile_retriever
from dragkit.trainer.loop import Trainer
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.prefetch import join, split
from dragkit.trainer.replay import CudaCapture, StepReplay, capture_for
from dragkit.trainer.run import Run
from dragkit.trainer.source import QuestionSource

FIXTURE = Path(__file__).parents[1] / "fixtures" / "heuristics_tiny.jsonl"
CPU = torch.device("cpu")
# Question 2 has an empty graph.
MICRO_BATCHES = [[0, 1, 2], [3, 4], [2], [5, 6, 7], [1, 5, 0], [2, 2, 2]]


class Rerun:
    """The interface of `CudaCapture`: recorded work is the work itself, on the same tensors."""

    def __init__(self) -> None:
        self.recorded = self.replays = 0

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        self.recorded += 1
        for _ in range(replay_module.WARM_UPS):
            work()

        def again() -> None:
            self.replays += 1
            work()

        return again


def command(tmp_path: Path, name: str = "run", **overrides: object) -> Run:
    values = {
        "run.phase": 1,
        "run.device": "cpu",
        "run.num_threads": 1,
        "run.checkpoint_dir": str(tmp_path / name),
        "run.log_every_steps": 1,
        "data.heuristics_path": str(FIXTURE),
        "retriever.hidden_dim": 16,
        "retriever.dropout": 0.0,
        "optim.batch_size": 3,
        "optim.epochs": 2,
        "optim.lr": 1e-3,
    } | {key.replace("__", "."): value for key, value in overrides.items()}
    config, origins = load_config("tiny", None, values)
    return Run(config, origins, config)


def new_phase(made: Run, **changes: object) -> RetrieverPhase:
    """A fresh phase; `changes` are of the retriever."""
    retriever = made.config.retriever.model_copy(update=changes)
    config = made.config.model_copy(update={"retriever": retriever})
    return RetrieverPhase(config, build_retriever(config, made.encoder))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The parts of a run; a fixture for a module comes before the one that moves the cache."""
    cache = str(tmp_path_factory.getbasetemp() / "cache")
    return command(tmp_path_factory.mktemp("replay"), data__cache_dir=cache)


@pytest.fixture(scope="module")
def source(made: Run) -> QuestionSource:
    return made.source(made.paths.train, None, 3)


@pytest.fixture(scope="module")
def batches(source: QuestionSource) -> list[QuestionBatch]:
    return [source.collator(rows) for rows in MICRO_BATCHES]


def with_replay(
    phase: RetrieverPhase, source: QuestionSource, capture: Callable, max_graphs: int = 16
) -> StepReplay:
    samples = [source.collator(rows) for rows in source.sampler.batches(0)]
    phase.replay = StepReplay(
        phase.loss,
        list(phase.model.parameters()),
        Buckets(samples),
        capture,
        max_graphs=max_graphs,
    )
    return phase.replay


def gradients(phase: RetrieverPhase) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in phase.model.named_parameters()
    }


def assert_close(ours: dict[str, Tensor | None], wanted: dict[str, Tensor | None]) -> None:
    """Equal but for the rounding of products with more rows."""
    for name, theirs in wanted.items():
        assert (ours[name] is None) == (theirs is None), name
        if theirs is not None:
            scale = theirs.abs().max().clamp(min=1e-2)
            assert (ours[name] - theirs).abs().max() <= 5e-6 * scale, name


def test_a_replayed_step_adds_the_gradients_of_a_plain_one(made, source, batches):
    phase = new_phase(made)
    counts = {"questions": 7.0}
    phase.model.train()

    def steps() -> list[tuple[list, dict]]:
        done = []
        for window in (batches[:1], batches[1:4], batches[4:], batches[:3]):
            outputs = [phase.training_step(b, source.relations, counts, 0) for b in window]
            done.append((outputs, gradients(phase)))
            phase.model.zero_grad(set_to_none=True)
        return done

    plain = steps()
    capture = Rerun()
    with_replay(phase, source, capture)
    ours = steps()
    for (outputs, found), (theirs, wanted) in zip(ours, plain, strict=True):
        assert_close(found, wanted)
        for out, other in zip(outputs, theirs, strict=True):
            torch.testing.assert_close(out.loss, other.loss, rtol=2e-6, atol=1e-6)
            assert not out.loss.requires_grad
            work = (out.num_questions, out.num_facts, out.num_tokens)
            assert work == (other.num_questions, other.num_facts, other.num_tokens)
    # As many replays as micro-batches; fewer sizes than batches.
    assert capture.replays == 9 and 1 <= capture.recorded < len(MICRO_BATCHES)


def test_gradient_tensors_stay_and_take_over_what_others_left(made, source):
    phase = new_phase(made)
    batch = source.collator([0, 1, 2])
    counts = {"questions": 3.0}
    phase.training_step(batch, source.relations, counts, 0)
    once = gradients(phase)
    step = with_replay(phase, source, Rerun())
    # On top of a gradient that a plain step left, as when a micro-batch ran without a graph.
    phase.training_step(batch, source.relations, counts, 0)
    assert_close(gradients(phase), {n: None if g is None else 2 * g for n, g in once.items()})
    own = {name: p.grad for name, p in phase.model.named_parameters()}
    for _ in range(2):
        phase.model.zero_grad(set_to_none=True)
        phase.training_step(batch, source.relations, counts, 0)
        assert_close(gradients(phase), once)
        assert all(p.grad is own[name] for name, p in phase.model.named_parameters())
    phase.model.zero_grad(set_to_none=False)
    phase.training_step(batch, source.relations, counts, 0)
    assert_close(gradients(phase), once)
    assert len(step._recorded) == 1


def test_a_parameter_without_a_gradient_keeps_none(made, source):
    """The optimizer would decay a weight with a gradient of zeros."""
    phase = new_phase(made, num_stages=1)
    with_replay(phase, source, Rerun())
    phase.training_step(source.collator([0, 1]), source.relations, {"questions": 2.0}, 0)
    assert phase.model.revision.gate.grad is None
    assert phase.model.start.weight.grad is not None


def test_recording_draws_no_random_numbers_from_later_steps(made, source):
    phase = new_phase(made, dropout=0.3)
    phase.model.train()
    first, second = source.collator([0, 1, 2]), source.collator([2])
    counts = {"questions": 3.0}

    def losses(capture: Callable, max_graphs: int, warm: bool) -> tuple:
        with_replay(phase, source, capture, max_graphs)
        if warm:  # both capacities known before the steps that count
            for batch in (first, second):
                phase.training_step(batch, source.relations, counts, 0)
        found = []
        for step in range(2):
            torch.manual_seed(step)
            phase.model.zero_grad()
            outputs = [
                phase.training_step(batch, source.relations, counts, step)
                for batch in (first, second, first)
            ]
            found.append(([float(out.loss) for out in outputs], gradients(phase)))
        return found

    fresh = losses(Rerun(), 16, False)
    # Within a step and from step to step, dropout differs.
    assert len({x for out, _ in fresh for x in (out[0], out[2])}) == 4
    for other in (losses(Rerun(), 16, True), losses(Rerun(), 0, False), losses(Rerun(), 1, False)):
        for (loss, grads), (again, others) in zip(fresh, other, strict=True):
            assert loss == again
            assert all(g is None or torch.equal(g, others[name]) for name, g in grads.items())


def test_beyond_the_limit_steps_run_unrecorded_and_say_so_once(
    made, source, batches, caplog, monkeypatch
):
    phase = new_phase(made)
    counts = {"questions": 3.0}
    plain = []
    for batch in batches:
        phase.training_step(batch, source.relations, counts, 0)
        plain.append(gradients(phase))
        phase.model.zero_grad()
    monkeypatch.setattr(replay_module, "MAX_FACTS", max(b.graph.num_facts for b in batches) - 1)
    capture = Rerun()
    with_replay(phase, source, capture, max_graphs=1)
    with caplog.at_level(logging.INFO, logger="dragkit.trainer.replay"):
        for batch, wanted in zip(batches, plain, strict=True):
            phase.training_step(batch, source.relations, counts, 0)
            assert_close(gradients(phase), wanted)
            phase.model.zero_grad()
    assert capture.recorded == 1 and 1 <= capture.replays < len(batches) - 1
    said = sorted(record.message for record in caplog.records)
    assert len(said) == 2 and "run.max_cuda_graphs" in said[0] and "facts" in said[1]


def test_a_failed_recording_names_the_way_out(made, source):
    phase = new_phase(made)

    def broken(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with_replay(phase, source, broken)
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        phase.training_step(source.collator([0]), source.relations, {"questions": 1.0}, 0)
    assert "run.cuda_graphs=false" in caught.value.__notes__[0]


def test_bytes_come_back_as_they_went():
    tensors = [
        torch.randn(3, 5),
        torch.tensor([True, False, True]),
        torch.zeros(0, 4, dtype=torch.int32),
        torch.arange(7, dtype=torch.int64),
        torch.randn(4, 6).t(),
        torch.tensor(2.5),
    ]
    joined = join(tensors, pin=False)
    views = split(joined, tensors)
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype
        assert view.untyped_storage().data_ptr() == joined.data_ptr()
        assert (view.data_ptr() - joined.data_ptr()) % 64 == 0 or view.numel() == 0
    views[0].zero_()
    assert not joined[:60].any()


def test_the_step_asks_the_device_for_nothing(made, source, batches):
    """Traced on one batch and run on others of its capacity, as a CUDA graph is: a value read back
    to the host would stop the trace, and a size taken from the first batch would be wrong."""
    phase = new_phase(made, num_instructions=1, num_reasoning_steps=2)
    buckets = Buckets(batches)
    padded = [pad_batch(batch, buckets.at(0)) for batch in batches]
    names = [name for name, _ in phase.model.named_parameters()]

    def work(inputs: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        batch = padded[0].with_tensors(split(inputs, padded[0].tensors()))
        given = dict(zip(names, parameters, strict=True))
        phase.forward = lambda *args: functional_call(phase.model, given, args)
        loss = phase.loss(batch, source.relations)
        return (loss, *torch.autograd.grad(loss, parameters))

    def joined(batch: QuestionBatch) -> Tensor:
        return join(batch.tensors(), pin=False)

    parameters = list(phase.model.parameters())
    traced = make_fx(work, tracing_mode="fake", _allow_non_fake_inputs=True)(
        joined(padded[0]), *parameters
    )
    called = {str(node.target) for node in traced.graph.nodes}
    assert any("message_passing_bwd" in name for name in called)
    assert not [n for n in called if any(w in n for w in ("scalar_dense", "nonzero", "unique"))]
    phase.forward = phase.model.__call__
    for batch, full in zip(batches, padded, strict=True):
        phase.model.zero_grad()
        loss = phase.loss(batch, source.relations)
        loss.backward()
        value, *found = traced(joined(full), *parameters)
        torch.testing.assert_close(value, loss, rtol=2e-6, atol=2e-6)
        assert_close(dict(zip(names, found, strict=True)), gradients(phase))


def tensors(folder: Path) -> dict[str, Tensor]:
    loaded = load_checkpoint(find_checkpoint(folder))
    return {f"{part}/{k}": v for part, group in loaded.tensors.items() for k, v in group.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"optim__accumulation_steps": 2, "run__max_cuda_graphs": 1},
        {"retriever__num_stages": 1, "run__precision": "bfloat16"},
    ],
)
def test_a_run_learns_the_same_with_and_without_replay(tmp_path, monkeypatch, settings):
    command(tmp_path, "plain", **settings).execute()
    capture = Rerun()
    monkeypatch.setattr(build_module, "capture_for", lambda device: capture)
    command(tmp_path, "replayed", **settings).execute()
    assert capture.recorded and capture.replays > 1
    plain, ours = (tensors(tmp_path / name) for name in ("plain", "replayed"))
    assert plain.keys() == ours.keys()
    limit = 1e-6 if "run__precision" not in settings else 2e-3
    for name in plain:
        # This bias moves all scores of a softmax alike: its gradient is rounding and nothing else.
        if name.startswith("heads/") and not name.endswith("node_score.bias"):
            torch.testing.assert_close(ours[name], plain[name], rtol=0, atol=limit, msg=name)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("plain", "replayed")
    ]
    for line, other in zip(*logs, strict=True):
        assert line["step"] == other["step"] and line["lr"] == other["lr"]


def test_resume_is_bit_exact_with_replay_and_dropout(tmp_path, monkeypatch):
    monkeypatch.setattr(build_module, "capture_for", lambda device: Rerun())
    settings = {"retriever__dropout": 0.2, "run__max_cuda_graphs": 1}
    command(tmp_path, "whole", **settings).execute()
    original = Trainer.train_step
    done = []

    def stopped(self, batches):
        out = original(self, batches)
        done.append(1)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return out

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopped)
        with pytest.raises(Interrupted):
            command(tmp_path, "cut", **settings).execute()
    command(tmp_path, "cut", run__resume=True, **settings).execute()
    whole, cut = tensors(tmp_path / "whole"), tensors(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_replay_is_on_where_steps_can_be_recorded_and_wanted(made, source, monkeypatch):
    assert capture_for(CPU) is None
    phase = new_phase(made)
    build_module.maybe_replay(phase, source, phase.config, CPU)
    assert phase.replay is None
    monkeypatch.setattr(build_module, "capture_for", lambda device: Rerun())
    monkeypatch.setattr(source, "to_device", True)
    off = phase.config.run.model_copy(update={"cuda_graphs": False})
    build_module.maybe_replay(phase, source, phase.config.model_copy(update={"run": off}), CPU)
    assert phase.replay is None
    build_module.maybe_replay(phase, source, phase.config, CPU)
    assert phase.replay is not None and phase.replay.max_graphs == 16 and not source.to_device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_give_the_gradients_of_plain_steps(made, source, batches, compiled):
    device = torch.device("cuda")
    phase = new_phase(made)
    phase.model.to(device).train()
    if compiled:
        phase.forward = compile_retriever(phase.model)
    relations, counts = source.relations.to(device), {"questions": 3.0}
    steps = [[b] for b in batches] + [batches[:3]] + [[b] for b in reversed(batches)]
    plain = []
    for window in steps:
        losses = [phase.training_step(b, relations, counts, 0).loss for b in window]
        plain.append((losses, gradients(phase)))
        phase.model.zero_grad(set_to_none=True)
    capture, recorded = CudaCapture(device), []

    def counted(work: Callable[[], None]) -> Callable[[], None]:
        recorded.append(work)
        return capture(work)

    with_replay(phase, source, counted)
    for window, (losses, wanted) in zip(steps, plain, strict=True):
        ours = [phase.training_step(b, relations, counts, 0).loss for b in window]
        for loss, other in zip(ours, losses, strict=True):
            torch.testing.assert_close(loss, other, rtol=1e-2, atol=1e-3)
        for name, found in gradients(phase).items():
            if wanted[name] is None:
                assert found is None
                continue
            # Precision "auto" is bfloat16 here.
            scale = wanted[name].norm().clamp(min=1e-2)
            assert (found - wanted[name]).norm() <= 2e-2 * scale, name
        phase.model.zero_grad(set_to_none=True)
    assert 1 <= len(recorded) < len(batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_dropout_in_a_cuda_graph_follows_the_seed_of_the_step(made, source, batches):
    device = torch.device("cuda")
    phase = new_phase(made, dropout=0.3)
    phase.model.to(device).train()
    relations, counts = source.relations.to(device), {"questions": 3.0}

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        phase.model.zero_grad()
        window = (batches[0], batches[2], batches[0])
        return [float(phase.training_step(b, relations, counts, 0).loss) for b in window]

    with_replay(phase, source, CudaCapture(device))
    first = losses(1)  # records both sizes on the way
    assert first[0] != first[2]
    assert losses(2)[0] != first[0]
    torch.testing.assert_close(losses(1), first, rtol=1e-4, atol=1e-6)
    with_replay(phase, source, CudaCapture(device), max_graphs=0)
    torch.testing.assert_close(losses(1), first, rtol=1e-4, atol=1e-6)
