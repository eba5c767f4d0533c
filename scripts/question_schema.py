"""Writes docs/question.schema.json, the JSON Schema of a line of questions.

Types come from the reader, and descriptions from the table in docs/data-format.md.

    python scripts/question_schema.py

`tests/data/test_question_schema.py` fails when the file and the reader differ.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec

from dragkit.data.question_row import Row

DOCS = Path(__file__).resolve().parents[1] / "docs"
FILE = DOCS / "question.schema.json"


def descriptions() -> dict[str, str]:
    """What the table of the format says of each key."""
    page = (DOCS / "data-format.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`\w+`.*?) \| (?:yes|no|for .*?) \| (.*) \|$", page, re.MULTILINE)
    return {
        key: told.replace("`", "") for keys, told in rows for key in re.findall(r"`(\w+)`", keys)
    }


def schema() -> dict[str, object]:
    """The JSON Schema of one line."""
    (row,), definitions = msgspec.json.schema_components([Row])
    body = definitions.pop(row["$ref"].rpartition("/")[2])
    for key, told in descriptions().items():
        body["properties"][key]["description"] = told
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
