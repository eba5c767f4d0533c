"""Token rows of prompts, made once per data set and tokeniser: prefix, facts and target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from dragkit.data.arrays import (
    FolderWriter,
    cache_key,
    open_or_build,
    open_sealed,
    read_array,
    seal_folder,
)
from dragkit.data.cache import cache_root
from dragkit.data.packed import TokenPack
from dragkit.data.relations import relation_text
from dragkit.data.store import PackedStore, StoredQuestion

logger = logging.getLogger(__name__)

# Stands between the answers of a target. The evaluation splits generated text at it.
ANSWER_DELIMITER = " | "
TOKENS_VERSION = 1
_CHUNK_FACTS = 1 << 16
_CHUNK_QUESTIONS = 1 << 12
_PARTS = ("prefix", "facts", "target")

Tokenize = Callable[[list[str]], list[list[int]]]


class PromptText(Protocol):
    """The texts a prompt is made of."""

    def prefix(self, question: str) -> str:
        """Everything in front of the facts."""
        ...

    def fact(self, head: str, relation: str, tail: str) -> str:
        """The line of one fact."""
        ...

    def target(self, answers: Sequence[str]) -> str:
        """The supervised continuation."""
        ...


class _Tokeniser:
    """Tokenises every distinct text once."""

    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize = tokenize
        self._row_of: dict[str, int] = {}
        self._rows: list[np.ndarray] = []

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        found = self._tokenize(new) if new else []
        if len(found) != len(new):
            raise ValueError(f"the tokeniser gave {len(found)} rows for {len(new)} texts")
        for text, ids in zip(new, found, strict=True):
            self._row_of[text] = len(self._rows)
            self._rows.append(np.asarray(ids, dtype=np.int32))
        return [self._rows[self._row_of[text]] for text in texts]


def _chunks(store: PackedStore) -> Iterator[range]:
    """Runs of questions with a bounded number of facts."""
    first, facts = 0, 0
    for row, count in enumerate(store.fact_counts.tolist()):
        if row > first and (facts + count > _CHUNK_FACTS or row - first >= _CHUNK_QUESTIONS):
            yield range(first, row)
            first, facts = row, 0
        facts += count
    if first < len(store):
        yield range(first, len(store))


def _taught(question: StoredQuestion, max_answers: int) -> list[str]:
    """The answers of a target: whole ones, those that the graph can give before the others."""
    entities = set(question.entities)
    return sorted(question.answers, key=lambda answer: answer not in entities)[:max_answers]


def _write(
    folder: Path,
    store: PackedStore,
    tokenize: Tokenize,
    text: PromptText,
    bos_ids: Sequence[int],
    eos_ids: Sequence[int],
    max_answers: int,
) -> None:
    writer, of_fact = FolderWriter(folder), _Tokeniser(tokenize)
    head, foot = np.asarray(bos_ids, dtype=np.int32), np.asarray(eos_ids, dtype=np.int32)
    words = [relation_text(name) for name in store.relation_names]
    word_of = dict(zip(store.relation_names, words, strict=True))
    ends = dict.fromkeys(_PARTS, 0)
    for part in _PARTS:
        writer.array(f"{part}_ptr", np.int64).append([0])

    def append(part: str, rows: list[np.ndarray]) -> None:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        writer.array(f"{part}_ids", np.int32).append(np.concatenate([foot[:0], *rows]))
        writer.array(f"{part}_ptr", np.int64).append(np.cumsum(lengths) + ends[part])
        ends[part] += int(lengths.sum())

    for chunk in _chunks(store):
        questions = [store.question(row) for row in chunk]
        prefixes = _Tokeniser(tokenize)([text.prefix(q.text) for q in questions])
        targets = _Tokeniser(tokenize)([text.target(_taught(q, max_answers)) for q in questions])
        append("prefix", [np.concatenate([head, row]) for row in prefixes])
        # A question without an answer teaches nothing, not even to stop.
        append(
            "target",
            [
                np.concatenate([row, foot]) if question.answers else foot[:0]
                for question, row in zip(questions, targets, strict=True)
            ],
        )
        lines = [text.fact(h, word_of[r], t) for q in questions for h, r, t in q.triples]
        rows = of_fact(lines)
        append("facts", rows)
        lengths = iter([len(row) for row in rows])
        longest = [max((next(lengths) for _ in q.triples), default=0) for q in questions]
        writer.array("facts_longest", np.int32).append(longest)
    writer.close()
    seal_folder(folder, {"store": store.fingerprint})


class TokenRows:
    """Ragged token rows of a store: Q prefixes, E facts and Q targets.

    Args:
        folder: a sealed cache folder; store: what the rows belong to.
    """

    def __init__(self, folder: Path, store: PackedStore) -> None:
        open_sealed(folder)
        self.folder, self.store = folder, store
        self._ids = {part: read_array(folder, f"{part}_ids") for part in _PARTS}
        self._ptr = {part: read_array(folder, f"{part}_ptr") for part in _PARTS}
        self._longest_fact = np.array(read_array(folder, "facts_longest"))

    def __reduce__(self) -> tuple[type[TokenRows], tuple[Path, PackedStore]]:
        return TokenRows, (self.folder, self.store)

    @classmethod
    def build_or_open(
        cls,
        store: PackedStore,
        tokenize: Tokenize,
        text: PromptText,
        *,
        key: str,
        cache_dir: str | Path | None = None,
        bos_ids: Sequence[int] = (),
        eos_ids: Sequence[int] = (),
        max_answers: int = 50,
    ) -> TokenRows:
        """Opens the rows of a store, and makes them first where that was not yet done.

        Args:
            store: the packed questions.
            tokenize: token ids of texts, without special tokens.
            text: the texts of a prompt; `fact` gets the relation's words, not its raw name.
            key: names tokeniser and prompt texts; it must change when either does.
            cache_dir: where packed sets are kept; None takes the user's cache folder.
            begin: tokens before every prefix (the BOS).
            end: tokens after every target (the EOS).
            max_answers: answers in a target at most, those of the graph first; none is ever cut.

        Raises:
            WriteError: the cache cannot be written.
        """
        name = cache_key(
            TOKENS_VERSION, store.fingerprint, key, tuple(bos_ids), tuple(eos_ids), max_answers
        )
        folder = cache_root(cache_dir) / "tokens" / name

        def fill(target: Path) -> None:
            logger.info("tokenising %s", store.path)
            _write(target, store, tokenize, text, bos_ids, eos_ids, max_answers)

        return open_or_build(folder, lambda: cls(folder, store), fill)

    @property
    def prefix_lengths(self) -> np.ndarray:
        """int64 [Q] tokens in front of each question's facts."""
        return np.diff(self._ptr["prefix"])

    @property
    def target_lengths(self) -> np.ndarray:
        """int64 [Q] tokens of each answer with its end token."""
        return np.diff(self._ptr["target"])

    def _pack(self, part: str, spans: list[tuple[int, int]], longest: int | None) -> TokenPack:
        """Rows first..last-1 of every span, end to end."""
        ids, ptr = self._ids[part], self._ptr[part]
        pieces, offsets, base = [], [np.zeros(1, dtype=np.int64)], 0
        for first, last in spans:
            rows = ptr[first : last + 1]
            start, stop = int(rows[0]), int(rows[-1])
            pieces.append(ids[start:stop])
            offsets.append(rows[1:] + (base - start))
            base += stop - start
        joined = np.concatenate(offsets).astype(np.int32)
        return TokenPack(
            ids=torch.from_numpy(np.concatenate(pieces)),
            ptr=torch.from_numpy(joined),
            max_row=int(np.diff(joined).max(initial=0)) if longest is None else longest,
        )

    def packs(self, rows: Sequence[int]) -> tuple[TokenPack, TokenPack, TokenPack]:
        """Prefix, fact and target rows of some questions, in their order."""
        fact_ptr = self.store.fact_ptr
        own = [(row, row + 1) for row in rows]
        facts = [(int(fact_ptr[row]), int(fact_ptr[row + 1])) for row in rows]
        longest = int(self._longest_fact[list(rows)].max())
        return (
            self._pack("prefix", own, None),
            self._pack("facts", facts, longest),
            self._pack("target", own, None),
        )
