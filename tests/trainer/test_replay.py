"""Replayed steps against plain ones. Without a GPU, what would be recorded is run again instead."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from dragkit.data.packed import QuestionBatch
from dragkit.data.padding import Buckets, pad_batch
from dragkit.trainer import replay as replay_module
from dragkit.trainer.transfer import pack_bytes, unpack_bytes
from tests.trainer.replay_cases import (
    MICRO_BATCHES,
    Rerun,
    assert_close,
    gradients,
    new_phase,
    with_replay,
)


def test_a_replayed_step_adds_the_gradients_of_a_plain_one(training_run, dataset, batches):
    phase = new_phase(training_run)
    counts = {"questions": 7.0}
    phase.model.train()

    def steps() -> list[tuple[list, dict]]:
        done = []
        for window in (batches[:1], batches[1:4], batches[4:], batches[:3]):
            outputs = [phase.training_step(b, dataset.relations, counts, 0) for b in window]
            done.append((outputs, gradients(phase)))
            phase.model.zero_grad(set_to_none=True)
        return done

    plain = steps()
    capture = Rerun()
    with_replay(phase, dataset, capture)
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


def test_gradient_tensors_stay_and_take_over_what_others_left(training_run, dataset):
    phase = new_phase(training_run)
    batch = dataset.collator([0, 1, 2])
    counts = {"questions": 3.0}
    phase.training_step(batch, dataset.relations, counts, 0)
    once = gradients(phase)
    step = with_replay(phase, dataset, Rerun())
    # On top of a gradient that a plain step left, as when a micro-batch ran without a graph.
    phase.training_step(batch, dataset.relations, counts, 0)
    assert_close(gradients(phase), {n: None if g is None else 2 * g for n, g in once.items()})
    own = {name: p.grad for name, p in phase.model.named_parameters()}
    for _ in range(2):
        phase.model.zero_grad(set_to_none=True)
        phase.training_step(batch, dataset.relations, counts, 0)
        assert_close(gradients(phase), once)
        assert all(p.grad is own[name] for name, p in phase.model.named_parameters())
    phase.model.zero_grad(set_to_none=False)
    phase.training_step(batch, dataset.relations, counts, 0)
    assert_close(gradients(phase), once)
    assert len(step._recorded) == 1


def test_a_parameter_without_a_gradient_keeps_none(training_run, dataset):
    """The optimizer would decay a weight with a gradient of zeros."""
    phase = new_phase(training_run, num_stages=1)
    with_replay(phase, dataset, Rerun())
    phase.training_step(dataset.collator([0, 1]), dataset.relations, {"questions": 2.0}, 0)
    assert phase.model.revision.gate.grad is None
    assert phase.model.start.weight.grad is not None


def test_recording_draws_no_random_numbers_from_later_steps(training_run, dataset):
    phase = new_phase(training_run, dropout=0.3)
    phase.model.train()
    first, second = dataset.collator([0, 1, 2]), dataset.collator([2])
    counts = {"questions": 3.0}

    def losses(capture: Callable, max_graphs: int, warm: bool) -> tuple:
        with_replay(phase, dataset, capture, max_graphs)
        if warm:  # both capacities known before the steps that count
            for batch in (first, second):
                phase.training_step(batch, dataset.relations, counts, 0)
        found = []
        for step in range(2):
            torch.manual_seed(step)
            phase.model.zero_grad()
            outputs = [
                phase.training_step(batch, dataset.relations, counts, step)
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
    training_run, dataset, batches, caplog, monkeypatch
):
    phase = new_phase(training_run)
    counts = {"questions": 3.0}
    plain = []
    for batch in batches:
        phase.training_step(batch, dataset.relations, counts, 0)
        plain.append(gradients(phase))
        phase.model.zero_grad()
    monkeypatch.setattr(replay_module, "MAX_FACTS", max(b.graph.num_facts for b in batches) - 1)
    capture = Rerun()
    with_replay(phase, dataset, capture, max_graphs=1)
    with caplog.at_level(logging.INFO, logger="dragkit.trainer.replay"):
        for batch, wanted in zip(batches, plain, strict=True):
            phase.training_step(batch, dataset.relations, counts, 0)
            assert_close(gradients(phase), wanted)
            phase.model.zero_grad()
    assert capture.recorded == 1 and 1 <= capture.replays < len(batches) - 1
    said = sorted(record.message for record in caplog.records)
    assert len(said) == 2 and "run.max_cuda_graphs" in said[0] and "facts" in said[1]


def test_a_failed_recording_names_the_way_out(training_run, dataset):
    phase = new_phase(training_run)

    def broken(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    with_replay(phase, dataset, broken)
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        phase.training_step(dataset.collator([0]), dataset.relations, {"questions": 1.0}, 0)
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
    joined = pack_bytes(tensors, pin=False)
    views = unpack_bytes(joined, tensors)
    for view, tensor in zip(views, tensors, strict=True):
        assert torch.equal(view, tensor) and view.dtype == tensor.dtype
        assert view.untyped_storage().data_ptr() == joined.data_ptr()
        assert (view.data_ptr() - joined.data_ptr()) % 64 == 0 or view.numel() == 0
    views[0].zero_()
    assert not joined[:60].any()


def test_the_step_asks_the_device_for_nothing(training_run, dataset, batches):
    """Traced on one batch and run on others of its capacity, as a CUDA graph is: a value read back
    to the host would stop the trace, and a size taken from the first batch would be wrong."""
    phase = new_phase(training_run, num_instructions=1, num_reasoning_steps=2)
    buckets = Buckets(batches)
    padded = [pad_batch(batch, buckets.at_level(0)) for batch in batches]
    names = [name for name, _ in phase.model.named_parameters()]

    def work(inputs: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        batch = padded[0].with_tensors(unpack_bytes(inputs, padded[0].tensors()))
        given = dict(zip(names, parameters, strict=True))
        phase.forward = lambda *args: functional_call(phase.model, given, args)
        loss = phase.loss(batch, dataset.relations)
        return (loss, *torch.autograd.grad(loss, parameters))

    def joined(batch: QuestionBatch) -> Tensor:
        return pack_bytes(batch.tensors(), pin=False)

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
        loss = phase.loss(batch, dataset.relations)
        loss.backward()
        value, *found = traced(joined(full), *parameters)
        torch.testing.assert_close(value, loss, rtol=2e-6, atol=2e-6)
        assert_close(dict(zip(names, found, strict=True)), gradients(phase))
