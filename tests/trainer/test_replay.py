"""Replayed steps against eager ones. Without a GPU, a replay runs the captured work again."""

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
from dragkit.trainer.compile import compile_retriever
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.replay import CudaCapture
from dragkit.trainer.transfer import pack_bytes, unpack_bytes
from tests.trainer.replay_cases import (
    MICRO_BATCHES,
    EagerCapture,
    assert_close,
    gradients,
    new_phase,
    with_replay,
)

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_replayed_step_adds_the_gradients_of_an_eager_one(training_run, dataset, batches):
    phase = new_phase(training_run)
    phase.model.train()

    def steps(phase: RetrieverPhase) -> list[tuple[list, dict]]:
        results = []
        for window in (batches[:1], batches[1:4], batches[4:], batches[:3]):
            outputs = [
                phase.training_step(b, dataset.relations, {"questions": 7.0}, 0) for b in window
            ]
            results.append((outputs, gradients(phase)))
            phase.model.zero_grad(set_to_none=True)
        return results

    eager, capture = steps(phase), EagerCapture()
    replayed = steps(with_replay(phase, dataset, capture))
    for (outputs, grads), (eager_outputs, eager_grads) in zip(replayed, eager, strict=True):
        assert_close(grads, eager_grads)
        for out, other in zip(outputs, eager_outputs, strict=True):
            torch.testing.assert_close(out.loss, other.loss, rtol=2e-6, atol=1e-6)
            assert not out.loss.requires_grad
            work = (out.num_questions, out.num_facts, out.num_tokens)
            assert work == (other.num_questions, other.num_facts, other.num_tokens)
    # One replay per micro-batch, and fewer capacities than batches.
    assert capture.replays == 9 and 1 <= capture.captures < len(MICRO_BATCHES)


def test_gradient_tensors_stay_and_take_over_existing_gradients(training_run, dataset):
    phase = new_phase(training_run)
    batch, counts = dataset.collator([0, 1, 2]), {"questions": 3.0}
    phase.training_step(batch, dataset.relations, counts, 0)
    once = gradients(phase)
    capture = EagerCapture()
    phase = with_replay(phase, dataset, capture)

    def step() -> None:
        phase.training_step(batch, dataset.relations, counts, 0)

    # The eager step has left its gradients, as a batch that is too large for a graph does.
    step()
    assert_close(gradients(phase), {n: None if g is None else 2 * g for n, g in once.items()})
    fixed = {name: p.grad for name, p in phase.model.named_parameters()}
    for _ in range(2):
        phase.model.zero_grad(set_to_none=True)
        step()
        assert_close(gradients(phase), once)
        assert all(p.grad is fixed[name] for name, p in phase.model.named_parameters())
    phase.model.zero_grad(set_to_none=False)
    step()
    assert_close(gradients(phase), once)
    assert capture.captures == 1


def test_a_parameter_outside_of_the_loss_keeps_no_gradient(training_run, dataset):
    """AdamW would decay a weight whose gradient is zero instead of None."""
    phase = with_replay(new_phase(training_run, num_stages=1), dataset, EagerCapture())
    phase.training_step(dataset.collator([0, 1]), dataset.relations, {"questions": 2.0}, 0)
    assert phase.model.revision.gate.grad is None
    assert phase.model.start.weight.grad is not None


def test_a_capture_draws_no_random_numbers_from_later_steps(training_run, dataset):
    eager = new_phase(training_run, dropout=0.3)
    eager.model.train()
    first, second = dataset.collator([0, 1, 2]), dataset.collator([2])

    def losses(max_graphs: int, *, warm: bool = False) -> list:
        phase = with_replay(eager, dataset, EagerCapture(), max_graphs)

        def run(step: int, window: tuple) -> list[float]:
            args = (dataset.relations, {"questions": 3.0}, step)
            return [float(phase.training_step(batch, *args).loss) for batch in window]

        if warm:  # both capacities are captured before the steps that count
            run(0, (first, second))
        results = []
        for step in range(2):
            torch.manual_seed(step)
            phase.model.zero_grad()
            results.append((run(step, (first, second, first)), gradients(phase)))
        return results

    fresh = losses(16)
    # Dropout differs within a step and from step to step.
    assert len({x for out, _ in fresh for x in (out[0], out[2])}) == 4
    for other in (losses(16, warm=True), losses(0), losses(1)):
        for (loss, grads), (other_loss, other_grads) in zip(fresh, other, strict=True):
            assert loss == other_loss
            assert all(g is None or torch.equal(g, other_grads[n]) for n, g in grads.items())


def test_beyond_the_limits_steps_run_eagerly_and_say_so_once(
    training_run, dataset, batches, caplog, monkeypatch
):
    phase, counts = new_phase(training_run), {"questions": 3.0}
    expected = []
    for batch in batches:
        phase.training_step(batch, dataset.relations, counts, 0)
        expected.append(gradients(phase))
        phase.model.zero_grad()
    monkeypatch.setattr(replay_module, "MAX_FACTS", max(b.graph.num_facts for b in batches) - 1)
    replay_module._log_once.cache_clear()
    capture = EagerCapture()
    phase = with_replay(phase, dataset, capture, max_graphs=1)
    with caplog.at_level(logging.INFO, logger="dragkit.trainer.replay"):
        for batch, grads in zip(batches, expected, strict=True):
            phase.training_step(batch, dataset.relations, counts, 0)
            assert_close(gradients(phase), grads)
            phase.model.zero_grad()
    assert capture.captures == 1 and 1 <= capture.replays < len(batches) - 1
    messages = sorted(record.message for record in caplog.records)
    assert len(messages) == 2
    assert "run.max_cuda_graphs" in messages[0] and "facts" in messages[1]


