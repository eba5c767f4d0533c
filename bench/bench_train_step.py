"""Questions per second of whole training steps: ours, the earlier loops, and packed eager PyG.

A step is everything from the packed store (ours), PyG graphs in memory (packed PyG) or raw lines
(the earlier loops) to the update of the weights. The comparisons with packed PyG run on a GPU where
there is one, both sides in the trainer's mixed precision; those with the earlier loops on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from bench.baselines import EarlierRetrieverLoop
from bench.data import (
    LARGE,
    SMALL,
    bench_config,
    question_file,
    question_source,
    sizes,
    text_encoder,
    whole_batches,
)
from bench.earlier_joint import EarlierJointLoop
from bench.measure import Tally, Way, check_agreement
from bench.tables import Comparison
from bench.train_ways import (
    CPU,
    DEVICE,
    OurStep,
    PackedPyGStep,
    compiled_ways,
    phase1_trainer,
    raw_batches,
    replayed_way,
)
from dragkit.observe.flops import FORMULA, ActiveWeights, active_weights
from dragkit.trainer.build import build_joint
from dragkit.trainer.loop import Trainer

# Packed PyG takes many seconds a step on graphs of 2,000 facts.
pytestmark = pytest.mark.timeout(1800)
_BATCHES = 8
# On a CPU with --bench-full only.
_FULL = pytest.mark.full


@pytest.mark.parametrize(
    "facts,batch,steps,instructions",
    [("50", 16, 4, 2), pytest.param("2000", 16, 1, 3, marks=_FULL)],
)
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
    trainer = phase1_trainer(config, source, cache_dir, tmp_path, DEVICE)
    others = {
        "eager PyG, relations projected once": PackedPyGStep(trainer, batches, per_fact=False),
        "eager PyG, relations projected per fact": PackedPyGStep(trainer, batches, per_fact=True),
    }
    for name, way in others.items():
        way.check(trainer, batches[0], name)
    ours = Way("dragkit", OurStep(trainer, batches), batch, steps)
    ways = [ours, *replayed_way(trainer, batches, batch, steps)]
    ways += compiled_ways(trainer, batches, batch, steps, request)
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
    trainer = phase1_trainer(config, source, cache_dir, tmp_path, DEVICE)
    other = PackedPyGStep(trainer, batches, per_fact=False, compiled=True)
    other.check(trainer, batches[0], "compiled PyG")
    ways = [
        Way("dragkit", OurStep(trainer, batches), batch),
        Way("compiled PyG, relations projected once", other, batch),
    ]
    about = {"data": file.name} | sizes(source.collator(batches[0]))
    timed(f"phase 1, {facts}-fact graphs, compiled PyG", ways, about)


@pytest.mark.parametrize("instructions,stages", [pytest.param(2, 2, marks=_FULL), (1, 1)])
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
    trainer = phase1_trainer(config, source, cache_dir, tmp_path)
    raw = raw_batches(source, batches)
    first, later = EarlierRetrieverLoop(), EarlierRetrieverLoop()
    first_stream, later_stream = cycle(raw), cycle(raw[:2])

    def first_epoch() -> None:
        first.model.forget()
        first.step(next(first_stream))

    for questions in raw[:2]:
        later.step(questions)
    ways = [
        Way("dragkit", OurStep(trainer, batches), batch, 4),
        *compiled_ways(trainer, batches, batch, 4, request),
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


def _flops(weights: ActiveWeights) -> dict[str, object]:
    """The formula of model FLOPs and what goes into it, for the tables."""
    return {
        "model FLOPs of a step": FORMULA,
        "N_blocks": f"{weights.blocks:,}",
        "N_head": f"{weights.head:,}",
        "N_lora": f"{weights.lora:,}",
    }


def test_phase2_rates(
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Our joint step alone: tokens/s, MFU and energy, on a GPU or with a generator of one's own."""
    name, batch = request.config.getoption("--bench-generator"), 16
    if name is None and DEVICE.type != "cuda":
        pytest.skip("a CPU's rates are in the comparison with the earlier loop")
    generator = name or "tiny"
    # Four prompts of a large generator at a time, as its activations are not small.
    some = {} if generator == "tiny" else {"generator__generator_microbatch": 4}
    config = bench_config(2, generator__model=generator, run__device=DEVICE.type, **some)
    phase = build_joint(config, text_encoder(cache_dir), DEVICE)
    file = question_file(SMALL, cache_dir)
    source = question_source(file, config, cache_dir, phase.model.generator, batch)
    batches = whole_batches(source, batch, _BATCHES)
    trainer = Trainer(config, phase, source, None, tmp_path, DEVICE)
    tally = Tally(weights=active_weights(phase.model.generator.model))
    ways = [Way("dragkit", OurStep(trainer, batches, tally), batch, 4, tally)]
    about = {"data": file.name} | sizes(source.collator(batches[0])) | _flops(tally.weights)
    timed(f"phase 2, rates, generator {Path(generator).name}", ways, about, DEVICE)


def test_phase2_against_earlier_loop(
    timed: Callable[..., Comparison], cache_dir: Path, tmp_path: Path
) -> None:
    """Goal: 8 times the earlier joint loop with the same tiny generator and facts per prompt."""
    batch = 16
    file = question_file(SMALL, cache_dir)
    config = bench_config(2)
    phase = build_joint(config, text_encoder(cache_dir), CPU)
    source = question_source(file, config, cache_dir, phase.model.generator, batch)
    batches = whole_batches(source, batch, _BATCHES)
    trainer = Trainer(config, phase, source, None, tmp_path, CPU)
    raw = raw_batches(source, batches)

    def earlier() -> EarlierJointLoop:
        generator = build_joint(config, text_encoder(cache_dir), CPU).model.generator
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
    weights = active_weights(phase.model.generator.model)
    tally = Tally(weights=weights)
    first.tally.weights = later.tally.weights = weights

    def later_epoch() -> None:
        later.step(next(later_stream))

    ways = [
        Way("dragkit", OurStep(trainer, batches, tally), batch, 1, tally),
        Way("earlier loop, first epoch", first_epoch, batch, 1, first.tally),
        Way("earlier loop, all texts in its cache", later_epoch, batch, 1, later.tally),
    ]
    kept = trainer.train_step([source.collator(batches[0])])[0].parts["facts_kept"]
    theirs = later.facts_used / later.prompts_made
    facts = f"{float(kept):.1f} (earlier loop {theirs:.1f})"
    about = {"data": file.name, "facts per prompt": facts} | _flops(weights)
    timed("phase 2, tiny generator", ways, about | sizes(source.collator(batches[0])), CPU)
