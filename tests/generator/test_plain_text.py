"""Text of the data stays text: to tokens and back, by fast and slow tokenizers."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from dragkit.errors import DataError
from dragkit.eval import score_text
from dragkit.generator.bundled import tiny_generator_path
from dragkit.generator.plain_text import answer_texts, plain_tokens, tokenizer_fingerprint
from dragkit.generator.prompt import PromptTemplate

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_level(*merges: tuple[str, str], **roles: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE whose merges are given, with the token of each role at the end."""
    joined = ["".join(pair) for pair in sorted(merges)]
    pieces = [*ALPHABET, *joined, *dict.fromkeys(roles.values())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocabulary, list(merges), ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def _unigram() -> PreTrainedTokenizerFast:
    """Its end token is an ordinary piece, the likeliest of all, as in T5 and XGLM."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    tokenizer = Tokenizer(models.Unigram([*pieces, *((c, -6.0) for c in "</>sredblu")], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


TOKENIZERS = {
    "tiny": AutoTokenizer.from_pretrained(tiny_generator_path()),
    # GPT-2 has one control token for all roles.
    "one role": _byte_level(bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>"),
    "several": _byte_level(eos_token="<eos>", pad_token="<pad>", bos_token="<head>"),
    "slow": ByT5Tokenizer(),
}
CONTROL = [
    "<eos>",
    "<pad>",
    "<bos>",
    "<head>",
    "<slot>",
    "</s>",
    "<|end|>",
    "<extra_id_0>",
    "<unk>",
]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("token", CONTROL)
def test_a_control_token_is_text(name: str, token: str) -> None:
    tokenizer = TOKENIZERS[name]
    texts = [token, f"red{token}blue", f" {token} {token}", "plain"]
    rows = plain_tokens(tokenizer, texts)
    assert not set(tokenizer.all_special_ids) & {i for row in rows for i in row}
    assert answer_texts(tokenizer, rows) == [text.strip() for text in texts]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_control_tokens_of_the_generator_are_not_text(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    row = plain_tokens(tokenizer, ["red , 'n' . blue !"])[0]
    with_control = [tokenizer.eos_token_id, *row, tokenizer.eos_token_id]
    # Spaces before punctuation stay, whatever the tokenizer's own setting says.
    tokenizer.clean_up_tokenization_spaces = True
    try:
        assert answer_texts(tokenizer, [row, with_control]) == ["red , 'n' . blue !"] * 2
    finally:
        tokenizer.clean_up_tokenization_spaces = False


def test_a_control_token_that_is_a_piece_of_the_vocabulary_is_refused() -> None:
    tokenizer = _unigram()
    assert plain_tokens(tokenizer, ["red blue", "what is unknown"])
    with pytest.raises(DataError, match="'red</s>blue' holds '</s>'.*--generator_model"):
        plain_tokens(tokenizer, ["red", "red</s>blue"])
    with pytest.raises(DataError, match="'<pad>'"):
        plain_tokens(tokenizer, ["<pad>"])


def test_an_unknown_character_that_would_be_the_end_token_is_refused() -> None:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "red": 1}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<eos>"
    )
    assert plain_tokens(tokenizer, ["red red"]) == [[1, 1]]
    with pytest.raises(DataError, match="'red blue' holds '<eos>'"):
        plain_tokens(tokenizer, ["red blue"])


def test_no_text() -> None:
    assert plain_tokens(TOKENIZERS["tiny"], []) == []


PIECES = st.sampled_from([*CONTROL, "|", " | ", "\\", "\n", "\r\n", "\u2028", "a", "+", "-5", "%"])
ANSWERS = st.lists(
    st.lists(PIECES | st.text(max_size=4), min_size=1, max_size=5)
    .map("".join)
    # The reader of questions refuses NUL.
    .filter(lambda text: text.strip() and "\0" not in text),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(answers=ANSWERS)
def test_what_is_taught_is_decoded_and_scored_as_right(name: str, answers: list[str]) -> None:
    tokenizer = TOKENIZERS[name]
    (taught,) = plain_tokens(tokenizer, [PromptTemplate().target(answers)])
    (text,) = answer_texts(tokenizer, [[*taught, tokenizer.eos_token_id]])
    scores = score_text("q", text, answers).scores
    strict = {key: value for key, value in scores.items() if key.startswith("strict-")}
    assert set(strict.values()) == {1.0}, text


def test_the_fingerprint_is_of_all_that_makes_the_rows() -> None:
    merges = [("a", "b"), ("b", "c")]
    tokenizers = [
        _byte_level(eos_token="<eos>"),
        _byte_level(eos_token="<eos>", pad_token="<pad>"),
        # The same vocabulary, whose merges have another order.
        _byte_level(*merges, eos_token="<eos>"),
        _byte_level(*merges[::-1], eos_token="<eos>"),
        TOKENIZERS["tiny"],
        ByT5Tokenizer(),
        ByT5Tokenizer(extra_ids=100),
    ]
    prints = [tokenizer_fingerprint(tokenizer) for tokenizer in tokenizers]
    assert len(set(prints)) == len(prints)
    first, second = (plain_tokens(t, ["abc"])[0] for t in tokenizers[2:4])
    assert first != second and tokenizers[2].get_vocab() == tokenizers[3].get_vocab()


def test_the_fingerprint_stays_after_use_and_in_another_place(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_generator_path())
    first = tokenizer_fingerprint(tokenizer)
    tokenizer(["red", "a longer text"], padding=True, truncation=True, max_length=5)
    assert tokenizer_fingerprint(tokenizer) == first
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == first
