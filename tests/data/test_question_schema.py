"""The JSON Schema of a line says what the reader accepts."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dragkit.data.question_row import Fault, Row, decode_row
from tests.documents import read

ROOT = Path(__file__).resolve().parents[2]
TYPES = {"string": str, "integer": int, "array": list, "object": dict, "null": type(None)}
KEYWORDS = {
    *("type", "properties", "items", "prefixItems", "minItems", "maxItems", "anyOf", "required"),
    *("default", "description", "title", "$schema"),
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("schema", ROOT / "scripts/question_schema.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def schema() -> dict:
    return json.loads(read(ROOT / "docs" / "question.schema.json"))


def is_valid(value: object, schema: dict | bool) -> bool:
    """A validator of the keywords that the schema uses."""
    if isinstance(schema, bool):
        return schema
    assert set(schema) <= KEYWORDS
    kind = schema.get("type")
    if kind and (not isinstance(value, TYPES[kind]) or isinstance(value, bool)):
        return False
    if "anyOf" in schema and not any(is_valid(value, option) for option in schema["anyOf"]):
        return False
    if isinstance(value, dict):
        return set(schema.get("required", ())) <= set(value) and all(
            is_valid(value[key], inner)
            for key, inner in schema.get("properties", {}).items()
            if key in value
        )
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        return (
            schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
            and all(map(is_valid, value, first))
            and all(is_valid(item, schema.get("items", True)) for item in value[len(first) :])
        )
    return True


def test_the_file_is_up_to_date(script: ModuleType) -> None:
    written = read(ROOT / "docs" / "question.schema.json")
    assert written == script.text(), "run python scripts/question_schema.py"


def test_the_table_names_every_key(script: ModuleType) -> None:
    assert set(script.descriptions()) == set(Row.__struct_fields__)


TEXT = st.sampled_from(["a", "", "null"])
TRIPLE = st.lists(TEXT, min_size=3, max_size=3)
WRONG = st.sampled_from([None, True, 5, 1.5, "a", [], ["a"], [None], [5], {}, [["a", "b"]], [[]]])
TRIPLES = st.lists(st.one_of(TRIPLE, st.lists(TEXT, max_size=4)), max_size=2)
VALUES = {
    "question": TEXT,
    "triples": st.one_of(st.lists(TRIPLE, max_size=2), TRIPLES),
    "paths": st.lists(st.one_of(st.lists(TEXT, max_size=3), st.lists(TRIPLE, max_size=2))),
    "answer": st.one_of(TEXT, st.lists(TEXT, max_size=2)),
    "answers": st.one_of(TEXT, st.lists(TEXT, max_size=2)),
    "topic_entities": st.one_of(TEXT, st.lists(TEXT, max_size=2)),
    "id": st.one_of(TEXT, st.integers(-9, 2**70)),
    "evidence": TRIPLES,
    "relation_paths": st.lists(st.lists(TEXT, max_size=2), max_size=2),
    "group": st.one_of(TEXT, st.integers(0, 9)),
    "other": WRONG,
}


@st.composite
def rows(draw: st.DrawFn) -> dict:
    """Rows of which about half are usable: at most one value is of any type."""
    keys = draw(st.sets(st.sampled_from(sorted(VALUES)))) | {"question", "triples"}
    row = {key: draw(VALUES[key]) for key in sorted(keys)}
    if draw(st.booleans()):
        row[draw(st.sampled_from(sorted(VALUES)))] = draw(WRONG)
    if draw(st.integers(0, 9)) == 0:
        row.pop(draw(st.sampled_from(["question", "triples"])))
    return row


@settings(max_examples=400, deadline=None)
@given(row=rows())
def test_the_schema_accepts_what_the_reader_accepts(row: dict, schema: dict) -> None:
    decoded = decode_row(json.dumps(row).encode())
    assert is_valid(row, schema) == (not isinstance(decoded, Fault)), decoded


@pytest.mark.parametrize("name", ["sample.jsonl"])
def test_real_rows_are_valid(name: str, kgqa_data: Path, schema: dict) -> None:
    lines = (kgqa_data / name).read_text(encoding="utf-8").splitlines()
    assert lines and all(is_valid(json.loads(line), schema) for line in lines)
