"""What a file of questions lacks: lines in the log, and an error where nothing can be learned."""

from __future__ import annotations

import logging

import numpy as np

from dragkit.data.gaps import describe_unread
from dragkit.data.relations import relation_text
from dragkit.data.store import PackedStore
from dragkit.errors import DataError
from dragkit.retriever.text_encoder import TokenStates

logger = logging.getLogger(__name__)

_MAX_SHOWN = 60


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")


def log_unread_texts(store: PackedStore, questions: TokenStates, relations: TokenStates) -> None:
    """Logs how many texts the sentence encoder cuts, and how many relations it cannot tell apart.

    Args:
        store: the packed questions.
        questions: states of their texts.
        relations: states of the texts of their relations, two for each.
    """
    names, cut = store.relation_names, np.flatnonzero(questions.is_cut)
    if len(cut):
        logger.warning(
            "%s: %d of %d questions are longer than what the sentence encoder reads and are cut "
            "there, the first on line %d: %s",
            store.path,
            len(cut),
            len(store),
            store.lines[cut[0]],  # type: ignore[attr-defined]
            _shown(store.question_texts[cut[0]]),
        )
    cut = np.flatnonzero(relations.is_cut[::2])
    if len(cut):
        logger.warning(
            "%s: %d of %d relations are longer than what the sentence encoder reads and are cut "
            "there, for example %s",
            store.path,
            len(cut),
            len(names),
            _shown(names[cut[0]]),
        )
    _, text, count = np.unique(relations.content[::2], return_inverse=True, return_counts=True)
    shared = np.flatnonzero(count[text] > 1)
    if len(shared):
        one = shared[0]
        other = next(row for row in shared[1:] if text[row] == text[one])
        logger.warning(
            "%s: %d of %d relations share their text with another one, which the retriever cannot "
            "tell apart, for example %s and %s: %s. Rename those that differ in meaning",
            store.path,
            len(shared),
            len(names),
            _shown(names[one]),
            _shown(names[other]),
            _shown(relation_text(names[one])),
        )


def require_positive_facts(
    store: PackedStore, labels: np.ndarray | None, rows: np.ndarray | None
) -> None:
    """Raises where no question that is used has a positive fact, so phase 1 has nothing to learn.

    Args:
        store: the packed questions.
        labels: uint8 [E] labels in place of the store's.
        rows: int64 questions that are used. None means all.

    Raises:
        DataError: with the counts of reasons, and an example of each.
    """
    # Running sums over all facts of a large store would take gigabytes.
    positive = np.flatnonzero(store.labels if labels is None else labels)
    question = np.searchsorted(store.fact_ptr, positive, side="right") - 1  # type: ignore[attr-defined]
    used = np.arange(len(store)) if rows is None else rows
    if np.isin(question, used).any():
        return
    why = f" They are: {store.label_gaps}." if store.label_gaps.counts else ""
    keys = describe_unread(store.unread, all_keys=True)
    raise DataError(
        f"{store.path}: none of the {len(used)} questions in use has a positive fact, so phase 1 "
        f"has nothing to learn.{why} Name topics and answers as the triples do, or give paths."
        + (f" Keys that are not read: {keys}." if keys else "")
    )


def require_answers(store: PackedStore, rows: np.ndarray | None) -> None:
    """Raises where no question that is used has an answer, so phase 2 has nothing to learn.

    Args:
        store: the packed questions.
        rows: int64 questions that are used. None means all.

    Raises:
        DataError: with the keys that are not read.
    """
    has_answer = np.diff(store.answer_ptr) > 0  # type: ignore[attr-defined]
    used = np.arange(len(store)) if rows is None else rows
    if has_answer[used].any():
        return
    keys = describe_unread(store.unread, all_keys=True)
    raise DataError(
        f"{store.path}: none of the {len(used)} questions in use has an answer, so phase 2 has "
        "nothing to teach the generator. Give answers under `answer` or `answers`."
        + (f" Keys that are not read: {keys}." if keys else "")
    )


def log_untaught_answers(store: PackedStore, rows: np.ndarray | None, max_answers: int) -> None:
    """Logs how many answers of the questions in use exceed what is taught of each.

    Args:
        store: the packed questions.
        rows: int64 questions that are used. None means all.
        max_answers: number of answers that are taught of a question.
    """
    used = np.arange(len(store)) if rows is None else rows
    count = np.diff(store.answer_ptr)[used]  # type: ignore[attr-defined]
    over = (count - max_answers).clip(min=0)
    if over.any():
        most = int(count.argmax())
        logger.warning(
            "%s: %d of %d questions have more than generator.max_answers = %d answers, so %d "
            "answers are not taught. Line %d has %d. Raise generator.max_answers to teach them",
            store.path,
            int((over > 0).sum()),
            len(used),
            max_answers,
            int(over.sum()),
            store.lines[used[most]],  # type: ignore[attr-defined]
            count[most],
        )
