"""Questions per second of whole training steps: ours, the earlier loops, and packed eager PyG.

A step is everything from the packed store (ours), PyG graphs in memory (packed PyG) or raw lines
(the earlier loops) to the update of the weights. The comparisons with packed PyG run on a GPU where
there is one, both sides in the trainer's mixed precision. Those with the earlier loops run on the
CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch

from bench.data import LARGE, SMALL, bench_config, question_file, text_encoder
from bench.earlier_contenders import EarlierJointLoop, EarlierRetriever, EarlierRetrieverLoop
from bench.measure import CPU, DEVICE, Contender, Tally, check_agreement
from bench.results import Comparison
from bench.step_contenders import PackedPyGStep, Setup, set_up
from dragkit.observe.flops import FORMULA, ActiveWeights, active_weights
from dragkit.trainer.build import build_joint

# Packed PyG takes many seconds a step on graphs of 2,000 facts.
pytestmark = pytest.mark.timeout(1800)
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
    setup = set_up(config, file, cache_dir, tmp_path, batch=batch, calls=steps, device=DEVICE)
    contenders = [
        setup.ours(),
        *setup.variants(compiled=bool(request.config.getoption("--bench-compiled"))),
        PackedPyGStep(setup, per_fact=False).checked(setup, "eager PyG, relations projected once"),
        PackedPyGStep(setup, per_fact=True).checked(
            setup, "eager PyG, relations projected per fact"
        ),
    ]
    about = setup.about() | {"K": instructions}
    title = f"phase 1, {facts}-fact graphs, packed PyG"
    timed(Comparison(title, about, [], questions=batch), contenders, DEVICE)


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
    setup = set_up(bench_config(1), file, cache_dir, tmp_path, batch=batch, device=DEVICE)
    other = PackedPyGStep(setup, per_fact=False, compiled=True)
    contenders = [setup.ours(), other.checked(setup, "compiled PyG, relations projected once")]
    title = f"phase 1, {facts}-fact graphs, compiled PyG"
    timed(Comparison(title, setup.about(), [], questions=batch), contenders, DEVICE)


def _earlier(
    make: Callable[[], EarlierRetrieverLoop | EarlierJointLoop],
    raw: list[list[dict]],
    weights: ActiveWeights | None = None,
) -> tuple[list[Contender], EarlierRetrieverLoop | EarlierJointLoop]:
    """The earlier loop with empty caches and with all texts cached, and the latter loop."""
    first, later = make(), make()
    every, few = cycle(raw), cycle(raw[:2])
    for questions in raw[:2]:
        later.step(questions)

    def first_epoch() -> None:
        first.retriever.forget()
        first.step(next(every))

    tallies = [None, None]
    if weights is not None:
        tallies = [first.tally, later.tally]
        first.tally.weights = later.tally.weights = weights
    contenders = [
        Contender("earlier loop, first epoch", first_epoch, tally=tallies[0]),
        Contender(
            "earlier loop, all texts in its cache", lambda: later.step(next(few)), tally=tallies[1]
        ),
    ]
    return contenders, later


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

    The earlier model has one instruction and three layers in all. K = 1, T = 1 has the same depth.
    """
    batch, file = 16, question_file(SMALL, cache_dir)
    config = bench_config(1, retriever__num_instructions=instructions, retriever__num_stages=stages)
    setup = set_up(config, file, cache_dir, tmp_path, batch=batch, calls=4)
    earlier, _ = _earlier(lambda: EarlierRetrieverLoop(EarlierRetriever()), setup.raw_batches())
    compiled = bool(request.config.getoption("--bench-compiled"))
    contenders = [setup.ours(), *setup.variants(compiled=compiled), *earlier]
    about = setup.about() | {"K": instructions, "T": stages}
    title = f"phase 1, 50-fact graphs, earlier loop, K={instructions} T={stages}"
    timed(Comparison(title, about, [], questions=batch), contenders)


def _check_joint(setup: Setup, loop: EarlierJointLoop) -> None:
    """One prompt, same facts and vectors, no padding: the two losses are the same number."""
    trainer, row = setup.trainer, setup.batches[0][0]
    joint = trainer.phase.model
    batch = trainer.train_set.collator([row])
    stored = trainer.train_set.store.question(row)
    known = sorted(stored.answers, key=lambda answer: answer not in stored.entities)
    question = setup.raw_batches()[0][0] | {
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
    """Our joint step alone: tokens/s, MFU and energy, on a GPU or with --bench-generator."""
    name, batch = request.config.getoption("--bench-generator"), 16
    if name is None and DEVICE.type != "cuda":
        pytest.skip("a CPU's rates are in the comparison with the earlier loop")
    generator = name or "tiny"
    # Four prompts of a large generator at a time, because its activations are large.
    some = {} if generator == "tiny" else {"generator__generator_microbatch": 4}
    config = bench_config(2, generator__model=generator, run__device=DEVICE.type, **some)
    file = question_file(SMALL, cache_dir)
    setup = set_up(config, file, cache_dir, tmp_path, batch=batch, calls=4, device=DEVICE)
    weights = active_weights(setup.trainer.phase.model.generator.model)
    about = setup.about() | _flops(weights)
    title = f"phase 2, rates, generator {Path(generator).name}"
    contenders = [setup.ours(Tally(weights=weights))]
    timed(Comparison(title, about, [], questions=batch), contenders, DEVICE)


def test_phase2_against_earlier_loop(
    timed: Callable[..., Comparison], cache_dir: Path, tmp_path: Path
) -> None:
    """Goal: 8 times the earlier joint loop with the same tiny generator and facts per prompt."""
    batch, file, config = 16, question_file(SMALL, cache_dir), bench_config(2)
    setup = set_up(config, file, cache_dir, tmp_path, batch=batch)
    trainer = setup.trainer
    joint = trainer.phase.model
    weights = active_weights(joint.generator.model)

    def loop() -> EarlierJointLoop:
        return EarlierJointLoop(
            EarlierRetriever(),
            build_joint(config, text_encoder(cache_dir), CPU).model.generator,
            k_facts=config.sampler.k_facts,
            max_answers=config.generator.max_answers,
            hidden=joint.projector.hidden.out_features,
        )

    _check_joint(setup, loop())
    earlier, later = _earlier(loop, setup.raw_batches(), weights)
    contenders = [setup.ours(Tally(weights=weights)), *earlier]
    (done,) = trainer.train_step([trainer.train_set.collator(setup.batches[0])])
    used = later.facts_used / later.prompts_made
    facts = f"{float(done.parts['facts_kept']):.1f} (earlier loop {used:.1f})"
    about = setup.about() | {"facts per prompt": facts} | _flops(weights)
    timed(Comparison("phase 2, tiny generator", about, [], questions=batch), contenders)
