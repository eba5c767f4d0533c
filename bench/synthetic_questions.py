"""A file of questions of any size: their facts are drawn from those of a real set.

The questions are synthetic. Each one has the text, topics, answers and paths of a real question,
and facts of its graph and of two others. So names, relations and degrees are real.

    python -m bench.synthetic_questions OUT.jsonl --questions 27639 --facts 4250
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

from bench.data import LARGE, question_file, raw_questions

_GRAPHS = 3


def write_questions(
    source: Path, target: Path, *, questions: int, facts: int, seed: int = 0
) -> int:
    """Writes questions with at most `facts` distinct facts each, fewer where the real ones have.

    Args:
        source: a heuristics file.
        target: the file to write, plain JSONL.
        questions: number of questions.
        facts: facts of each question.
        seed: seed of the draws.

    Returns:
        The number of facts in the file.
    """
    draw = random.Random(seed)
    rows = raw_questions(source)
    graphs = [[json.dumps(fact, ensure_ascii=False) for fact in row["triples"]] for row in rows]
    kept = ("question", "topic_entities", "answer", "paths")
    heads = [
        json.dumps({key: row[key] for key in kept if key in row}, ensure_ascii=False)
        for row in rows
    ]
    total = 0
    with target.open("w", encoding="utf-8") as file:
        for number in range(questions):
            first = draw.randrange(len(rows))
            others = (draw.randrange(len(rows)) for _ in range(_GRAPHS - 1))
            own = dict.fromkeys(graphs[first])
            more = dict.fromkeys(fact for other in others for fact in graphs[other])
            drawn = [*own, *(fact for fact in more if fact not in own)][:facts]
            draw.shuffle(drawn)
            total += len(drawn)
            text = ", ".join(drawn)
            file.write(
                f'{{"id": "synthetic-{number}", {heads[first][1:-1]}, "triples": [{text}]}}\n'
            )
    return total


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", type=Path)
    parser.add_argument("--questions", type=int, default=27_639)
    parser.add_argument("--facts", type=int, default=4_250)
    parser.add_argument("--source", type=Path, help="a heuristics file instead of the real set")
    options = parser.parse_args()
    source = options.source or question_file(LARGE, options.target.parent).path
    total = write_questions(
        source, options.target, questions=options.questions, facts=options.facts
    )
    print(f"{options.questions} synthetic questions, {total} facts")


if __name__ == "__main__":
    main()
