"""Questions per second of whole training steps: ours, the earlier loops, and packed eager PyG.

A step is everything from the packed store (ours), PyG graphs in memory (packed PyG) or raw lines
(the earlier loops) to the update of the weights. The comparisons with packed PyG run on a GPU where
there is one, both sides in the trainer's mixed precision; those with the earlier loops on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch_geometric.data import Batch

from bench.baselines import EarlierRetrieverLoop
from bench.data import (
    LARGE,
    SMALL,
    bench_config,
    pyg_questions,
    question_file,
    question_source,
    raw_questions,
    sizes,
    text_encoder,
    whole_batches,
)
from bench.earlier_joint import EarlierJointLoop
from bench.measure import Comparison, Way, check_agreement
from bench.pyg_rearev import PackedPyGReaRev, pyg_batch
from dragkit.config import TrainConfig
from dragkit.data.packed import QuestionBatch
from dragkit.losses import retrieval_loss
from dragkit.trainer.compile import autocast, compile_retriever
from dragkit.trainer.loop import Trainer
from dragkit.trainer.optim import build_optimizer
from dragkit.trainer.phase1 import RetrieverPhase
from dragkit.trainer.run import build_joint, build_retriever, maybe_replay
from dragkit.trainer.source import QuestionSource

# Packed PyG takes many seconds a step on graphs of 2,000 facts.
pytestmark = pytest.mark.timeout(1800)
_CPU = torch.device("cpu")
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_BATCHES = 8


class _Ours:
    """The trainer's own step, fed by the source's own loader."""

    def __init__(self, trainer: Trainer, batches: list[list[int]]) -> None:
        self.trainer, self.batches = trainer, batches
        self.stream = self._stream()

    def _stream(self) -> Iterator[QuestionBatch]:
        while True:
            yield from self.trainer.train.load(self.batches)

    def __call__(self) -> None:
        self.trainer.train_step([next(self.stream)])


def _phase1(
    config: TrainConfig,
    source: QuestionSource,
    cache: Path,
    run_dir: Path,
    device: torch.device = _CPU,
) -> Trainer:
    phase = RetrieverPhase(config, build_retriever(config, text_encoder(cache)).to(device))
    return Trainer(config, phase, source, None, run_dir, device)


def _other_way(trainer: Trainer, *, compiled: bool, replay: bool) -> Trainer:
    """A trainer of the same weights, with its step compiled or replayed as a CUDA graph."""
    # Whether batches go to page-locked memory is the source's, and a replay makes its own copies.
    config, source = trainer.config, copy(trainer.train)
    phase = RetrieverPhase(config, trainer.phase.model)
    if compiled:
        phase.forward = compile_retriever(phase.model)
    if replay:
        maybe_replay(phase, source, config, trainer.device)
    return Trainer(config, phase, source, None, trainer.run_dir, trainer.device)


def _replayed(trainer: Trainer, batches: list[list[int]], batch: int, steps: int) -> list[Way]:
    """Our step as CUDA graphs, once every size is recorded; on a GPU only."""
    if trainer.device.type != "cuda":
        return []
    step = _Ours(_other_way(trainer, compiled=False, replay=True), batches)
    for _ in batches:
        step()
    return [Way("dragkit, CUDA graphs", step, batch, steps)]


def _compiled(
    trainer: Trainer,
    batches: list[list[int]],
    batch: int,
    steps: int,
    request: pytest.FixtureRequest,
) -> list[Way]:
    """Our step with `--compile`, once every kind of batch is compiled; only when asked for."""
    if not request.config.getoption("--bench-compiled"):
        return []
    on_gpu = trainer.device.type == "cuda"
    ways = []
    for replay in (False, True) if on_gpu else (False,):
        step = _Ours(_other_way(trainer, compiled=True, replay=replay), batches)
        for _ in batches:
            step()
        name = "dragkit, compiled retriever" + (", CUDA graphs" if replay else "")
        ways.append(Way(name, step, batch, steps))
    return ways


class _PackedPyG:
    """The same step written with PyG: its collation, its operators, the same loss and AdamW."""

    def __init__(
        self, trainer: Trainer, batches: list[list[int]], *, per_fact: bool, compiled: bool = False
    ) -> None:
        retriever = trainer.phase.model
        text_dim = retriever.pooling.project.in_features
        self.device = trainer.device
        self.model = PackedPyGReaRev(retriever.config, text_dim, per_fact=per_fact).to(self.device)
        self.model.load_state_dict(retriever.state_dict())
        self.call = torch.compile(self.model, dynamic=True) if compiled else self.model
        self.config, self.relations = trainer.config, trainer.relations
        questions = pyg_questions(trainer.train, sorted({row for rows in batches for row in rows}))
        self.lists = [[questions[row] for row in rows] for rows in batches]
        self.stream = cycle(self.lists)
        self.parameters = list(self.model.parameters())
        optim = trainer.config.optim
        group = {
            "params": self.parameters,
            "lr": optim.lr,
            "weight_decay": optim.weight_decay,
        }
        self.optimizer = build_optimizer([group], self.device)

    def backward(self, batch: Batch, precision: str) -> Tensor:
        """Forward and backward; returns the logits."""
        batch = batch.to(self.device)
        with autocast(precision, self.device):
            logits = self.call(batch, self.relations).float()
        loss = retrieval_loss(
            logits,
            batch.label,
            batch.fact_ptr,
            rho=self.config.loss.rho,
            margin=self.config.loss.margin,
        )
        positive = torch.segment_reduce(batch.label, "sum", offsets=batch.fact_ptr) > 0
        (loss / positive.sum().clamp(min=1)).backward()
        return logits

    def __call__(self) -> None:
        self.backward(pyg_batch(next(self.stream)), self.config.run.precision)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def check(self, trainer: Trainer, rows: list[int], name: str) -> None:
        """Logits and every gradient equal ours on one batch, in float32."""
        run = trainer.config.run.model_copy(update={"precision": "float32"})
        config = trainer.config.model_copy(update={"run": run})
        batch, phase = trainer.train.collator(rows), RetrieverPhase(config, trainer.phase.model)
        phase.model.train()
        logits = phase.forward(batch.to(self.device), trainer.relations).fact_logits
        theirs = self.backward(pyg_batch(self.lists[0]), "float32")
        check_agreement(f"{name}: logits", logits, theirs, 1e-4)
        phase.training_step(batch, trainer.relations, phase.counts([batch]), 0)
        ours = dict(phase.model.named_parameters())
        for key, parameter in self.model.named_parameters():
            # Nothing reads a last layer's distribution, nor does a softmax its scores' common part.
            if not key.startswith("node_score.bias"):
                check_agreement(f"{name}: gradient of {key}", ours[key].grad, parameter.grad, 1e-3)
        for model in (phase.model, self.model):
            model.zero_grad(set_to_none=True)


def _raw_batches(source: QuestionSource, batches: list[list[int]]) -> list[list[dict]]:
    raw = raw_questions(source.path)
    texts = source.store.question_texts
    for row in {row for rows in batches for row in rows}:
        if raw[row]["question"] != texts[row]:
            raise ValueError(f"{source.path}: line {row + 1} is not row {row} of the store")
    return [[raw[row] for row in rows] for rows in batches]


@pytest.mark.parametrize("facts,batch,steps,instructions", [("50", 16, 4, 2), ("2000", 16, 1, 3)])
def test_phase1_against_packed_pyg(
    facts: str,
    batch: int,
    steps: int,
    instructions: int,
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Goals: 1.8 times the questions/s of eager PyG at 50 facts, 10 times at 2,000.

    K is ReaRev's published value for WebQSP (2) and, on the large graphs, for CWQ (3).
    """
    file = question_file(SMALL if facts == "50" else LARGE, cache_dir)
    if facts != "50" and file.name != LARGE:
        pytest.skip(f"{LARGE} was not found, and the bundled graphs are small")
    config = bench_config(1, retriever__num_instructions=instructions)
    source = question_source(file, config, cache_dir, None, batch)
    batches = whole_batches(source, batch, _BATCHES)
    trainer = _phase1(config, source, cache_dir, tmp_path, _DEVICE)
    others = {
        "eager PyG, relations projected once": _PackedPyG(trainer, batches, per_fact=False),
        "eager PyG, relations projected per fact": _PackedPyG(trainer, batches, per_fact=True),
    }
    for name, way in others.items():
        way.check(trainer, batches[0], name)
    ours = Way("dragkit", _Ours(trainer, batches), batch, steps)
    ways = [ours, *_replayed(trainer, batches, batch, steps)]
    ways += _compiled(trainer, batches, batch, steps, request)
    ways += [Way(name, way, batch, steps) for name, way in others.items()]
    about = {"data": file.name, "K": instructions} | sizes(source.collator(batches[0]))
    timed(f"phase 1, {facts}-fact graphs, packed PyG", ways, about)


