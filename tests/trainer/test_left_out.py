"""Facts without room in a prompt: they alone are left out, and they are counted as left out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dragkit import load_run
from dragkit.data.packed import TokenPack
from dragkit.eval import parse_answers
from tests.trainer.joint_cases import make, make_batch, relation_states
from tests.trainer.run_cases import FIXTURE, make_run

LIMIT = {"max_prompt_tokens": 200, "max_new_tokens": 20}


def lengthened(facts: TokenPack, fact: int) -> TokenPack:
    """The rows, of which one has 300 tokens."""
    rows = [facts.ids[a:b] for a, b in zip(facts.ptr, facts.ptr[1:], strict=False)]
    rows[fact] = torch.full((300,), 50, dtype=torch.int32)
    lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
    return TokenPack(torch.cat(rows), lengths.cumsum(0, dtype=torch.int32), 300)


def test_a_fact_longer_than_the_prompt_is_left_out_alone() -> None:
    phase = make(generator=LIMIT, sampler={"prob_threshold": 0.0})
    phase.model.eval()
    batch, relations = make_batch(phase.model.generator), relation_states()
    plain = phase.predict(batch, relations)
    best = int(batch.graph.fact_ptr[1]) + plain[1].selected[0]
    cut = phase.predict(replace(batch, facts=lengthened(batch.facts, best)), relations)
    assert [p.num_left_out for p in plain] == [0, 0, 0, 0]
    assert [p.num_left_out for p in cut] == [0, 1, 0, 0]
    assert cut[1].selected == plain[1].selected[1:] and len(cut[1].selected) == 3
    assert [p.ranked for p in cut] == [p.ranked for p in plain]
    assert [p for i, p in enumerate(cut) if i != 1] == [p for i, p in enumerate(plain) if i != 1]
    # Without a prompt nothing is left out of it.
    unread = phase.predict(batch, relations, generate=False)
    assert [p.num_left_out for p in unread] == [0, 0, 0, 0]


def test_a_training_step_tells_what_it_left_out() -> None:
    phase = make(generator=LIMIT, sampler={"k_facts": 9})
    batch, relations = make_batch(phase.model.generator), relation_states()
    longer = batch.facts
    for fact in (0, int(batch.graph.fact_ptr[1]) - 1):
        longer = lengthened(longer, fact)
    num_drawn = 0
    for step in range(3):
        draft = phase.step.draw_and_prompt(batch, relations, step)
        index = draft.selection.index
        drawn = (index == 0) | (index == int(batch.graph.fact_ptr[1]) - 1)
        num_drawn += int(drawn.sum())
        for facts, left_out in ((batch.facts, 0 * drawn), (longer, drawn)):
            this = replace(batch, facts=facts)
            parts = phase.training_step(this, relations, phase.counts([this]), step).parts
            assert float(parts["facts_left_out"]) == pytest.approx(float(left_out.sum() / 4))
            assert float(parts["prompts_cut"]) == pytest.approx(float(left_out.any() / 4))
    assert num_drawn


def test_a_run_tells_how_many_facts_it_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [json.loads(line) for line in FIXTURE.read_text("utf-8").splitlines()]
    long = [["Norvia", "land.notes", "word " * 900], ["word " * 950, "land.seat", "Norvia"]]
    rows[2]["triples"] += long
    rows[5]["triples"] += long[:1]
    data = tmp_path / "long.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {"optim.epochs": 1, "sampler.prob_threshold": 0.0, "data.heuristics_path": str(data)}
    with caplog.at_level(logging.WARNING):
        make_run(tmp_path, 2, **options).execute()
    assert "long.jsonl: 3 facts in 2 questions, such as" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = load_run(tmp_path / "run", device="cpu").evaluate(data)
    counts = result.report.counts
    assert (counts["facts_left_out"], counts["prompts_cut"]) == (3, 2)
    assert "3 facts found no room in the prompts of 2 of 8 questions" in caplog.text
    for i, prediction in enumerate(result.predictions):
        assert prediction["facts_left_out"] == {2: 2, 5: 1}.get(i, 0)
        assert not any("word word" in "".join(fact["triple"]) for fact in prediction["facts"])
        assert prediction["scores"]["facts-selected"] == len(prediction["facts"])
        assert prediction["parsed"] == parse_answers(prediction["text"])
