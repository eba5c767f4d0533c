"""The synthetic questions: their number, their facts, and that these are real ones."""

from __future__ import annotations

import json
from pathlib import Path

from bench.synthetic_questions import write_questions
from dragkit.data.question_file import read_questions


def test_synthetic_questions_have_distinct_real_facts(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"q{number}",
            "question": f"question {number}?",
            "topic_entities": [f"e{number}"],
            "answer": [f'answer "{number}"'],
            "paths": [],
            "triples": [[f"e{number}", "r", f"é{fact % 15}"] for fact in range(20)],
        }
        for number in range(5)
    ]
    source, target = tmp_path / "real.jsonl", tmp_path / "synthetic.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    total = write_questions(source, target, questions=12, facts=25)
    made = read_questions(target).questions
    assert len(made) == 12 and len({question.id for question in made}) == 12
    assert total == sum(len(question.triples) for question in made)
    real = {tuple(fact) for row in rows for fact in row["triples"]}
    by_text = {row["question"]: row for row in rows}
    for question in made:
        assert 15 <= len(question.triples) <= 25
        assert set(question.triples) <= real
        assert list(question.answers) == by_text[question.text]["answer"]
        assert {tuple(fact) for fact in by_text[question.text]["triples"]} <= set(question.triples)
