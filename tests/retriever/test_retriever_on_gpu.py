"""The retriever on a GPU equals the CPU, compiled and eager, and is deterministic."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.fx.experimental._config
from torch import Tensor

from dragkit.config import TrainConfig, resolve_config
from dragkit.data.cache import cache_root
from dragkit.data.packed import QuestionBatch
from dragkit.demo import demo_files
from dragkit.retriever.retriever import Retriever
from dragkit.retriever.text_encoder import TextEncoder, find_encoder
from dragkit.trainer.build import build_retriever, build_retriever_phase
from dragkit.trainer.compile import autocast, compile_retriever
from dragkit.trainer.loop import Trainer
from dragkit.trainer.question_dataset import QuestionDataset
from dragkit_kernels.testing import assert_close

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
QUESTIONS, STEPS = 48, 5
BATCHES = [list(range(16)), [16, 17, 18], list(range(20, 48))]
FORWARD, GRADIENT, LOW = 1e-4, 1e-3, 3e-2


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """A run of width 256 with dropout on the first questions of the demo."""
    folder = tmp_path_factory.mktemp("gpu")
    lines = demo_files().train.read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "questions.jsonl").write_text("".join(lines[:QUESTIONS]), encoding="utf-8")
    values = {
        "run.phase": 1,
        "run.device": DEVICE.type,
        "data.heuristics_path": str(folder / "questions.jsonl"),
        "retriever.hidden_dim": 256,
        "retriever.dropout": 0.2,
        "optim.batch_size": 8,
        "optim.lr": 1e-3,
    }
    return resolve_config("tiny", None, values)[0]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder(find_encoder(), cache_root(None))


@pytest.fixture(scope="module")
def source(config: TrainConfig, encoder: TextEncoder) -> QuestionDataset:
    return QuestionDataset(config.data.heuristics_path, config, encoder, None, 8)


@pytest.fixture
def model(config: TrainConfig, encoder: TextEncoder) -> Retriever:
    """A retriever on the CPU in evaluation mode."""
    retriever = build_retriever(config, encoder)
    # Initial gates of the revision are almost constant. With random weights all terms matter.
    with torch.no_grad():
        for parameter in retriever.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return retriever.eval()


@pytest.fixture(autouse=True)
def exact_products(_process_state: None) -> None:
    """Turns TensorFloat-32 off. The shared fixture restores the setting."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def compile_flags() -> Iterator[None]:
    """Restores the settings that `compile_retriever` changes for the process."""
    torch._dynamo.reset()
    with (
        torch.fx.experimental._config.patch(use_duck_shape=True),
        torch._dynamo.config.patch(recompile_limit=8, specialize_float=False),
    ):
        yield
    torch._dynamo.reset()


def outcome(
    call: object, model: Retriever, batch: QuestionBatch, source: QuestionDataset, precision: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns logits and gradients of all parameters on the device of the model."""
    device = next(model.parameters()).device
    model.zero_grad()
    with autocast(precision, device):
        logits = call(batch.to(device), source.relations.to(device)).fact_logits
    slope = torch.linspace(-1, 1, logits.numel(), device=device)
    (logits.float() * slope).sum().backward()
    # This bias cancels in the softmax, so its gradient is only rounding error.
    gradients = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and not name.endswith("node_score.bias")
    }
    return logits.detach(), gradients


def assert_same(
    actual: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert_close(actual[0], expected[0], name="logits", tolerance=FORWARD)
    assert actual[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        assert_close(actual[1][name], grad, name=name, tolerance=GRADIENT)


def errors(
    actual: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """Returns relative RMS errors of the logits and of all gradients as one vector."""

    def ratio(x: list[Tensor], y: list[Tensor]) -> float:
        a, b = (torch.cat([t.double().cpu().flatten() for t in part]) for part in (x, y))
        return float((a - b).norm() / b.norm())

    return ratio([actual[0]], [exact[0]]), ratio([*actual[1].values()], [*exact[1].values()])


@pytest.mark.parametrize("rows", BATCHES, ids=len)
def test_float32_equals_the_cpu(model, source, rows):
    gpu_model = copy.deepcopy(model).to(DEVICE)
    batch = source.collator(rows)
    expected = outcome(model, model, batch, source, "float32")
    assert_same(outcome(gpu_model, gpu_model, batch, source, "float32"), expected)


@pytest.mark.parametrize("rows", BATCHES, ids=len)
def test_bfloat16_is_near_float32(model, source, rows):
    """Gradients cancel in sums over many facts. Their bound is the error of bfloat16 on the CPU."""
    gpu_model = copy.deepcopy(model).to(DEVICE)
    batch = source.collator(rows)
    exact = outcome(model, model, batch, source, "float32")
    low = errors(outcome(model, model, batch, source, "bfloat16"), exact)
    ours = errors(outcome(gpu_model, gpu_model, batch, source, "bfloat16"), exact)
    assert ours[0] <= LOW and ours[1] <= 2 * low[1] + LOW


def test_compiled_equals_eager(model, source, compile_flags):
    """Compares forward and backward on batches of several sizes."""
    gpu_model = model.to(DEVICE)
    compiled = compile_retriever(gpu_model)
    for rows in BATCHES:
        batch = source.collator(rows)
        exact = outcome(gpu_model, gpu_model, batch, source, "float32")
        assert_same(outcome(compiled, gpu_model, batch, source, "float32"), exact)
        low = errors(outcome(gpu_model, gpu_model, batch, source, "bfloat16"), exact)
        ours = errors(outcome(compiled, gpu_model, batch, source, "bfloat16"), exact)
        assert ours[0] <= LOW and ours[1] <= 2 * low[1] + LOW


def trained(mode: str, config: TrainConfig, source: QuestionDataset, folder: Path) -> dict:
    """Returns weights and losses of a few steps of phase 1 with dropout."""
    encoder = TextEncoder(find_encoder(), cache_root(None))
    run = {"compile": mode == "compiled", "cuda_graphs": mode == "replayed"}
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    retriever = build_retriever(config, encoder).to(DEVICE)
    phase = build_retriever_phase(config, retriever, DEVICE, source)
    assert (phase.replay is not None) == (mode == "replayed")
    trainer = Trainer(config, phase, source, None, folder, DEVICE)
    losses = []
    for batch in source.load(source.batch_sampler.batches(0)[:STEPS]):
        losses += [out.loss for out in trainer.train_step([batch])]
    weights = {name: p.detach().clone() for name, p in phase.model.named_parameters()}
    return weights | {"losses": torch.stack(losses)}


@pytest.mark.parametrize("mode", ["eager", "replayed", "compiled"])
def test_training_is_deterministic(mode, config, source, compile_flags, tmp_path):
    first = trained(mode, config, source, tmp_path)
    again = trained(mode, config, source, tmp_path)
    assert len(first["losses"]) == STEPS and first["losses"].isfinite().all()
    differ = [name for name, value in first.items() if not torch.equal(value, again[name])]
    assert not differ, differ
    start = build_retriever(config, TextEncoder(find_encoder(), cache_root(None)))
    assert any(not torch.equal(first[name].cpu(), p) for name, p in start.named_parameters())
