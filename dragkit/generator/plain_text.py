"""Texts of the data to tokens and back. What looks like a control token stays plain text."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dragkit.errors import DataError
from dragkit.generator.prompt import PromptTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Shows the settings of a tokenizer: case, accents, spaces, digits, control tokens.
_SAMPLE = "  The Caf\u00e9, 1984 \u5317\u4eac <s> </s> <pad>\t"


def plain_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens: the text `</s>` is a few characters.

    Raises:
        DataError: the tokenizer's vocabulary has a control token as an ordinary piece, and makes it
            from one of the texts.
    """
    if not texts:
        return []
    rows = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    # A character that the vocabulary lacks is unknown in any text. GPT-2's unknown token is its
    # end token, which no text may hold.
    control = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} | {tokenizer.eos_token_id}
    for text, row in zip(texts, rows, strict=True):
        if found := control.intersection(row):
            token = tokenizer.convert_ids_to_tokens(min(found))
            raise DataError(
                f"the text {text[:200]!r} holds {token!r}, which is a control token of the "
                "generator, and the generator's tokenizer cannot write it as plain text. Remove "
                f"{token!r} from the data, or name another generator with --generator_model."
            )
    return rows


def answer_texts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """The stripped text of each row of generated tokens, without special tokens."""
    # The cleaning joins punctuation to the word before it, so names would not come back as taught.
    texts = tokenizer.batch_decode(
        rows, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return [text.strip() for text in texts]


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Digest of all that token rows depend on: the tokenizer, and the prompt's texts."""
    text = PromptTemplate()
    texts = [text.prefix("?"), text.fact("a", "b", "c"), text.cue, text.target(["x|\n", "y"])]
    # This call ends the padding and truncation of earlier ones, which `to_str` would tell.
    rows = tokenizer([*texts, _SAMPLE], add_special_tokens=False, split_special_tokens=True)
    digest = hashlib.blake2b(digest_size=16)
    vocabulary = sorted(tokenizer.get_vocab().items())
    special = sorted(tokenizer.all_special_ids)
    digest.update(repr((texts, rows["input_ids"], vocabulary, special)).encode())
    if tokenizer.is_fast:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(map(Path, tokenizer.save_vocabulary(folder))):
                digest.update(file.read_bytes())
    return digest.hexdigest()
