"""Writes docs/question.schema.json, the JSON Schema of a line of questions, from the reader's type.

    python scripts/question_schema.py

`tests/data/test_question_schema.py` fails when the file and the reader differ.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from dragkit.data.question_row import Row

FILE = Path(__file__).resolve().parents[1] / "docs" / "question.schema.json"


def schema() -> dict[str, object]:
    """The JSON Schema of one line."""
    (row,), definitions = msgspec.json.schema_components([Row])
    body = definitions.pop(row["$ref"].rpartition("/")[2])
    body |= {
        "title": "A question with its graph",
        "description": "One line of a file of questions. Other keys are not read.",
    }
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **body}


def text() -> str:
    """The content of the file."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
