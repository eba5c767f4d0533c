"""Training made harder on purpose: labels moved to wrong facts, and fewer questions."""

from __future__ import annotations

import numpy as np

from dragkit.data.store import PackedStore

# Parts of the key, so that labels and questions are drawn independently.
_LABELS, _QUESTIONS = 0, 1
# Labels are moved in this many questions at once. It bounds the memory.
_CHUNK_QUESTIONS = 256


def _random_words(keys: np.ndarray, counts: np.ndarray, purpose: int, seed: int) -> np.ndarray:
    """`counts[q]` random words of each question q, uint64, a function of seed and question key."""
    # NumPy guarantees the raw words across versions.
    return np.concatenate(
        [
            np.random.Philox(key=[key, 2 * seed + purpose]).random_raw(count)
            for key, count in zip(keys.tolist(), counts.tolist(), strict=True)
        ]
    )


def noisy_labels(store: PackedStore, probability: float, seed: int) -> np.ndarray:
    """Moves each positive label, with a probability, to a random other fact of its question.

    The new facts are distinct and were not positive, so a question keeps its number of positive
    facts. A question with fewer negative facts than labels to move moves as many as it can. What is
    moved is a function of (seed, question, fact), not of other questions.

    Args:
        store: the packed questions.
        probability: of a move, in [0, 1].
        seed: of the random words, below 2**63.

    Returns:
        uint8 [E].
    """
    labels = store.labels.copy()
    counts = store.fact_counts
    for start in range(0, len(store), _CHUNK_QUESTIONS):
        rows = slice(start, start + _CHUNK_QUESTIONS)
        first = store.fact_ptr[start]
        chunk = labels[first : first + counts[rows].sum()]
        _move_labels(chunk, store.question_key[rows], counts[rows], probability, seed)
    return labels


def _move_labels(
    labels: np.ndarray, keys: np.ndarray, counts: np.ndarray, probability: float, seed: int
) -> None:
    """Moves labels of consecutive questions in place, see `noisy_labels`."""
    question = np.repeat(np.arange(len(keys)), counts)
    chance, order = _random_words(keys, 2 * counts, _LABELS, seed).reshape(-1, 2).T
    is_negative = labels == 0
    moves = ~is_negative & (chance < probability * 2**64)
    # Line up leaving and receiving facts of each question in random order, and pair them.
    ranks = []
    for chosen in (moves, is_negative):
        rows = np.flatnonzero(chosen)
        rows = rows[np.lexsort((order[rows], question[rows]))]
        count = np.bincount(question[rows], minlength=len(keys))
        rank = np.arange(len(rows)) - (np.cumsum(count) - count)[question[rows]]
        ranks.append((rows, rank, count))
    (leaving, leaving_rank, num_moves), (receiving, receiving_rank, num_negative) = ranks
    num_pairs = np.minimum(num_moves, num_negative)
    labels[leaving[leaving_rank < num_pairs[question[leaving]]]] = 0
    labels[receiving[receiving_rank < num_pairs[question[receiving]]]] = 1


def random_questions(store: PackedStore, fraction: float, seed: int) -> np.ndarray:
    """Chooses a fraction of the questions, rounded, and at least one if there are any.

    A smaller fraction gives a subset of a larger one. The choice is a function of the seed and the
    questions' keys, not of their order.

    Args:
        store: the packed questions.
        fraction: in (0, 1].
        seed: of the random words, below 2**63.

    Returns:
        int64 rows, ascending.
    """
    words = _random_words(store.question_key, np.ones(len(store), np.int64), _QUESTIONS, seed)
    count = max(1, round(fraction * len(store)))
    return np.sort(np.argsort(words, kind="stable")[:count])
