"""The shipped generator: it loads like any causal LM, copies unseen names, can be made again."""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    NemotronHForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.models.nemotron_h import modeling_nemotron_h

from dragkit.errors import MissingInputError
from dragkit.tiny import tiny_generator_path
from dragkit.tiny.batches import IGNORED, PromptWriter, collate, induction_row
from dragkit.tiny.curriculum import QUESTION_FACTS, STAGES, Curriculum
from dragkit.tiny.measure import answer_logits, exact_match
from dragkit.tiny.names import NameSource
from dragkit.tiny.scan import chunk_scan, fast_scan
from dragkit.tiny.tasks import (
    HEAD,
    IRRELEVANT,
    KINDS,
    TAIL,
    draw_drill,
    draw_sample,
    noisy_markers,
    without_clue,
)
from dragkit.tiny.tokenizer import SPECIAL, whole_pieces
from dragkit.tiny.warmup import main, rate_at, tensors_digest, warm_up
from dragkit.tiny.words import PARTICIPLES

FOLDER = tiny_generator_path()
UGLY = [
    "Curaçao",
    "’s-Hertogenbosch",
    "São Tomé and Príncipe",
    "日本語 と 한국어",
    "😀 family 👨‍👩‍👧",
    "m.0abc12",
    "g.1yl5_q",
    "ns:people.person.place_of_birth",
    "  two spaces in front, one behind ",
    " Answer",
    "\nAnswer:",
    "tab\there, line\n\nbreak",
    "\u00a0no-break\u2009thin",
    "don't , won 't . ca n't",
    "\x00\x7f",
    "",
    " ",
]


@cache
def shipped() -> tuple[nn.Module, PromptWriter]:
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return model, PromptWriter(Tokenizer.from_file(str(FOLDER / "tokenizer.json")))


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
    monkeypatch.setattr("dragkit.tiny.__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(MissingInputError, match=r"lacks config.json, model.safetensors, tok"):
        tiny_generator_path()


@pytest.mark.parametrize("text", UGLY)
def test_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert all(index >= len(SPECIAL) for index in ids)


def test_a_name_has_the_same_tokens_as_head_in_a_question_and_in_an_answer() -> None:
    _, writer = shipped()
    for name in ("Zarbin Kolstu", "O'Neill", "1987", "Île-de-France"):
        own = writer.encode(name)
        assert writer.encode(f"{name}, capital, X\n")[: len(own)] == own
        assert writer.encode(f"of {name}?")[-len(own) - 1 : -1] == own
        # The target opens with a space of its own.
        assert writer.encode(writer.template.target([name]))[1:] == own


def test_generation_with_a_cache_gives_the_greedy_answer() -> None:
    model, writer = shipped()
    rng = random.Random(5)
    sample = draw_sample("forward", NameSource(rng, words_only=True), rng, 4)
    row = writer.prompt(sample, "marked")
    target = [label for label in row.labels if label != IGNORED]
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


def test_right_markers_let_it_answer_about_unseen_names_at_ten_facts() -> None:
    model, writer = shipped()
    counts = dict(zip(KINDS, (18, 10, 16, 10, 10), strict=True))
    assert sum(counts.values()) == 64

    def share(slots: str) -> float:
        cells = [
            count * exact_match(model, writer, kind, 10, slots, num_questions=count, seed=20_261)
            for kind, count in counts.items()
        ]
        return sum(cells) / 64

    marked, plain = share("marked"), share("none")
    assert marked >= 0.85
    assert plain < marked - 0.2


def test_wrong_markers_mislead_it() -> None:
    model, writer = shipped()
    settings = {"num_questions": 32, "seed": 7}
    assert exact_match(model, writer, "forward", 10, "marked", right=0.0, **settings) < 0.2


def test_provenance_says_how_it_was_made() -> None:
    record = json.loads((FOLDER / "provenance.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m dragkit.tiny.warmup --out")
    assert {"seed", "steps", "date", "versions", "training_tokens", "training_s"} <= set(record)
    assert {"python", "torch", "transformers", "tokenizers"} <= set(record["versions"])
    model, _ = shipped()
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert record["model_sha256"] == hashlib.sha256(weights).hexdigest()
    table = record["exact_match"]["table"]
    assert set(table) == {f"{kind}@{count}" for kind in KINDS for count in (2, 5, 10, 15)}
    assert all(0 <= cell <= 1 for row in table.values() for cell in row.values())


def test_three_steps_of_the_script_can_be_repeated_bit_by_bit(tmp_path: Path) -> None:
    records = [warm_up(tmp_path / name, 0, 3, 0) for name in ("one", "two")]
    assert records[0]["float32_sha256"] == records[1]["float32_sha256"]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    assert tensors_digest(made) != tensors_digest(shipped()[0])
    assert set(made.state_dict()) == set(shipped()[0].state_dict())


def test_the_command_line_reports_a_bad_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "file" / "below")
    assert main(["--out", out, "--steps", "1", "--questions", "0"]) == 74
    assert "choose another --out" in caplog.text


def scan_by_recurrence(x, dt, a, b, c, d, bias) -> Tensor:  # noqa: ANN001
    """The definition, one token at a time, in float64."""
    x, dt, a, b, c, d, bias = (t.double() for t in (x, dt, a, b, c, d, bias))
    dt = torch.nn.functional.softplus(dt + bias)
    state = torch.zeros(x.shape[0], x.shape[2], x.shape[3], b.shape[-1], dtype=torch.float64)
    rows = []
    for t in range(x.shape[1]):
        gain = dt[:, t, :, None, None] * x[:, t, :, :, None] * b[:, t, :, None, :]
        state = state * (a * dt[:, t]).exp()[..., None, None] + gain
        rows.append((state * c[:, t, :, None, :]).sum(-1) + d[:, None] * x[:, t])
    return torch.stack(rows, 1)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 31])
