"""The page on entity linking shows what the linker finds."""

from __future__ import annotations

import runpy
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "linking_table.py"


def test_the_page_shows_the_figures(kgqa_data: Path) -> None:
    names = runpy.run_path(str(SCRIPT))
    assert names["PAGE"].read_text(encoding="utf-8") == names["page"](kgqa_data)
