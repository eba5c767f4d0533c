"""What a run chooses on a card, and what it says where it does not fit."""

from __future__ import annotations

import re

import pytest
import torch

from dragkit.config import TrainConfig, resolve_config
from dragkit.config.arguments import parse_train_args
from dragkit.errors import ConfigError
from dragkit.generator.nemotron_h import ACTIVATION_CHECKPOINTING
from dragkit.generator.random_weights import random_config
from dragkit.memory_plan import choice as budget
from dragkit.memory_plan import memory
from dragkit.memory_plan.choice import (
    DEVICES,
    MAX_DECODE_BATCH,
    SATURATING_TOKENS,
    Device,
    MemoryPlan,
    apply_memory_plan,
    make_plan,
)
from dragkit.memory_plan.dims import dims_of
from dragkit.trainer import build, run
from dragkit.trainer import question_dataset as source

PUBLIC = "random:nemotron-3-nano-30b-a3b"
DIMS = dims_of(random_config(PUBLIC))
GIB = 2**30


def config(preset: str = "b200", **values: object) -> TrainConfig:
    return resolve_config(preset, None, {k.replace("__", "."): v for k, v in values.items()})[0]


def card(gib: float) -> Device:
    return Device("a card", int(gib * GIB), 1e15, 4e12)


def plan_on(gib: float, *presets: str, ranks: int = 1, **values: object) -> MemoryPlan:
    return make_plan(config(*presets, **values), DIMS, card(gib), ranks)


def test_every_preset_for_a_large_card_fits_its_card() -> None:
    for name in ("h200", "b200"):
        plan = make_plan(config(name), DIMS, DEVICES[name.upper()])
        assert plan.fits and plan.peak <= plan.device.memory
        assert plan.tokens >= config(name).generator.max_prompt_tokens


@pytest.mark.parametrize("policy", list(ACTIVATION_CHECKPOINTING))
@pytest.mark.parametrize("gib", [80, 141])
def test_the_most_tokens_fit_and_one_step_more_does_not(policy: str, gib: int) -> None:
    def peak(tokens: int) -> int:
        return plan_on(
            gib,
            generator__activation_checkpointing=policy,
            generator__max_tokens_per_microbatch=tokens,
        ).peak

    most = plan_on(gib).fit[policy]
    assert most > 0 and most % budget.TOKEN_MULTIPLE == 0
    assert peak(most) <= gib * GIB < peak(most + budget.TOKEN_MULTIPLE)


def test_blocks_are_computed_again_only_where_room_is_short() -> None:
    policies, tokens = [], []
    for gib in range(75, 180, 3):
        plan = plan_on(gib)
        policies.append(list(ACTIVATION_CHECKPOINTING).index(plan.policy))
        tokens.append(plan.tokens)
        if plan.fits:
            assert plan.peak <= gib * GIB
    assert policies == sorted(policies, reverse=True) and set(policies) == {0, 1, 2}
    assert max(tokens) == SATURATING_TOKENS


def test_settings_take_the_place_of_choices() -> None:
    settings = config(
        generator__activation_checkpointing="all", generator__max_tokens_per_microbatch=5000
    )
    plan = make_plan(settings, DIMS, DEVICES["H200"])
    assert (plan.policy, plan.tokens, plan.fits) == ("all", 5000, True)
    found = apply_memory_plan(settings, DIMS, DEVICES["H200"]).generator
    assert (found.activation_checkpointing, found.max_tokens_per_microbatch) == ("all", 5000)
    small = config("h200", generator__max_prompt_tokens=1000)
    assert make_plan(small, DIMS, DEVICES["H200"]).tokens == 1024  # one question has no more


def test_adapters_cost_what_they_are() -> None:
    frozen, usual = plan_on(140, generator__freeze_lm=True), plan_on(140)
    name = "adapters, gradients, moments"
    assert frozen.components[name] == 0
    # Attention, in_proj and shared experts at rank 16: 11.4 million.
    assert usual.components[name] / memory.BYTES_PER_TRAINED_PARAM == pytest.approx(
        11.4e6, rel=0.01
    )
    assert usual.fit["none"] < frozen.fit["none"]


def test_as_many_questions_are_decoded_at_once_as_fit() -> None:
    counts = []
    for gib in (60, 65, 66, 67, 68, 69, 80, 141):
        plan = plan_on(gib, generator__max_tokens_per_microbatch=256)
        counts.append(plan.questions)
        taken = sum(plan.validation.values())
        if plan.questions > 1:
            assert taken <= gib * GIB
        if plan.questions < MAX_DECODE_BATCH:
            # One more, with its facts: 200 bytes each, 10,000 of them where nothing is known.
            one, two = (
                sum(memory.decode_bytes(DIMS, plan.questions + n, 4032, 64, 4032).values())
                for n in (0, 1)
            )
            assert taken + two - one + 200 * 10_000 > gib * GIB
    assert counts == sorted(counts) and counts[0] == 1 and counts[-1] == MAX_DECODE_BATCH
    assert len(set(counts)) > 3


def test_the_peak_is_that_of_training_or_of_validation() -> None:
    usual = plan_on(140, "h200")
    assert usual.peak == sum(usual.components.values()) > sum(usual.validation.values())
    small = {"generator__max_tokens_per_microbatch": 256, "generator__max_prompt_tokens": 256}
    plan = plan_on(140, "h200", **small)
    assert plan.peak == sum(plan.validation.values()) > sum(plan.components.values())


