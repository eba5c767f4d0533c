"""Steps in CUDA graphs against plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from dragkit.trainer.compile import compile_retriever
from dragkit.trainer.replay import CudaCapture
from tests.trainer.replay_cases import gradients, new_phase, with_replay


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_cuda_graphs_give_the_gradients_of_plain_steps(training_run, dataset, batches, compiled):
    device = torch.device("cuda")
    phase = new_phase(training_run)
    phase.model.to(device).train()
    if compiled:
        phase.forward = compile_retriever(phase.model)
    relations, counts = dataset.relations.to(device), {"questions": 3.0}
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

    with_replay(phase, dataset, counted)
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
def test_dropout_in_a_cuda_graph_follows_the_seed_of_the_step(training_run, dataset, batches):
    device = torch.device("cuda")
    phase = new_phase(training_run, dropout=0.3)
    phase.model.to(device).train()
    relations, counts = dataset.relations.to(device), {"questions": 3.0}

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        phase.model.zero_grad()
        window = (batches[0], batches[2], batches[0])
        return [float(phase.training_step(b, relations, counts, 0).loss) for b in window]

    with_replay(phase, dataset, CudaCapture(device))
    first = losses(1)  # records both sizes on the way
    assert first[0] != first[2]
    assert losses(2)[0] != first[0]
    torch.testing.assert_close(losses(1), first, rtol=1e-4, atol=1e-6)
    with_replay(phase, dataset, CudaCapture(device), max_graphs=0)
    torch.testing.assert_close(losses(1), first, rtol=1e-4, atol=1e-6)
