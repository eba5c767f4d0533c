"""Token rows of prompts, tokenised once per data set and tokeniser: prefix, facts and target."""

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

TOKENS_VERSION = 2
_CHUNK_FACTS = 1 << 16
_CHUNK_QUESTIONS = 1 << 12
_PARTS = ("prefix", "facts", "target")

Tokenize = Callable[[list[str]], list[list[int]]]


class PromptText(Protocol):
    """The texts of a prompt."""

    def prefix(self, question: str) -> str:
        """Returns the text in front of the facts."""
        ...

    def fact(self, head: str, relation: str, tail: str) -> str:
        """Returns the line of one fact."""
        ...

    def target(self, answers: Sequence[str]) -> str:
        """Returns the supervised continuation."""
        ...


class _CachedTokenizer:
    """Tokenises every distinct text once."""

    def __init__(self, tokenize: Tokenize) -> None:
        self._tokenize = tokenize
        self._row_of: dict[str, np.ndarray] = {}

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        new = [text for text in dict.fromkeys(texts) if text not in self._row_of]
        rows = self._tokenize(new) if new else []
        if len(rows) != len(new):
            raise ValueError(f"the tokeniser returned {len(rows)} rows for {len(new)} texts")
        self._row_of |= {
            text: np.asarray(ids, dtype=np.int32) for text, ids in zip(new, rows, strict=True)
        }
        return [self._row_of[text] for text in texts]


def _chunks(store: PackedStore) -> Iterator[range]:
    """Yields consecutive questions with a bounded total number of facts."""
    start, num_facts = 0, 0
    for row, count in enumerate(store.fact_counts.tolist()):
        is_full = num_facts + count > _CHUNK_FACTS or row - start >= _CHUNK_QUESTIONS
        if row > start and is_full:
            yield range(start, row)
            start, num_facts = row, 0
        num_facts += count
    if start < len(store):
        yield range(start, len(store))


def _target_answers(question: StoredQuestion, max_answers: int) -> list[str]:
    """Returns the first `max_answers` answers, those in the graph before the others."""
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
    writer, tokenize_facts = FolderWriter(folder), _CachedTokenizer(tokenize)
    bos, eos = np.asarray(bos_ids, dtype=np.int32), np.asarray(eos_ids, dtype=np.int32)
    empty = eos[:0]
    words_of = {name: relation_text(name) for name in store.relation_names}
    num_tokens = dict.fromkeys(_PARTS, 0)
    for part in _PARTS:
        writer.array(f"{part}_ptr", np.int64).append([0])

    def append(part: str, rows: list[np.ndarray]) -> None:
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        writer.array(f"{part}_ids", np.int32).append(np.concatenate([empty, *rows]))
        writer.array(f"{part}_ptr", np.int64).append(np.cumsum(lengths) + num_tokens[part])
        num_tokens[part] += int(lengths.sum())

    for chunk in _chunks(store):
        questions = [store.question(row) for row in chunk]
        # Facts repeat across questions, prefixes and targets hardly do: their cache ends here.
        prefixes = _CachedTokenizer(tokenize)([text.prefix(q.text) for q in questions])
        targets = _CachedTokenizer(tokenize)(
            [text.target(_target_answers(q, max_answers)) for q in questions]
        )
        append("prefix", [np.concatenate([bos, row]) for row in prefixes])
        # A question without answers has an empty target: the model must not learn to stop at once.
        append(
            "target",
            [
                np.concatenate([row, eos]) if question.answers else empty
                for question, row in zip(questions, targets, strict=True)
            ],
        )
        lines = [text.fact(h, words_of[r], t) for q in questions for h, r, t in q.triples]
        rows = tokenize_facts(lines)
        append("facts", rows)
        lengths = iter([len(row) for row in rows])
        longest = [max((next(lengths) for _ in q.triples), default=0) for q in questions]
        writer.array("facts_longest", np.int32).append(longest)
    writer.close()
    seal_folder(folder, {"store": store.fingerprint})


class TokenRows:
    """Ragged token rows of a store: Q prefixes, E facts and Q targets.

    Args:
        folder: a sealed cache folder.
        store: the questions that the rows belong to.
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
        """Opens the token rows of a store. Tokenises first if the cache does not hold them.

        Args:
            store: the packed questions.
            tokenize: returns the token ids of texts, without special tokens.
            text: the texts of a prompt. `fact` gets the relation's words, not its name.
            key: identifies tokeniser and prompt texts. It must change when either does.
            cache_dir: cache folder. None takes the user's.
            bos_ids: tokens before every prefix.
            eos_ids: tokens after every target.
            max_answers: maximum number of answers in a target, those in the graph first.

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
        """int64 [Q] number of tokens in front of each question's facts."""
        return np.diff(self._ptr["prefix"])

    @property
    def target_lengths(self) -> np.ndarray:
        """int64 [Q] number of tokens of each target, with `eos_ids`."""
        return np.diff(self._ptr["target"])

    def facts_over(self, room: np.ndarray) -> tuple[int, np.ndarray]:
        """Finds facts that are too long for any prompt.

        Args:
            room: int64 [Q] tokens that a prompt of each question has for its facts.

        Returns:
            Number of facts with more tokens than that, and their questions, int64 rows.
        """
        room = room.clip(min=0)
        rows = (self._longest_fact > room).nonzero()[0]
        ptr, fact_ptr = self._ptr["facts"], self.store.fact_ptr
        lengths = [np.diff(ptr[fact_ptr[row] : fact_ptr[row + 1] + 1]) for row in rows]
        return sum(int((n > room[row]).sum()) for row, n in zip(rows, lengths, strict=True)), rows

    def _pack(self, part: str, spans: list[tuple[int, int]], max_row: int | None) -> TokenPack:
        """Joins rows start..stop-1 of every span. `max_row` None computes it."""
        ids, ptr = self._ids[part], self._ptr[part]
        pieces, offsets, base = [], [np.zeros(1, dtype=np.int64)], 0
        for start, stop in spans:
            ends = ptr[start : stop + 1]
            first, last = int(ends[0]), int(ends[-1])
            pieces.append(ids[first:last])
            offsets.append(ends[1:] + (base - first))
            base += last - first
        packed_ptr = np.concatenate(offsets).astype(np.int32)
        return TokenPack(
            ids=torch.from_numpy(np.concatenate(pieces)),
            ptr=torch.from_numpy(packed_ptr),
            max_row=int(np.diff(packed_ptr).max(initial=0)) if max_row is None else max_row,
        )

    def packs(self, rows: Sequence[int]) -> tuple[TokenPack, TokenPack, TokenPack]:
        """Returns the prefix, fact and target rows of the questions `rows`, in their order."""
        fact_ptr = self.store.fact_ptr
        questions = [(row, row + 1) for row in rows]
        facts = [(int(fact_ptr[row]), int(fact_ptr[row + 1])) for row in rows]
        max_fact = int(self._longest_fact[list(rows)].max())
        return (
            self._pack("prefix", questions, None),
            self._pack("facts", facts, max_fact),
            self._pack("target", questions, None),
        )