def test_answers_that_cannot_be_decoded_are_refused() -> None:
    long = config(run__val_max_new_tokens=20_000_000)
    plan = make_plan(long, DIMS, DEVICES["H200"])
    assert not plan.fits and plan.questions == 1
    with pytest.raises(ConfigError, match="decoding 1 questions at once"):
        apply_memory_plan(long, DIMS, DEVICES["H200"])


def test_a_batch_of_evaluation_is_what_the_plan_says(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, generator = config("h200", generator__model=PUBLIC), object()
    gpu = torch.device("cuda")
    monkeypatch.setattr(source, "local_card", lambda device: card(67))
    found = source.evaluation_batch_size(settings, generator, gpu)
    assert found == make_plan(settings, DIMS, card(67)).questions < MAX_DECODE_BATCH
    assert source.evaluation_batch_size(settings, None, gpu) == MAX_DECODE_BATCH
    monkeypatch.setattr(source, "generator_dims", lambda generator, name: None)
    assert source.evaluation_batch_size(settings, generator, gpu) == MAX_DECODE_BATCH
    assert source.evaluation_batch_size(settings, generator, torch.device("cpu")) == 128


@pytest.mark.parametrize(
    ("gib", "values"),
    [
        (67, {}),
        (72, {"generator__activation_checkpointing": "none"}),
        (
            80,
            {
                "generator__activation_checkpointing": "none",
                "generator__max_tokens_per_microbatch": 20_000,
            },
        ),
        (140, {"generator__max_tokens_per_microbatch": 200_000}),
    ],
)
def test_what_is_offered_instead_fits(gib: int, values: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="does not fit") as raised:
        apply_memory_plan(config(**values), DIMS, card(gib))
    message = str(raised.value)
    offers = [line for line in message.splitlines() if line.startswith("  ")]
    assert len(offers) == 3, message
    given = [
        part
        for key, value in values.items()
        for part in ("--set", f"{key.replace('__', '.')}={value}")
    ]
    for line in offers:
        if line.startswith("  --set"):
            argv = ["--preset", "b200", *given, *line.split()]
            assert make_plan(parse_train_args(argv).config, DIMS, card(gib)).fits, line
        elif "another card" in line:
            other = DEVICES[line.rsplit(" ", 1)[1]]
            assert make_plan(config(**values), DIMS, other).fits


def test_weights_that_do_not_fit_leave_other_cards_and_parts() -> None:
    with pytest.raises(ConfigError) as raised:
        apply_memory_plan(config(), DIMS, card(40))
    message = str(raised.value)
    assert "--set" not in message and "another card: H200" in message
    found = list(budget.alternatives(config(), DIMS, card(24)))
    (part,) = (line for line in found if "layers=" in line)
    count = int(re.search(r"layers=(\d+)", part)[1])
    for layers, fits in ((count, True), (count + 1, False)):
        dims = dims_of(random_config(f"{PUBLIC}:layers={layers}"))
        assert make_plan(config(), dims, card(24)).fits is fits


def test_ranks_share_out_the_weights_only_where_asked_to() -> None:
    whole, full = plan_on(80), {"run__generator_fsdp": True}
    assert plan_on(80, ranks=4).components == plan_on(80, **full).components == whole.components
    cut = plan_on(80, ranks=4, **full)
    assert cut.components["frozen weights"] == whole.components["frozen weights"] // 4
    # Embeddings and output layer, and three times the experts of a block, in half precision.
    more = 2 * (2 * 131072 * 2688 + 3 * 128 * 2 * 1856 * 2688)
    name = "frozen weights of others, gathered"
    assert cut.components[name] == pytest.approx(more, rel=0.03)
    assert cut.fit["none"] > whole.fit["none"]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_ranks_that_need_not_hold_all_weights_are_told_so(ranks: int) -> None:
    found = list(budget.alternatives(config(), DIMS, card(60 if ranks > 1 else 40), ranks))
    (offer,) = (line for line in found if "run.generator_fsdp=true" in line)
    full = {"run__generator_fsdp": True}
    if ranks > 1:
        assert offer == found[0] == "--set run.generator_fsdp=true"
        assert plan_on(60, ranks=ranks, **full).fits
    else:
        count = int(offer.split()[0])
        assert plan_on(40, ranks=count, **full).fits
        assert not plan_on(40, ranks=count // 2, **full).fits


def test_a_run_on_a_gpu_takes_the_plans_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "local_card", lambda device: DEVICES["H200"])
    settings = config("h200", generator__model=PUBLIC)
    found = build.with_memory_plan(settings, torch.device("cuda")).generator
    assert (found.activation_checkpointing, found.max_tokens_per_microbatch) == ("none", 4096)
    monkeypatch.setattr(build, "local_card", lambda device: card(50))
    with pytest.raises(ConfigError, match="a card has 50 GiB"):
        build.with_memory_plan(settings, torch.device("cuda"))
    assert build.with_memory_plan(settings, torch.device("cpu")) is settings


@pytest.mark.parametrize(
    ("gpu", "error", "said"),
    [(card(50), ConfigError, "does not fit"), (DEVICES["H200"], LookupError, "went on")],
)
def test_a_run_is_refused_before_anything_is_looked_for(
    gpu: Device, error: type, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*args: object, **kwargs: object) -> None:
        raise LookupError("the run went on")

    monkeypatch.setattr(run, "setup_process", lambda config, ranks: torch.device("cuda"))
    monkeypatch.setattr(build, "local_card", lambda device: gpu)
    for later in ("check_generator", "data_paths", "TextEncoder"):
        monkeypatch.setattr(run, later, look)
    settings, origins = resolve_config("h200", None, {"run.phase": 2, "data.heuristics_path": "x"})
    with pytest.raises(error, match=said):
        run.TrainingRun(settings, origins, settings)