def test_fast_scan_equals_the_recurrence(length: int) -> None:
    g = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, 3, 4, generator=g, requires_grad=True)
    dt, bias, d = (torch.randn(s, generator=g) for s in ((2, length, 3), (3,), (3,)))
    b, c = (torch.randn(2, length, 1, 5, generator=g) for _ in "bc")
    a = -torch.tensor([0.01, 1.0, 30.0])
    got = chunk_scan(x, dt, a, b, c, 8, D=d, dt_bias=bias, dt_limit=(0.0, math.inf))
    want = scan_by_recurrence(x, dt, a, b, c, d, bias)
    torch.testing.assert_close(got, want.float(), rtol=1e-5, atol=1e-5)
    probe = torch.randn(got.shape, generator=g)
    (grad,) = torch.autograd.grad((got * probe).sum(), x)
    (truth,) = torch.autograd.grad((want * probe).sum(), x)
    torch.testing.assert_close(grad, truth, rtol=1e-4, atol=1e-5)


def test_fast_scan_gives_the_model_the_same_logits_and_leaves_nothing_behind() -> None:
    model, _ = shipped()
    original = modeling_nemotron_h.mamba2_chunk_scan
    ids = torch.randint(8, 1024, (2, 75), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
        with pytest.raises(ZeroDivisionError), fast_scan():
            assert modeling_nemotron_h.mamba2_chunk_scan is chunk_scan
            torch.testing.assert_close(model(ids, use_cache=False).logits, want, atol=1e-3, rtol=0)
            _ = 1 / 0
    assert modeling_nemotron_h.mamba2_chunk_scan is original


def test_scan_refuses_more_than_one_group() -> None:
    x, b = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 4)
    one = torch.ones(2)
    with pytest.raises(ValueError, match="one group"):
        chunk_scan(x, x[..., 0], -one, b, b, 8, D=one, dt_bias=one, dt_limit=(0.0, math.inf))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_facts", [2, 3, 10])
def test_markers_and_answers_agree_in_prompt_order(kind: str, num_facts: int) -> None:
    rng = random.Random(f"{kind}{num_facts}")
    names = NameSource(rng, pieces=(" x", "é", "1"), listed=("Côte d'Ivoire",))
    for _ in range(30):
        sample = draw_sample(kind, names, rng, num_facts)
        assert len(sample.facts) == len(sample.markers) == num_facts
        ends = [
            fact[2] if marker == TAIL else fact[0]
            for fact, marker in zip(sample.facts, sample.markers, strict=True)
            if marker in (TAIL, HEAD)
        ]
        assert sample.answers == tuple(dict.fromkeys(ends))
        assert len(ends) == 1 or kind.endswith("_list")
        assert all(name.strip() == name and "\n" not in name for name in sample.answers)
        wanted = HEAD if kind.startswith("inverse") else TAIL
        assert kind == "two_hop" or set(sample.markers) <= {wanted, IRRELEVANT}
        hidden = without_clue(sample, names, rng)
        assert (hidden.facts, hidden.answers) == (sample.facts, sample.answers)


def asked(relation: str) -> str:
    """What a question says of a relation: participles whole, of nouns not the domain."""
    return relation if relation in PARTICIPLES else relation.split()[-1]


def test_only_the_gold_facts_answer_a_plain_question() -> None:
    rng = random.Random(3)
    names = NameSource(rng, words_only=True)
    for _ in range(200):
        sample = draw_sample("forward", names, rng, 10)
        (gold,) = (f for f, m in zip(sample.facts, sample.markers, strict=True) if m == TAIL)
        rivals = [f for f in sample.facts if (f[0], asked(f[1])) == (gold[0], asked(gold[1]))]
        assert rivals == [gold]
        assert gold[0] in sample.question


