"""The retriever on a GPU: the CPU's numbers, compiled and not, and the same bits in every run."""

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
    """Width 256 and dropout, on the first questions of the demo."""
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
    """On the CPU, without dropout."""
    retriever = build_retriever(config, encoder)
    # A fresh gate of the revision hardly moves; random weights everywhere make all terms count.
    with torch.no_grad():
        for parameter in retriever.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return retriever.eval()


@pytest.fixture(autouse=True)
def exact_products(_process_state: None) -> None:
    """Not rounded to TensorFloat-32; the shared fixture puts the setting back."""
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.fixture
def compile_flags() -> Iterator[None]:
    """What `compile_retriever` sets for the process is taken back."""
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
    """Logits, and the gradients of all parameters, where the model is."""
    device = next(model.parameters()).device
    model.zero_grad()
    with autocast(precision, device):
        logits = call(batch.to(device), source.relations.to(device)).fact_logits
    slope = torch.linspace(-1, 1, logits.numel(), device=device)
    (logits.float() * slope).sum().backward()
    # This bias moves all scores of a softmax alike: its gradient is rounding and nothing else.
    found = {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None and not name.endswith("node_score.bias")
    }
    return logits.detach(), found


def assert_same(
    ours: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]]
) -> None:
    assert_close(ours[0], wanted[0], name="logits", tolerance=FORWARD)
    assert ours[1].keys() == wanted[1].keys()
    for name, grad in wanted[1].items():
        assert_close(ours[1][name], grad, name=name, tolerance=GRADIENT)


def errors(
    found: tuple[Tensor, dict[str, Tensor]], exact: tuple[Tensor, dict[str, Tensor]]
) -> tuple[float, float]:
    """RMS error ratios of the logits, and of the gradients of all parameters as one vector."""

    def ratio(x: list[Tensor], y: list[Tensor]) -> float:
        a, b = (torch.cat([t.double().cpu().flatten() for t in part]) for part in (x, y))
        return float((a - b).norm() / b.norm())

    return ratio([found[0]], [exact[0]]), ratio([*found[1].values()], [*exact[1].values()])


@pytest.mark.parametrize("rows", BATCHES, ids=len)
def test_float32_is_the_cpus(model, source, rows):
    there = copy.deepcopy(model).to(DEVICE)
    batch = source.collator(rows)
    wanted = outcome(model, model, batch, source, "float32")
    assert_same(outcome(there, there, batch, source, "float32"), wanted)


@pytest.mark.parametrize("rows", BATCHES, ids=len)
def test_bfloat16_is_near_float32(model, source, rows):
    """Gradients cancel in sums over many facts, so they are held against the CPU's bfloat16."""
    there = copy.deepcopy(model).to(DEVICE)
    batch = source.collator(rows)
    exact = outcome(model, model, batch, source, "float32")
    low = errors(outcome(model, model, batch, source, "bfloat16"), exact)
    ours = errors(outcome(there, there, batch, source, "bfloat16"), exact)
    assert ours[0] <= LOW and ours[1] <= 2 * low[1] + LOW


def test_compiled_is_eager(model, source, compile_flags):
    """Forward and backward, on batches of several sizes."""
    there = model.to(DEVICE)
    compiled = compile_retriever(there)
    for rows in BATCHES:
        batch = source.collator(rows)
        exact = outcome(there, there, batch, source, "float32")
        assert_same(outcome(compiled, there, batch, source, "float32"), exact)
        low = errors(outcome(there, there, batch, source, "bfloat16"), exact)
        ours = errors(outcome(compiled, there, batch, source, "bfloat16"), exact)
        assert ours[0] <= LOW and ours[1] <= 2 * low[1] + LOW


def trained(way: str, config: TrainConfig, source: QuestionDataset, folder: Path) -> dict:
    """Weights and losses after a few steps of phase 1, with dropout."""
    encoder = TextEncoder(find_encoder(), cache_root(None))
    run = {"compile": way == "compiled", "cuda_graphs": way == "replayed"}
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    retriever = build_retriever(config, encoder).to(DEVICE)
    phase = build_retriever_phase(config, retriever, DEVICE, source)
    assert (phase.replay is not None) == (way == "replayed")
    trainer = Trainer(config, phase, source, None, folder, DEVICE)
    losses = []
    for batch in source.load(source.batch_sampler.batches(0)[:STEPS]):
        losses += [out.loss for out in trainer.train_step([batch])]
    found = {name: p.detach().clone() for name, p in phase.model.named_parameters()}
    return found | {"losses": torch.stack(losses)}


@pytest.mark.parametrize("way", ["plain", "replayed", "compiled"])
def test_training_twice_gives_the_same_bits(way, config, source, compile_flags, tmp_path):
    first = trained(way, config, source, tmp_path)
    again = trained(way, config, source, tmp_path)
    assert len(first["losses"]) == STEPS and first["losses"].isfinite().all()
    differ = [name for name, value in first.items() if not torch.equal(value, again[name])]
    assert not differ, differ
    start = build_retriever(config, TextEncoder(find_encoder(), cache_root(None)))
    assert any(not torch.equal(first[name].cpu(), p) for name, p in start.named_parameters())