@pytest.mark.parametrize("facts,batch", [("50", 16), ("2000", 4)])
def test_phase1_against_compiled_pyg(
    facts: str,
    batch: int,
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """How far a compiler gets without the algebra; only with --bench-compiled."""
    if not request.config.getoption("--bench-compiled"):
        pytest.skip("compilation takes minutes; ask for it with --bench-compiled")
    file = question_file(SMALL if facts == "50" else LARGE, cache_dir)
    config = bench_config(1)
    source = question_source(file, config, cache_dir, None, batch)
    batches = whole_batches(source, batch, _BATCHES)
    trainer = _phase1(config, source, cache_dir, tmp_path, _DEVICE)
    other = _PackedPyG(trainer, batches, per_fact=False, compiled=True)
    other.check(trainer, batches[0], "compiled PyG")
    ways = [
        Way("dragkit", _Ours(trainer, batches), batch),
        Way("compiled PyG, relations projected once", other, batch),
    ]
    about = {"data": file.name} | sizes(source.collator(batches[0]))
    timed(f"phase 1, {facts}-fact graphs, compiled PyG", ways, about)


@pytest.mark.parametrize("instructions,stages", [(2, 2), (1, 1)])
def test_phase1_against_earlier_loop(
    instructions: int,
    stages: int,
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Goal: 40 times the earlier loop, which encodes the relations of every question.

    The earlier model has one instruction and three layers in all; K = 1, T = 1 has the same depth.
    """
    batch = 16
    file = question_file(SMALL, cache_dir)
    config = bench_config(1, retriever__num_instructions=instructions, retriever__num_stages=stages)
    source = question_source(file, config, cache_dir, None, batch)
    batches = whole_batches(source, batch, _BATCHES)
    trainer = _phase1(config, source, cache_dir, tmp_path)
    raw = _raw_batches(source, batches)
    first, later = EarlierRetrieverLoop(), EarlierRetrieverLoop()
    first_stream, later_stream = cycle(raw), cycle(raw[:2])

    def first_epoch() -> None:
        first.model.forget()
        first.step(next(first_stream))

    for questions in raw[:2]:
        later.step(questions)
    ways = [
        Way("dragkit", _Ours(trainer, batches), batch, 4),
        *_compiled(trainer, batches, batch, 4, request),
        Way("earlier loop, first epoch", first_epoch, batch),
        Way("earlier loop, all texts in its cache", lambda: later.step(next(later_stream)), batch),
    ]
    about = {"data": file.name, "K": instructions, "T": stages} | sizes(source.collator(batches[0]))
    timed(f"phase 1, 50-fact graphs, earlier loop, K={instructions} T={stages}", ways, about)


def _check_joint(trainer: Trainer, loop: EarlierJointLoop, row: int, question: dict) -> None:
    """One prompt, same facts and vectors, no padding: the two losses are the same number."""
    joint = trainer.phase.model
    batch = trainer.train.collator([row])
    stored = trainer.train.store.question(row)
    known = [*stored.answers]
    known.sort(key=lambda answer: answer not in stored.entities)
    question = question | {
        "triples": stored.triples,
        "answer": known[: joint.config.generator.max_answers],
    }
    count = min(5, batch.graph.num_facts)
    index = torch.arange(count, dtype=torch.int32).unsqueeze(0)
    vectors = torch.randn(count, joint.generator.dim, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        prompt = joint.prompt(batch, index, with_target=True)
        ours = joint.generator(prompt, vectors).loss_sum / prompt.target_id.numel()
        theirs = loop.generator_loss([loop.prompt(question, index[0].long(), vectors)])
    check_agreement("joint step: loss of one prompt", ours, theirs, 1e-4)


def test_phase2_against_earlier_loop(
    timed: Callable[..., Comparison], cache_dir: Path, tmp_path: Path
) -> None:
    """Goal: 8 times the earlier joint loop with the same tiny generator and facts per prompt."""
    batch = 16
    file = question_file(SMALL, cache_dir)
    config = bench_config(2)
    phase = build_joint(config, text_encoder(cache_dir), _CPU)
    source = question_source(file, config, cache_dir, phase.model.generator, batch)
    batches = whole_batches(source, batch, _BATCHES)
    trainer = Trainer(config, phase, source, None, tmp_path, _CPU)
    raw = _raw_batches(source, batches)

    def earlier() -> EarlierJointLoop:
        generator = build_joint(config, text_encoder(cache_dir), _CPU).model.generator
        return EarlierJointLoop(
            generator,
            k_facts=config.sampler.k_facts,
            max_answers=config.generator.max_answers,
            hidden=phase.model.projector.hidden.out_features,
        )

    first, later = earlier(), earlier()
    _check_joint(trainer, first, batches[0][0], raw[0][0])
    first_stream, later_stream = cycle(raw), cycle(raw[:2])

    def first_epoch() -> None:
        first.retriever.forget()
        first.step(next(first_stream))

    for questions in raw[:2]:
        later.step(questions)
    ways = [
        Way("dragkit", _Ours(trainer, batches), batch),
        Way("earlier loop, first epoch", first_epoch, batch),
        Way("earlier loop, all texts in its cache", lambda: later.step(next(later_stream)), batch),
    ]
    kept = trainer.train_step([source.collator(batches[0])])[0].parts["facts_kept"]
    theirs = later.facts_used / later.prompts_made
    facts = f"{float(kept):.1f} (earlier loop {theirs:.1f})"
    about = {"data": file.name, "facts per prompt": facts}
    timed("phase 2, tiny generator", ways, about | sizes(source.collator(batches[0])))