def test_bad_requests_for_samples_are_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="sideways"):
        draw_sample("sideways", NameSource(rng), rng, 5)
    with pytest.raises(ValueError, match="1 facts"):
        draw_sample("forward", NameSource(rng), rng, 1)


def test_noise_keeps_the_stated_share_of_markers() -> None:
    rng = random.Random(0)
    drawn = [draw_drill(rng, 8) for _ in range(500)]
    kept = [
        shown == marker
        for sample in drawn
        for shown, marker in zip(noisy_markers(sample, rng, 0.93), sample.markers, strict=True)
    ]
    assert abs(sum(kept) / len(kept) - 0.93) < 0.015


@pytest.mark.parametrize("slots", ["marked", "neutral", "empty", "none"])
def test_prompt_rows_follow_the_layout_of_phase_two(slots: str) -> None:
    _, writer = shipped()
    rng = random.Random(1)
    sample = draw_sample("forward_list", NameSource(rng), rng, 3)
    row, t = writer.prompt(sample, slots), writer.template
    parts = [[1], writer.encode(t.prefix(sample.question))]
    for fact, marker in zip(sample.facts, sample.markers, strict=True):
        token = SPECIAL.index(marker if slots == "marked" else "<slot>")
        parts += [[] if slots == "none" else [token], writer.encode(t.fact(*fact))]
    target = [*writer.encode(t.target(sample.answers)), 2]
    parts += [writer.encode(t.cue), target]
    assert row.ids == [index for part in parts for index in part]
    assert row.labels == [IGNORED] * (len(row.ids) - len(target)) + target
    batch = collate([row, writer.drill(draw_drill(rng, 2))])
    assert batch.is_slot[0].nonzero().squeeze(1).tolist() == row.slots
    assert len(row.slots) == (0 if slots == "none" else 3)
    assert (batch.scale[0][batch.is_slot[0]] == (0.0 if slots == "empty" else 1.0)).all()
    assert (batch.scale[0][~batch.is_slot[0]] == 1.0).all()


def test_right_padding_changes_no_logit() -> None:
    model, writer = shipped()
    rng = random.Random(2)
    names = NameSource(rng)
    rows = [writer.prompt(draw_sample("forward", names, rng, k), "marked") for k in (2, 9)]
    with torch.no_grad():
        together, _ = answer_logits(model, collate(rows))
        alone = torch.cat([answer_logits(model, collate([row]))[0] for row in rows])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-3)


def test_copy_rows_supervise_only_what_can_be_known() -> None:
    row = induction_row(random.Random(0), range(8, 1024), 6, 7)
    assert len(row.ids) == 6 * 8
    known = [i for i, label in enumerate(row.labels) if label != IGNORED]
    assert min(known) > 6
    for i in known:
        assert row.labels[i] == row.ids[i]
        pairs = list(zip(row.ids[:6], row.ids[1:6], strict=False))
        assert (row.ids[i - 1], row.ids[i]) in pairs


def test_curriculum_goes_through_its_stages_by_accuracy_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dragkit.tiny.curriculum.ROWS", 2)
    _, writer = shipped()
    curriculum = Curriculum(writer, NameSource(random.Random(0)), range(8, 1024))
    seen = []
    for _ in range(600):
        rows = curriculum.draw()
        assert all(any(label != IGNORED for label in row.labels) for row in rows)
        seen.append((curriculum.stage, curriculum.num_facts))
        curriculum.observe(1.0)
    assert list(dict.fromkeys(stage for stage, _ in seen)) == list(STAGES)
    assert max(count for _, count in seen) == seen[-1][1] == QUESTION_FACTS[1]
    stuck = Curriculum(writer, NameSource(random.Random(0)), range(8, 1024))
    for _ in range(20):
        stuck.draw()
        stuck.observe(0.0)
    assert stuck.stage == STAGES[0]


def test_learning_rate_rises_then_stays_then_falls() -> None:
    rates = [rate_at(step, 1000) for step in range(1, 1001)]
    assert rates[0] == 0.02 and rates[49:600] == [1.0] * 551
    assert rates[-1] == 0.02 and rates[800] == pytest.approx(0.4975)


def test_vocabulary_pieces_can_be_encoded_again() -> None:
    _, writer = shipped()
    pieces = whole_pieces(writer.tokenizer)
    assert len(pieces) > 700
    for piece in pieces[::50]:
        assert writer.tokenizer.decode(writer.encode(piece)) == piece


def test_the_package_folder_alone_does_not_import_torch() -> None:
    code = "import sys, dragkit.tiny; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
