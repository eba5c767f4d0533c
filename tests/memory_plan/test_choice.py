"""The choices of the memory plan on a card, and its offers if a run does not fit."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from dragkit.config import TrainConfig, resolve_config
from dragkit.config.arguments import parse_train_args
from dragkit.errors import ConfigError
from dragkit.generator.nemotron_h import ACTIVATION_CHECKPOINTING
from dragkit.generator.random_weights import random_config
from dragkit.memory_plan import choice, memory
from dragkit.memory_plan.choice import (
    MAX_DECODE_BATCH,
    SATURATING_TOKENS,
    MemoryPlan,
    apply_memory_plan,
    make_plan,
)
from dragkit.memory_plan.dims import dims_of
from dragkit.observe.gpu import CARDS, CardSpec
from dragkit.retriever.text_encoder import TokenStates
from dragkit.trainer import build, run
from dragkit.trainer import question_dataset as source

PUBLIC = "random:nemotron-3-nano-30b-a3b"
DIMS = dims_of(random_config(PUBLIC))
GIB = 2**30
POLICY, TOKENS = "generator__activation_checkpointing", "generator__max_tokens_per_microbatch"
FSDP = {"run__generator_fsdp": True}


def config(preset: str = "b200", **values: object) -> TrainConfig:
    return resolve_config(preset, None, {k.replace("__", "."): v for k, v in values.items()})[0]


def card(gib: float) -> CardSpec:
    return CardSpec("a card", memory_bytes=int(gib * GIB))


def plan_on(gib: float, *presets: str, ranks: int = 1, **values: object) -> MemoryPlan:
    return make_plan(config(*presets, **values), DIMS, card(gib), ranks)


def test_every_preset_for_a_large_card_fits_its_card() -> None:
    for name in ("h200", "b200"):
        plan = make_plan(config(name), DIMS, CARDS[name.upper()])
        assert plan.fits and plan.peak_bytes <= plan.card.memory_bytes
        assert plan.tokens >= config(name).generator.max_prompt_tokens


@pytest.mark.parametrize("policy", list(ACTIVATION_CHECKPOINTING))
@pytest.mark.parametrize("gib", [80, 141])
def test_the_most_tokens_fit_and_one_step_more_does_not(policy: str, gib: int) -> None:
    def peak(tokens: int) -> int:
        return plan_on(gib, **{POLICY: policy, TOKENS: tokens}).peak_bytes

    tokens_that_fit = plan_on(gib).fit[policy]
    assert tokens_that_fit > 0 and tokens_that_fit % choice.TOKEN_MULTIPLE == 0
    assert peak(tokens_that_fit) <= gib * GIB < peak(tokens_that_fit + choice.TOKEN_MULTIPLE)


def test_blocks_are_recomputed_only_if_memory_is_short() -> None:
    policies, tokens = [], []
    for gib in range(75, 180, 3):
        plan = plan_on(gib)
        policies.append(list(ACTIVATION_CHECKPOINTING).index(plan.policy))
        tokens.append(plan.tokens)
        if plan.fits:
            assert plan.peak_bytes <= gib * GIB
    assert policies == sorted(policies, reverse=True) and set(policies) == {0, 1, 2}
    assert max(tokens) == SATURATING_TOKENS
    # A larger batch does not enlarge the micro-batch.
    assert plan_on(178, optim__batch_size=8).tokens == SATURATING_TOKENS


def test_settings_override_choices() -> None:
    settings = config(**{POLICY: "all", TOKENS: 5000})
    plan = make_plan(settings, DIMS, CARDS["H200"])
    assert (plan.policy, plan.tokens, plan.fits) == ("all", 5000, True)
    chosen = apply_memory_plan(settings, DIMS, CARDS["H200"]).generator
    assert (chosen.activation_checkpointing, chosen.max_tokens_per_microbatch) == ("all", 5000)
    small = config("h200", generator__max_prompt_tokens=1000)
    assert make_plan(small, DIMS, CARDS["H200"]).tokens == 1024  # the longest prompt, padded


def test_adapters_cost_16_bytes_per_parameter() -> None:
    frozen, usual = plan_on(140, generator__freeze_lm=True), plan_on(140)
    name = "adapters, gradients, moments"
    assert frozen.training[name] == 0
    # Attention, in_proj and shared experts at rank 16: 11.4 million.
    assert usual.training[name] / memory.BYTES_PER_TRAINED_PARAM == pytest.approx(11.4e6, rel=0.01)
    assert usual.fit["none"] < frozen.fit["none"]


def test_the_decode_batch_is_the_largest_that_fits() -> None:
    counts = []
    for gib in (60, 65, 66, 67, 68, 69, 80, 141):
        plan = plan_on(gib, **{TOKENS: 256})
        counts.append(plan.decode_batch)
        taken = sum(plan.decoding.values())
        if plan.decode_batch > 1:
            assert taken <= gib * GIB
        if plan.decode_batch < MAX_DECODE_BATCH:
            # One more question with its assumed 10,000 facts of 200 bytes each.
            one, two = (
                sum(memory.decode_bytes(DIMS, plan.decode_batch + n, 4032, 64, 4032).values())
                for n in (0, 1)
            )
            assert taken + two - one + 200 * 10_000 > gib * GIB
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == MAX_DECODE_BATCH
    assert len(set(counts)) > 3


def test_the_peak_is_the_larger_of_training_and_validation() -> None:
    usual = plan_on(140, "h200")
    assert usual.peak_bytes == sum(usual.training.values()) > sum(usual.decoding.values())
    plan = plan_on(140, "h200", **{TOKENS: 256, "generator__max_prompt_tokens": 256})
    assert plan.peak_bytes == sum(plan.decoding.values()) > sum(plan.training.values())


def test_answers_that_are_too_long_to_decode_are_refused() -> None:
    long = config(run__val_max_new_tokens=20_000_000)
    plan = make_plan(long, DIMS, CARDS["H200"])
    assert not plan.fits and plan.decode_batch == 1
    with pytest.raises(ConfigError, match="decoding 1 questions at once"):
        apply_memory_plan(long, DIMS, CARDS["H200"])


def test_the_evaluation_batch_is_the_planned_decode_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, generator = config("h200", generator__model=PUBLIC), object()
    gpu = torch.device("cuda")
    monkeypatch.setattr(source, "local_card", lambda device: card(67))
    batch_size = source.evaluation_batch_size(settings, generator, gpu)
    assert batch_size == make_plan(settings, DIMS, card(67)).decode_batch < MAX_DECODE_BATCH
    assert source.evaluation_batch_size(settings, None, gpu) == MAX_DECODE_BATCH
    monkeypatch.setattr(source, "generator_dims", lambda generator, name: None)
    assert source.evaluation_batch_size(settings, generator, gpu) == MAX_DECODE_BATCH
    assert source.evaluation_batch_size(settings, generator, torch.device("cpu")) == 128


@pytest.mark.parametrize(
    ("gib", "values"),
    [
        (67, {}),
        (72, {POLICY: "none"}),
        (80, {POLICY: "none", TOKENS: 20_000}),
        (140, {TOKENS: 200_000}),
    ],
)
def test_offers_fit(gib: int, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="does not fit") as raised:
        apply_memory_plan(config(**values), DIMS, card(gib))
    message = str(raised.value)
    offers = [line for line in message.splitlines() if line.startswith("  ")]
    assert len(offers) == 3, message
    given = [f"--set={key.replace('__', '.')}={value}" for key, value in values.items()]
    for line in offers:
        if line.startswith("  --set"):
            argv = ["--preset", "b200", *given, *line.split()]
            assert make_plan(parse_train_args(argv).config, DIMS, card(gib)).fits, line
        elif "another card" in line:
            other = CARDS[line.rsplit(" ", 1)[1]]
            assert make_plan(config(**values), DIMS, other).fits


def test_weights_that_do_not_fit_leave_larger_cards_and_fewer_blocks() -> None:
    with pytest.raises(ConfigError) as raised:
        apply_memory_plan(config(), DIMS, card(40))
    message = str(raised.value)
    assert "--set" not in message and "another card: H200" in message
    offers = list(choice.alternatives(config(), DIMS, card(24)))
    (offer,) = (line for line in offers if "layers=" in line)
    count = int(re.search(r"layers=(\d+)", offer)[1])
    for layers, fits in ((count, True), (count + 1, False)):
        dims = dims_of(random_config(f"{PUBLIC}:layers={layers}"))
        assert make_plan(config(), dims, card(24)).fits is fits


def test_ranks_shard_the_weights_only_if_configured() -> None:
    replicated, sharded = plan_on(80), plan_on(80, ranks=4, **FSDP)
    assert plan_on(80, ranks=4).training == plan_on(80, **FSDP).training == replicated.training
    assert sharded.training["frozen weights"] == replicated.training["frozen weights"] // 4
    # Embeddings, LM head and three times the experts of a block, 2 bytes per value.
    gathered = 2 * (2 * 131072 * 2688 + 3 * 128 * 2 * 1856 * 2688)
    name = "all-gathered weights"
    assert sharded.training[name] == pytest.approx(gathered, rel=0.03)
    assert sharded.fit["none"] > replicated.fit["none"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_sharding_is_offered_if_it_fits(ranks: int) -> None:
    offers = list(choice.alternatives(config(), DIMS, card(60 if ranks > 1 else 40), ranks))
    (offer,) = (line for line in offers if "run.generator_fsdp=true" in line)
    if ranks > 1:
        assert offer == offers[0] == "--set run.generator_fsdp=true"
        assert plan_on(60, ranks=ranks, **FSDP).fits
    else:
        count = int(offer.split()[0])
        assert plan_on(40, ranks=count, **FSDP).fits
        assert not plan_on(40, ranks=count // 2, **FSDP).fits


def test_a_run_on_a_gpu_applies_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "local_card", lambda device: CARDS["H200"])
    settings = config("h200", generator__model=PUBLIC)
    chosen = build.with_memory_plan(settings, torch.device("cuda")).generator
    assert (chosen.activation_checkpointing, chosen.max_tokens_per_microbatch) == ("none", 4096)
    monkeypatch.setattr(build, "local_card", lambda device: card(50))
    with pytest.raises(ConfigError, match="a card has 50 GiB"):
        build.with_memory_plan(settings, torch.device("cuda"))
    assert build.with_memory_plan(settings, torch.device("cpu")) is settings


@pytest.mark.parametrize(
    ("gpu", "error", "message"),
    [(card(50), ConfigError, "does not fit"), (CARDS["H200"], LookupError, "went on")],
)
def test_a_run_is_refused_before_anything_is_loaded(
    gpu: CardSpec, error: type, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: object, **kwargs: object) -> None:
        raise LookupError("the run went on")

    monkeypatch.setattr(run, "setup_process", lambda config, ranks: torch.device("cuda"))
    monkeypatch.setattr(build, "local_card", lambda device: gpu)
    for later in ("check_generator", "RunInputs"):
        monkeypatch.setattr(run, later, look)
    settings, origins = resolve_config("h200", None, {"run.phase": 2, "data.heuristics_path": "x"})
    with pytest.raises(error, match=message):
        run.TrainingRun(settings, origins, settings)


def test_the_relation_table_is_that_of_a_data_set() -> None:
    """States of both texts of a relation are in float32, without padding."""
    tokens = 2 * choice._RELATION_TOKENS
    values = np.zeros((tokens, choice._TEXT_DIM), np.float16)
    ptr = np.array([0, 1, tokens])
    one = TokenStates(values, ptr, np.arange(2), np.zeros(2, bool)).relations()
    settings = config()
    facts = settings.optim.batch_size_in(2) * choice._FACTS_PER_QUESTION
    facts = min(facts, settings.data.max_facts_per_batch)
    table = plan_on(141).fixed["relation table and batch"] - choice.BYTES_PER_FACT * facts
    assert table == choice._RELATIONS * one.states.nbytes
