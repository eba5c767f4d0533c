"""Steps in CUDA graphs against eager ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dragkit.trainer.compile import compile_retriever
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.replay import CudaCapture
from tests.trainer.replay_cases import gradients, new_phase, with_replay


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
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
