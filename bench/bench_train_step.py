"""Questions per second of whole training steps: ours, the earlier loops, and packed eager PyG.

A step is everything up to the update of the weights. Ours starts from the packed store, packed PyG
from PyG graphs in memory, and the earlier loops from raw lines. The comparisons with packed PyG run
on a GPU where there is one, both sides in the trainer's mixed precision. Those with the earlier
loops run on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import pytest
import torch

from bench.data import LARGE, SMALL, bench_config, question_file, text_encoder
from bench.earlier_contenders import EarlierJointLoop, EarlierRetriever, EarlierRetrieverLoop
from bench.measure import CPU, DEVICE, Contender, Tally, check_agreement
from bench.step_contenders import PackedPyGStep, StepSetup
from dragkit.config import TrainConfig
from dragkit.observe.flops import FORMULA, ActiveWeights, active_weights
from dragkit.trainer.build import build_joint

# Packed PyG takes many seconds a step on graphs of 2,000 facts.
pytestmark = pytest.mark.timeout(1800)
_FULL = pytest.mark.full


@pytest.fixture
def set_up(cache_dir: Path, tmp_path: Path) -> Callable[..., StepSetup]:
    """`set_up(config, name, batch=..., ...)` makes a `StepSetup` on the questions of a set."""

    def make(config: TrainConfig, name: str, **options: object) -> StepSetup:
        file = question_file(name, cache_dir)
        return StepSetup.make(config, file, cache_dir, tmp_path, **options)

    return make


@pytest.fixture
def compiled(request: pytest.FixtureRequest) -> bool:
    """Whether compiled contenders run."""
    return bool(request.config.getoption("--bench-compiled"))


@pytest.mark.parametrize(
    "facts,batch,calls,instructions",
    [("50", 16, 4, 2), pytest.param("2000", 16, 1, 3, marks=_FULL)],
)
def test_phase1_against_packed_pyg(
    facts: str,
    batch: int,
    calls: int,
    instructions: int,
    compiled: bool,
    set_up: Callable[..., StepSetup],
    timed: Callable[..., None],
) -> None:
    """Goals: 1.8 times the questions/s of eager PyG at 50 facts, 10 times at 2,000.

    K is ReaRev's published value for WebQSP (2) and, on the large graphs, for CWQ (3).
    """
    name = SMALL if facts == "50" else LARGE
    config = bench_config(1, retriever__num_instructions=instructions)
    setup = set_up(config, name, batch=batch, calls=calls, device=DEVICE)
    if name == LARGE and setup.file.name != LARGE:
        pytest.skip(f"{LARGE} was not found, and the bundled graphs are small")
    contenders = [setup.ours(), *setup.variants(compiled=compiled)]
    for words, per_fact in (("once", False), ("per fact", True)):
        peer = PackedPyGStep(setup, per_fact=per_fact)
        contenders.append(peer.checked(setup, f"eager PyG, relations projected {words}"))
    title = f"phase 1, {facts}-fact graphs, packed PyG"
    timed(setup.comparison(title, K=instructions), contenders, DEVICE)


@pytest.mark.parametrize("facts,batch", [("50", 16), ("2000", 4)])
def test_phase1_against_compiled_pyg(
    facts: str,
    batch: int,
    compiled: bool,
    set_up: Callable[..., StepSetup],
    timed: Callable[..., None],
) -> None:
    """A compiler without the collapsed layer. Runs only with --bench-compiled."""
    if not compiled:
        pytest.skip("compilation takes minutes; ask for it with --bench-compiled")
    name = SMALL if facts == "50" else LARGE
    setup = set_up(bench_config(1), name, batch=batch, device=DEVICE)
    peer = PackedPyGStep(setup, per_fact=False, compiled=True)
    contenders = [setup.ours(), peer.checked(setup, "compiled PyG, relations projected once")]
    title = f"phase 1, {facts}-fact graphs, compiled PyG"
    timed(setup.comparison(title), contenders, DEVICE)


Loop = TypeVar("Loop", EarlierRetrieverLoop, EarlierJointLoop)


def _earlier(make: Callable[[], Loop], raw: list[list[dict]]) -> tuple[list[Contender], Loop]:
    """The earlier loop with an empty and a full cache of texts. Returns the second loop as well."""
    first, later = make(), make()
    stream, cached_stream = cycle(raw), cycle(raw[:2])
    # Two batches fill the cache with all texts that the later epoch uses.
    for questions in raw[:2]:
        later.step(questions)

    def first_epoch() -> None:
        first.retriever.cache.clear()
        first.step(next(stream))

    def later_epoch() -> None:
        later.step(next(cached_stream))

    contenders = [
        Contender("earlier loop, first epoch", first_epoch, tally=first.tally),
        Contender("earlier loop, all texts in its cache", later_epoch, tally=later.tally),
    ]
    return contenders, later


@pytest.mark.parametrize("instructions,stages", [pytest.param(2, 2, marks=_FULL), (1, 1)])
def test_phase1_against_earlier_loop(
    instructions: int,
    stages: int,
    compiled: bool,
    set_up: Callable[..., StepSetup],
    timed: Callable[..., None],
) -> None:
    """Goal: 40 times the earlier loop, which encodes the relations of every question.

    The earlier model has one instruction and three layers in all. K = 1, T = 1 has the same depth.
    """
    config = bench_config(1, retriever__num_instructions=instructions, retriever__num_stages=stages)
    setup = set_up(config, SMALL, batch=16, calls=4)
    earlier, _ = _earlier(lambda: EarlierRetrieverLoop(EarlierRetriever()), setup.raw_batches())
    contenders = [setup.ours(), *setup.variants(compiled=compiled), *earlier]
    title = f"phase 1, 50-fact graphs, earlier loop, K={instructions} T={stages}"
    timed(setup.comparison(title, K=instructions, T=stages), contenders)


def _check_joint(setup: StepSetup, loop: EarlierJointLoop) -> None:
    """One prompt with the same facts and vectors has the same loss in both loops.

    Raises:
        ValueError: the losses differ.
    """
    trainer, row = setup.trainer, setup.batches[0][0]
    joint = trainer.phase.model
    batch = trainer.train_set.collator([row])
    stored = trainer.train_set.store.question(row)
    # Our prompt names the answers that are in the graph first.
    answers = sorted(stored.answers, key=lambda answer: answer not in stored.entities)
    question = setup.raw_batches()[0][0] | {
        "triples": stored.triples,
        "answer": answers[: joint.config.generator.max_answers],
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
    """The formula of model FLOPs and its weights, for the tables."""
    return {
        "model FLOPs of a step": FORMULA,
        "N_blocks": f"{weights.blocks:,}",
        "N_head": f"{weights.head:,}",
        "N_lora": f"{weights.lora:,}",
    }


def test_phase2_rates(
    set_up: Callable[..., StepSetup], timed: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    """Our joint step alone: tokens/s, MFU and energy, on a GPU or with --bench-generator."""
    generator = request.config.getoption("--bench-generator")
    if generator is None and DEVICE.type != "cuda":
        pytest.skip("a CPU's rates are in the comparison with the earlier loop")
    generator = generator or "tiny"
    # The activations of a large generator are large, so it takes four prompts at a time.
    microbatch = {} if generator == "tiny" else {"generator__generator_microbatch": 4}
    config = bench_config(2, generator__model=generator, run__device=DEVICE.type, **microbatch)
    setup = set_up(config, SMALL, batch=16, calls=4, device=DEVICE)
    weights = active_weights(setup.trainer.phase.model.generator.model)
    title = f"phase 2, rates, generator {Path(generator).name}"
    comparison = setup.comparison(title, **_flops(weights))
    timed(comparison, [setup.ours(Tally(weights=weights))], DEVICE)


def test_phase2_against_earlier_loop(
    cache_dir: Path, set_up: Callable[..., StepSetup], timed: Callable[..., None]
) -> None:
    """Goal: 8 times the earlier joint loop with the same tiny generator and facts per prompt."""
    config = bench_config(2)
    setup = set_up(config, SMALL, batch=16)
    trainer = setup.trainer
    joint = trainer.phase.model
    weights = active_weights(joint.generator.model)

    def loop() -> EarlierJointLoop:
        return EarlierJointLoop(
            EarlierRetriever(),
            build_joint(config, text_encoder(cache_dir), CPU).model.generator,
            k_facts=config.sampler.k_facts,
            max_answers=config.generator.max_answers,
            projector_dim=joint.projector.hidden.out_features,
            tally=Tally(weights=weights),
        )

    _check_joint(setup, loop())
    earlier, later = _earlier(loop, setup.raw_batches())
    (output,) = trainer.train_step([trainer.train_set.collator(setup.batches[0])])
    per_prompt = later.num_facts / later.num_prompts
    facts = f"{float(output.parts['facts_kept']):.1f} (earlier loop {per_prompt:.1f})"
    contenders = [setup.ours(Tally(weights=weights)), *earlier]
    about = {"facts per prompt": facts} | _flops(weights)
    timed(setup.comparison("phase 2, tiny generator", **about), contenders)
