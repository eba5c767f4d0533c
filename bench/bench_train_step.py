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

import pytest
import torch

from bench.data import LARGE, SMALL, BenchFile, bench_config, question_file, text_encoder
from bench.earlier_contenders import EarlierJointLoop, EarlierRetriever, EarlierRetrieverLoop
from bench.measure import CPU, DEVICE, Contender, Tally, check_agreement
from bench.results import Comparison
from bench.step_contenders import PackedPyGStep, StepSetup
from dragkit.config import TrainConfig
from dragkit.observe.flops import FORMULA, ActiveWeights, active_weights
from dragkit.trainer.build import build_joint

# Packed PyG takes many seconds a step on graphs of 2,000 facts.
pytestmark = pytest.mark.timeout(1800)
_FULL = pytest.mark.full


class Steps:
    """Sets up trainers and times their steps."""

    def __init__(
        self,
        timed: Callable[..., Comparison],
        cache_dir: Path,
        run_dir: Path,
        options: pytest.Config,
    ) -> None:
        self.timed, self.cache_dir, self.run_dir = timed, cache_dir, run_dir
        self.generator = options.getoption("--bench-generator")
        self.compiled = bool(options.getoption("--bench-compiled"))

    def file(self, name: str) -> BenchFile:
        """The questions of a published set, or of the demo."""
        return question_file(name, self.cache_dir)

    def set_up(self, config: TrainConfig, file: BenchFile, **options: object) -> StepSetup:
        """See `StepSetup.make`."""
        return StepSetup.make(config, file, self.cache_dir, self.run_dir, **options)

    def time(
        self,
        title: str,
        setup: StepSetup,
        contenders: list[Contender],
        about: dict[str, object] | None = None,
    ) -> None:
        """Times the contenders on the trainer's device."""
        comparison = Comparison(title, setup.about() | (about or {}), [])
        comparison.questions = len(setup.batches[0])
        self.timed(comparison, contenders, setup.trainer.device)


