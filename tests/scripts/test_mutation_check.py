"""The list of planted faults fits the tree, and the page says which were caught."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "mutation_check", ROOT / "scripts" / "mutation_check.py"
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_fault_can_be_planted_and_names_tests_that_exist(script: ModuleType) -> None:
    faults = script.read_faults()
    assert len(faults) >= 40 and len({fault.name for fault in faults}) == len(faults)
    for fault in faults:
        planted = fault.planted(ROOT)
        assert planted != (ROOT / fault.file).read_text(encoding="utf-8"), fault.name
        ast.parse(planted)
        for test in fault.tests:
            path, _, name = test.partition("::")
            assert f"def {name}" in (ROOT / path).read_text(encoding="utf-8"), fault.name


def test_a_text_that_is_not_there_once_is_refused(script: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old, count in (("x = 1", 2), ("y", 0)):
        with pytest.raises(ValueError, match=f"{count} times"):
            script.Fault("n", "a.py", old, "z", []).planted(tmp_path)


def test_the_page_counts_and_names(script: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("F\nFAILED tests/ops/test_rows.py::test_sums[a-1] - AssertionError\n")
    fault = script.Fault("a fault", "dragkit/a.py", "x", "y", [])
    page = script.table([(fault, script.first_failure(log)), (fault, "")])
    assert "**1 of 2 caught**" in page
    assert "| a fault | `dragkit/a.py` | `test_rows.py::test_sums` |" in page
    assert page.count("**not caught**") == 1
