"""Writes the table of families into docs/generators-and-lora.md from tiny random models.

    PYTHONPATH=.:kernels python scripts/family_table.py

Each family of `tests/generator/families.py` is built, given default adapters, and checked as at
load. `tests/generator/test_families.py` tests the families and fails when the table differs.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from peft import PeftModel
from transformers.utils.logging import set_verbosity_error

from dragkit.config import GeneratorConfig
from dragkit.errors import MissingInputError
from dragkit.generator.conformance import check_conformance
from dragkit.generator.generator import Generator
from dragkit.generator.lora.adapters import add_adapters, lora_targets
from tests.generator.families import FAMILIES, REFUSED, Tokens, family_model

PAGE = Path(__file__).resolve().parents[1] / "docs" / "generators-and-lora.md"
BEGIN, END = "<!-- families -->\n", "<!-- end of families -->\n"
_HEAD = (
    "| family | prompts | decoding | default adapters | adapters load with |\n"
    "| --- | --- | --- | --- | --- |\n"
)


def served_row(family: str, generator: Generator) -> str:
    """The row of a family whose generator, with new default adapters, has been checked."""
    with tempfile.TemporaryDirectory() as folder:
        generator.save_adapters(Path(folder))
        try:
            PeftModel.from_pretrained(family_model(family), folder)
            reader = "PEFT"
        # PEFT fuses these targets with those of the routed experts, and refuses half a pair.
        except ValueError:
            reader = "`load_adapter`"
    targets = ", ".join(f"`{name}`" for name in lora_targets(family_model(family), None))
    prompts = "packed" if generator.is_packed else "padded"
    decoding = "one by one" if generator.causal_lm.decodes_alone else "in batches"
    return f"| {family} | {prompts} | {decoding} | {targets} | {reader} |\n"


def refused_row(family: str) -> str:
    """The row of a family that is refused, with the reason.

    Raises:
        AssertionError: it is not refused.
    """
    try:
        check_conformance(Generator(family_model(family), Tokens()), family)
    except MissingInputError as error:
        reason = str(error).partition("cannot be used: ")[2].split(": ")[0]
        return f"| {family} | refused: {reason} | | | |\n"
    raise AssertionError(f"{family} is not refused")


def table() -> str:
    """The whole table."""
    rows = []
    for family in FAMILIES:
        model = add_adapters(family_model(family), GeneratorConfig(lora_rank=2))
        generator = Generator(model, Tokens())
        check_conformance(generator, family)
        rows.append(served_row(family, generator))
    return _HEAD + "".join(rows) + "".join(refused_row(family) for family in REFUSED)


def main() -> None:
    """Replaces the table of the page."""
    set_verbosity_error()
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(before + BEGIN + table() + END + after)


if __name__ == "__main__":
    main()
