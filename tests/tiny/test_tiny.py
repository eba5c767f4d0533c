"""The bundled generator loads like any causal LM, copies new names, and can be trained again."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronHForCausalLM,
    PreTrainedTokenizerFast,
)

from dragkit.errors import MissingInputError
from dragkit.generator.bundled import tiny_generator_path
from dragkit.tiny.batches import IGNORE_INDEX
from dragkit.tiny.measure import exact_match
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import QUESTION_TYPES, draw_sample
from dragkit.tiny.tokenizer import SPECIAL, whole_pieces
from dragkit.tiny.warmup import main, tensors_digest, warm_up
from tests.tiny.shipped import FOLDER, shipped

pytestmark = pytest.mark.usefixtures("one_thread")

UGLY = [
    "Curaçao",
    "’s-Hertogenbosch",
    "São Tomé and Príncipe",
    "日本語 と 한국어",
    "😀 family 👨‍👩‍👧",
    "m.0abc12",
    "g.1yl5_q",
    "ns:people.person.place_of_birth",
    "  two leading spaces, one trailing ",
    " Answer",
    "\nAnswer:",
    "tab\there, line\n\nbreak",
    "\u00a0no-break\u2009thin",
    "don't , won 't . ca n't",
    "\x00\x7f",
    "",
    " ",
]


def test_folder_is_small_and_loads_by_the_auto_classes() -> None:
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) <= 2 * 1024**2
    model, _ = shipped()
    assert isinstance(model, NemotronHForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.isfinite(p).all() for p in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == SPECIAL[:3]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert len(tokenizer) == model.config.vocab_size
    config = model.config
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, 1, 2)
    assert config.chunk_size == 32


def test_a_missing_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "generator" / "bundled.py"
    monkeypatch.setattr("dragkit.generator.bundled.__file__", str(path))
    with pytest.raises(MissingInputError, match=r"lacks config.json, model.safetensors, tok"):
        tiny_generator_path()


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    pieces = whole_pieces(shipped()[1].tokenizer)
    assert len(pieces) > 700
    for text in (*UGLY, *pieces[::50]):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert all(index >= len(SPECIAL) for index in ids)


def test_a_name_has_the_same_tokens_as_head_in_a_question_and_in_an_answer() -> None:
    _, writer = shipped()
    for name in ("Zarbin Kolstu", "O'Neill", "1987", "Île-de-France"):
        ids = writer.encode(name)
        assert writer.encode(f"{name}, capital, X\n")[: len(ids)] == ids
        assert writer.encode(f"of {name}?")[-len(ids) - 1 : -1] == ids
        # The target starts with a space, which is a separate token.
        assert writer.encode(writer.template.target([name]))[1:] == ids


def test_generation_with_a_cache_gives_the_greedy_answer() -> None:
    model, writer = shipped()
    rng = random.Random(5)
    sample = draw_sample("forward", NameSource(rng, words_only=True), rng, 4)
    row = writer.prompt(sample, "marked")
    target = [label for label in row.labels if label != IGNORE_INDEX]
    prompt = torch.tensor([row.ids[: -len(target)]])
    made = model.generate(prompt, do_sample=False, max_new_tokens=len(target) + 3)[0]
    made = made[prompt.shape[1] :].tolist()
    ids = prompt
    while ids.shape[1] < prompt.shape[1] + len(made):
        with torch.no_grad():
            best = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    assert made == ids[0, prompt.shape[1] :].tolist()
    assert made[-1] == writer.eos


def test_right_markers_raise_exact_match_about_unseen_names_at_ten_facts() -> None:
    model, writer = shipped()
    counts = dict(zip(QUESTION_TYPES, (18, 10, 16, 10, 10), strict=True))
    assert sum(counts.values()) == 64

    def share(slots: str) -> float:
        cells = [
            count
            * exact_match(model, writer, question_type, 10, slots, num_questions=count, seed=20_261)
            for question_type, count in counts.items()
        ]
        return sum(cells) / 64

    marked, plain = share("marked"), share("none")
    assert marked >= 0.85
    assert plain < marked - 0.2
    misled = exact_match(
        model, writer, "forward", 10, "marked", marker_accuracy=0.0, num_questions=32
    )
    assert misled < 0.2


def test_provenance_matches_the_weights() -> None:
    record = json.loads((FOLDER / "provenance.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m dragkit.tiny.warmup --out")
    assert {"seed", "steps", "date", "versions", "training_tokens", "training_s"} <= set(record)
    assert {"python", "torch", "transformers", "tokenizers"} <= set(record["versions"])
    model, _ = shipped()
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert record["model_sha256"] == hashlib.sha256(weights).hexdigest()
    table = record["exact_match"]["table"]
    assert set(table) == {
        f"{question_type}@{count}" for question_type in QUESTION_TYPES for count in (2, 5, 10, 15)
    }
    assert all(0 <= cell <= 1 for row in table.values() for cell in row.values())


def test_three_training_steps_are_bitwise_reproducible(tmp_path: Path) -> None:
    records = [warm_up(tmp_path / name, 0, 3, 0) for name in ("one", "two")]
    assert records[0]["float32_sha256"] == records[1]["float32_sha256"]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert tensors_digest(made) != tensors_digest(shipped()[0])
    assert set(made.state_dict()) == set(shipped()[0].state_dict())


def test_the_command_line_reports_a_bad_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below")
    assert main(["--out", out, "--steps", "1", "--questions", "0"]) == 74
    assert "Change --out." in capsys.readouterr().err


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, dragkit.tiny; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