def test_a_failed_capture_names_the_setting_that_avoids_it(training_run, dataset):
    def broken(work: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("operation not permitted when stream is capturing")

    phase = with_replay(new_phase(training_run), dataset, broken)
    with pytest.raises(RuntimeError, match="not permitted") as caught:
        phase.training_step(dataset.collator([0]), dataset.relations, {"questions": 1.0}, 0)
    assert "run.cuda_graphs=false" in caught.value.__notes__[0]


def test_the_step_reads_nothing_from_the_device(training_run, dataset, batches):
    """Traces the step on one batch and runs the trace on others of its capacity, as a CUDA graph.

    A value read back to the host stops the trace. A size taken from the first batch gives wrong
    results for the others.
    """
    phase = new_phase(training_run, num_instructions=1, num_reasoning_steps=2)
    buckets = Buckets(batches)
    padded = [pad_batch(batch, buckets.at_level(0)) for batch in batches]
    names = [name for name, _ in phase.model.named_parameters()]

    def step(inputs: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        batch = padded[0].with_tensors(unpack_bytes(inputs, padded[0].tensors()))
        weights = dict(zip(names, parameters, strict=True))
        traced_phase = RetrieverPhase(
            phase.config,
            phase.model,
            forward=lambda *args: functional_call(phase.model, weights, args),
        )
        loss = traced_phase.loss(batch, dataset.relations)
        return (loss, *torch.autograd.grad(loss, parameters))

    def packed(batch: QuestionBatch) -> Tensor:
        return pack_bytes(batch.tensors(), pin=False)

    parameters = list(phase.model.parameters())
    traced = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(
        packed(padded[0]), *parameters
    )
    called = {str(node.target) for node in traced.graph.nodes}
    assert any("message_passing_bwd" in name for name in called)
    assert not [n for n in called if any(w in n for w in ("scalar_dense", "nonzero", "unique"))]
    for batch, full in zip(batches, padded, strict=True):
        phase.model.zero_grad()
        loss = phase.loss(batch, dataset.relations)
        loss.backward()
        value, *grads = traced(packed(full), *parameters)
        torch.testing.assert_close(value, loss, rtol=2e-6, atol=2e-6)
        assert_close(dict(zip(names, grads, strict=True)), gradients(phase))


@pytest.mark.gpu
@NEEDS_CUDA
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_give_the_gradients_of_eager_steps(training_run, dataset, batches, compiled):
    device = torch.device("cuda")
    phase = new_phase(training_run)
    phase.model.to(device).train()
    if compiled:
        forward = compile_retriever(phase.model)
        phase = RetrieverPhase(phase.config, phase.model, forward=forward)
    relations, counts = dataset.relations.to(device), {"questions": 3.0}
    steps = [[b] for b in batches] + [batches[:3]] + [[b] for b in reversed(batches)]
    eager = []
    for window in steps:
        losses = [phase.training_step(b, relations, counts, 0).loss for b in window]
        eager.append((losses, gradients(phase)))
        phase.model.zero_grad(set_to_none=True)
    capture, captured = CudaCapture(device), []

    def counted(work: Callable[[], None]) -> Callable[[], None]:
        captured.append(work)
        return capture(work)

    phase = with_replay(phase, dataset, counted)
    for window, (losses, expected) in zip(steps, eager, strict=True):
        replayed = [phase.training_step(b, relations, counts, 0).loss for b in window]
        for loss, other in zip(replayed, losses, strict=True):
            torch.testing.assert_close(loss, other, rtol=1e-2, atol=1e-3)
        for name, grad in gradients(phase).items():
            if expected[name] is None:
                assert grad is None
                continue
            # Precision "auto" is bfloat16 here.
            scale = expected[name].norm().clamp(min=1e-2)
            assert (grad - expected[name]).norm() <= 2e-2 * scale, name
        phase.model.zero_grad(set_to_none=True)
    assert 1 <= len(captured) < len(batches)


@pytest.mark.gpu
@NEEDS_CUDA
def test_dropout_in_a_cuda_graph_follows_the_seed_of_the_step(training_run, dataset, batches):
    device = torch.device("cuda")
    eager = new_phase(training_run, dropout=0.3)
    eager.model.to(device).train()
    relations, counts = dataset.relations.to(device), {"questions": 3.0}

    def losses(phase: RetrieverPhase, seed: int) -> list[float]:
        torch.manual_seed(seed)
        phase.model.zero_grad()
        window = (batches[0], batches[2], batches[0])
        return [float(phase.training_step(b, relations, counts, 0).loss) for b in window]

    graphs = with_replay(eager, dataset, CudaCapture(device))
    first = losses(graphs, 1)  # captures both capacities
    assert first[0] != first[2]
    assert losses(graphs, 2)[0] != first[0]
    torch.testing.assert_close(losses(graphs, 1), first, rtol=1e-4, atol=1e-6)
    no_graphs = with_replay(eager, dataset, CudaCapture(device), max_graphs=0)
    torch.testing.assert_close(losses(no_graphs, 1), first, rtol=1e-4, atol=1e-6)
