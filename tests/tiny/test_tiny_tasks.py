"""Training data of the bundled generator: samples, prompt rows and the curriculum."""

from __future__ import annotations

import random

import pytest
import torch

from dragkit.tiny.batches import IGNORE_INDEX, collate, induction_row
from dragkit.tiny.curriculum import QUESTION_FACTS, STAGES, Curriculum
from dragkit.tiny.measure import answer_logits
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import (
    HEAD,
    IRRELEVANT,
    QUESTION_TYPES,
    TAIL,
    draw_drill,
    draw_sample,
    noisy_markers,
    without_clue,
)
from dragkit.tiny.tokenizer import SPECIAL
from dragkit.tiny.warmup import lr_multiplier
from dragkit.tiny.words import PARTICIPLES
from tests.tiny.shipped import shipped

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("question_type", QUESTION_TYPES)
@pytest.mark.parametrize("num_facts", [2, 3, 10])
def test_markers_and_answers_agree_in_prompt_order(question_type: str, num_facts: int) -> None:
    rng = random.Random(f"{question_type}{num_facts}")
    names = NameSource(rng, pieces=(" x", "é", "1"), listed=("Côte d'Ivoire",))
    for _ in range(30):
        sample = draw_sample(question_type, names, rng, num_facts)
        assert len(sample.facts) == len(sample.markers) == num_facts
        ends = [
            fact[2] if marker == TAIL else fact[0]
            for fact, marker in zip(sample.facts, sample.markers, strict=True)
            if marker in (TAIL, HEAD)
        ]
        assert sample.answers == tuple(dict.fromkeys(ends))
        assert len(ends) == 1 or question_type.endswith("_list")
        assert all(name.strip() == name and "\n" not in name for name in sample.answers)
        wanted = HEAD if question_type.startswith("inverse") else TAIL
        assert question_type == "two_hop" or set(sample.markers) <= {wanted, IRRELEVANT}
        hidden = without_clue(sample, names, rng)
        assert (hidden.facts, hidden.answers) == (sample.facts, sample.answers)


def asked(relation: str) -> str:
    """How a question words a relation: a participle in full, a noun without its domain."""
    return relation if relation in PARTICIPLES else relation.split()[-1]


def test_only_the_gold_facts_answer_a_plain_question() -> None:
    rng = random.Random(3)
    names = NameSource(rng, words_only=True)
    for _ in range(200):
        sample = draw_sample("forward", names, rng, 10)
        (gold,) = (f for f, m in zip(sample.facts, sample.markers, strict=True) if m == TAIL)
        rivals = [f for f in sample.facts if (f[0], asked(f[1])) == (gold[0], asked(gold[1]))]
        assert rivals == [gold]
        assert gold[0] in sample.question


def test_draw_sample_rejects_unknown_types_and_too_few_facts() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="sideways"):
        draw_sample("sideways", NameSource(rng), rng, 5)
    with pytest.raises(ValueError, match="num_facts 1"):
        draw_sample("forward", NameSource(rng), rng, 1)


def test_noise_keeps_the_given_fraction_of_markers() -> None:
    rng = random.Random(0)
    drawn = [draw_drill(rng, 8) for _ in range(500)]
    kept = [
        shown == marker
        for sample in drawn
        for shown, marker in zip(noisy_markers(sample, rng, 0.93), sample.markers, strict=True)
    ]
    assert abs(sum(kept) / len(kept) - 0.93) < 0.015


@pytest.mark.parametrize("slots", ["marked", "neutral", "empty", "none"])
def test_prompt_rows_follow_the_layout_of_phase_two(slots: str) -> None:
    _, writer = shipped()
    rng = random.Random(1)
    sample = draw_sample("forward_list", NameSource(rng), rng, 3)
    row, t = writer.prompt(sample, slots), writer.template
    parts = [[1], writer.encode(t.prefix(sample.question))]
    for fact, marker in zip(sample.facts, sample.markers, strict=True):
        token = SPECIAL.index(marker if slots == "marked" else "<slot>")
        parts += [[] if slots == "none" else [token], writer.encode(t.fact(*fact))]
    target = [*writer.encode(t.target(sample.answers)), 2]
    parts += [writer.encode(t.cue), target]
    assert row.ids == [index for part in parts for index in part]
    assert row.labels == [IGNORE_INDEX] * (len(row.ids) - len(target)) + target
    batch = collate([row, writer.drill(draw_drill(rng, 2))])
    is_slot, scale = batch.is_slot[: len(row.ids)], batch.scale[: len(row.ids)]
    assert is_slot.nonzero().squeeze(1).tolist() == row.slots
    assert len(row.slots) == (0 if slots == "none" else 3)
    assert (scale[is_slot] == (0.0 if slots == "empty" else 1.0)).all()
    assert (scale[~is_slot] == 1.0).all()
    assert batch.is_slot.sum() == len(row.slots) + 2


def test_a_pack_of_rows_gives_the_logits_of_each_row_alone() -> None:
    model, writer = shipped()
    rng = random.Random(2)
    names = NameSource(rng)
    rows = [writer.prompt(draw_sample("forward", names, rng, k), "marked") for k in (2, 9)]
    with torch.no_grad():
        together, _ = answer_logits(model, collate(rows))
        alone = []
        for row in rows:
            logits = model(torch.tensor([row.ids]), use_cache=False).logits[0, :-1]
            alone.append(logits[torch.tensor(row.labels[1:]) != IGNORE_INDEX])
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-3)


def test_copy_rows_supervise_only_predictable_tokens() -> None:
    row = induction_row(random.Random(0), range(8, 1024), 6, 7)
    assert len(row.ids) == 6 * 8
    known = [i for i, label in enumerate(row.labels) if label != IGNORE_INDEX]
    assert min(known) > 6
    for i in known:
        assert row.labels[i] == row.ids[i]
        pairs = list(zip(row.ids[:6], row.ids[1:6], strict=False))
        assert (row.ids[i - 1], row.ids[i]) in pairs


def test_curriculum_goes_through_its_stages_by_accuracy_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dragkit.tiny.curriculum.ROWS_PER_STEP", 2)
    _, writer = shipped()
    curriculum = Curriculum(writer, NameSource(random.Random(0)), range(8, 1024))
    seen = []
    for _ in range(600):
        rows = curriculum.draw()
        assert all(any(label != IGNORE_INDEX for label in row.labels) for row in rows)
        seen.append((curriculum.stage, curriculum.num_facts))
        curriculum.observe(1.0)
    assert list(dict.fromkeys(stage for stage, _ in seen)) == list(STAGES)
    assert max(count for _, count in seen) == seen[-1][1] == QUESTION_FACTS[1]
    stuck = Curriculum(writer, NameSource(random.Random(0)), range(8, 1024))
    for _ in range(20):
        stuck.draw()
        stuck.observe(0.0)
    assert stuck.stage == STAGES[0]


def test_learning_rate_rises_then_stays_then_falls() -> None:
    rates = [lr_multiplier(step, 1000) for step in range(1, 1001)]
    assert rates[0] == 0.02 and rates[49:600] == [1.0] * 551
    assert rates[-1] == 0.02 and rates[800] == pytest.approx(0.4975)
