"""Trains a byte-level BPE of 1,024 entries. A name has the same tokens in every place."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from dragkit.generator.prompt import PromptTemplate
from dragkit.tiny.names import NameSource
from dragkit.tiny.tasks import MARKERS, QUESTION_TYPES, draw_sample

PAD, BOS, EOS, NEUTRAL = "<pad>", "<bos>", "<eos>", "<slot>"
SPECIAL = (PAD, BOS, EOS, *MARKERS, NEUTRAL)
VOCAB_SIZE = 1024
MAX_TOKENS = 4096
# The listed texts count three times, so that their names become few tokens.
LISTED_REPEATS = 3


def _corpus(rng: random.Random, listed: Sequence[str], prompts: int) -> Iterator[str]:
    template = PromptTemplate()
    names = NameSource(rng, listed=listed)
    for _ in range(prompts):
        sample = draw_sample(rng.choice(QUESTION_TYPES), names, rng, 6)
        yield template.prefix(sample.question)
        for fact in sample.facts:
            yield template.fact(*fact)
        yield template.cue
        yield template.target(sample.answers)


def train_tokenizer(seed: int, listed: Sequence[str] = (), prompts: int = 2000) -> Tokenizer:
    """Learns the merges from invented prompts and from listed texts.

    Args:
        seed: seed of the prompts.
        listed: further texts, such as the demo's entity names and questions.
        prompts: number of invented prompts.
    """
    tokenizer = Tokenizer(models.BPE())
    # Every text gets a leading space, which decoding strips. A head at the start of a fact then has
    # the tokens that its mention in the question and in the answer has.
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        # All 256 bytes, so that any text can be encoded.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    corpus = _corpus(random.Random(seed), listed, prompts)
    texts = itertools.chain(corpus, *[listed] * LISTED_REPEATS)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the files that `AutoTokenizer.from_pretrained(folder)` reads."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "model_max_length": MAX_TOKENS,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def whole_pieces(tokenizer: Tokenizer) -> list[str]:
    """Texts of the vocabulary entries that consist of whole printable characters."""
    pieces = []
    for index in range(len(SPECIAL), tokenizer.get_vocab_size()):
        text = decoders.ByteLevel().decode([tokenizer.id_to_token(index)])
        if text.isprintable() and "�" not in text:
            pieces.append(text)
    return pieces