@pytest.fixture
def steps(
    timed: Callable[..., Comparison],
    cache_dir: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> Steps:
    """`Steps` with the options of this run."""
    return Steps(timed, cache_dir, tmp_path, request.config)


@pytest.mark.parametrize(
    "facts,batch,calls,instructions",
    [("50", 16, 4, 2), pytest.param("2000", 16, 1, 3, marks=_FULL)],
)
def test_phase1_against_packed_pyg(
    facts: str, batch: int, calls: int, instructions: int, steps: Steps
) -> None:
    """Goals: 1.8 times the questions/s of eager PyG at 50 facts, 10 times at 2,000.

    K is ReaRev's published value for WebQSP (2) and, on the large graphs, for CWQ (3).
    """
    file = steps.file(SMALL if facts == "50" else LARGE)
    if facts != "50" and file.name != LARGE:
        pytest.skip(f"{LARGE} was not found, and the bundled graphs are small")
    config = bench_config(1, retriever__num_instructions=instructions)
    setup = steps.set_up(config, file, batch=batch, calls=calls, device=DEVICE)
    contenders = [setup.ours(), *setup.variants(compiled=steps.compiled)]
    for words, per_fact in (("once", False), ("per fact", True)):
        peer = PackedPyGStep(setup, per_fact=per_fact)
        contenders.append(peer.checked(setup, f"eager PyG, relations projected {words}"))
    title = f"phase 1, {facts}-fact graphs, packed PyG"
    steps.time(title, setup, contenders, {"K": instructions})


@pytest.mark.parametrize("facts,batch", [("50", 16), ("2000", 4)])
def test_phase1_against_compiled_pyg(facts: str, batch: int, steps: Steps) -> None:
    """How far a compiler gets without the collapsed layer. Runs only with --bench-compiled."""
    if not steps.compiled:
        pytest.skip("compilation takes minutes; ask for it with --bench-compiled")
    file = steps.file(SMALL if facts == "50" else LARGE)
    setup = steps.set_up(bench_config(1), file, batch=batch, device=DEVICE)
    peer = PackedPyGStep(setup, per_fact=False, compiled=True)
    contenders = [setup.ours(), peer.checked(setup, "compiled PyG, relations projected once")]
    steps.time(f"phase 1, {facts}-fact graphs, compiled PyG", setup, contenders)


def _earlier(
    make: Callable[[], EarlierRetrieverLoop | EarlierJointLoop],
    raw: list[list[dict]],
    weights: ActiveWeights | None = None,
) -> tuple[list[Contender], EarlierRetrieverLoop | EarlierJointLoop]:
    """The earlier loop without and with all texts in its cache, and the loop with them."""
    first, later = make(), make()
    stream, cached_stream = cycle(raw), cycle(raw[:2])
    for questions in raw[:2]:
        later.step(questions)

    def first_epoch() -> None:
        first.retriever.cache.clear()
        first.step(next(stream))

    tallies = [None, None]
    if weights is not None:
        tallies = [first.tally, later.tally]
        first.tally.weights = later.tally.weights = weights
    contenders = [
        Contender("earlier loop, first epoch", first_epoch, tally=tallies[0]),
        Contender(
            "earlier loop, all texts in its cache",
            lambda: later.step(next(cached_stream)),
            tally=tallies[1],
        ),
    ]
    return contenders, later


@pytest.mark.parametrize("instructions,stages", [pytest.param(2, 2, marks=_FULL), (1, 1)])
def test_phase1_against_earlier_loop(instructions: int, stages: int, steps: Steps) -> None:
    """Goal: 40 times the earlier loop, which encodes the relations of every question.

    The earlier model has one instruction and three layers in all. K = 1, T = 1 has the same depth.
    """
    config = bench_config(1, retriever__num_instructions=instructions, retriever__num_stages=stages)
    setup = steps.set_up(config, steps.file(SMALL), batch=16, calls=4)
    earlier, _ = _earlier(lambda: EarlierRetrieverLoop(EarlierRetriever()), setup.raw_batches())
    contenders = [setup.ours(), *setup.variants(compiled=steps.compiled), *earlier]
    title = f"phase 1, 50-fact graphs, earlier loop, K={instructions} T={stages}"
    steps.time(title, setup, contenders, {"K": instructions, "T": stages})


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


def test_phase2_rates(steps: Steps) -> None:
    """Our joint step alone: tokens/s, MFU and energy, on a GPU or with --bench-generator."""
    if steps.generator is None and DEVICE.type != "cuda":
        pytest.skip("a CPU's rates are in the comparison with the earlier loop")
    generator = steps.generator or "tiny"
    # Four prompts of a large generator at a time, because its activations are large.
    some = {} if generator == "tiny" else {"generator__generator_microbatch": 4}
    config = bench_config(2, generator__model=generator, run__device=DEVICE.type, **some)
    setup = steps.set_up(config, steps.file(SMALL), batch=16, calls=4, device=DEVICE)
    weights = active_weights(setup.trainer.phase.model.generator.model)
    title = f"phase 2, rates, generator {Path(generator).name}"
    steps.time(title, setup, [setup.ours(Tally(weights=weights))], _flops(weights))


def test_phase2_against_earlier_loop(steps: Steps) -> None:
    """Goal: 8 times the earlier joint loop with the same tiny generator and facts per prompt."""
    config = bench_config(2)
    setup = steps.set_up(config, steps.file(SMALL), batch=16)
    trainer = setup.trainer
    joint = trainer.phase.model
    weights = active_weights(joint.generator.model)

    def loop() -> EarlierJointLoop:
        return EarlierJointLoop(
            EarlierRetriever(),
            build_joint(config, text_encoder(steps.cache_dir), CPU).model.generator,
            k_facts=config.sampler.k_facts,
            max_answers=config.generator.max_answers,
            projector_dim=joint.projector.hidden.out_features,
        )

    _check_joint(setup, loop())
    earlier, later = _earlier(loop, setup.raw_batches(), weights)
    (output,) = trainer.train_step([trainer.train_set.collator(setup.batches[0])])
    per_prompt = later.num_facts / later.num_prompts
    facts = f"{float(output.parts['facts_kept']):.1f} (earlier loop {per_prompt:.1f})"
    contenders = [setup.ours(Tally(weights=weights)), *earlier]
    about = {"facts per prompt": facts} | _flops(weights)
    steps.time("phase 2, tiny generator", setup, contenders, about)
