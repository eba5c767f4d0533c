"""Per-question scores of runs: means over seeds, and paired differences between arms."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dragkit.errors import DataError

_DRAWS, _SEED = 10_000, 0
# Numbers of questions by draw, held at once.
_CHUNK = 2_000_000


@dataclass(frozen=True)
class RunScores:
    """The scores of one run, in the order of the test file.

    Attributes:
        ids: ids of the questions.
        values: by metric, float64 [Q], NaN where the metric is undefined for the question.
    """

    ids: tuple[str, ...]
    values: dict[str, np.ndarray]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and questions, and its standard error over seeds (NaN for one seed)."""

    mean: float
    error: float


@dataclass(frozen=True)
class Difference:
    """A mean paired difference with its 95 % interval."""

    mean: float
    low: float
    high: float


def read_scores(path: Path) -> RunScores:
    """Reads the test predictions of a run.

    Raises:
        DataError: a line is not a prediction with scores.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        ids = tuple(row["id"] for row in rows)
        names = dict.fromkeys(name for row in rows for name in row["scores"])
        values = {
            name: np.array([row["scores"].get(name, math.nan) for row in rows], dtype=np.float64)
            for name in names
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: holds no predictions with scores ({error!r}). Remove the run's folder to "
            "train it again."
        ) from error
    return RunScores(ids, values)


def stack(runs: list[RunScores], metric: str) -> np.ndarray:
    """The scores of one metric, float64 [S, Q], NaN in the row of a run without it."""
    empty = np.full(len(runs[0].ids), math.nan)
    return np.stack([run.values.get(metric, empty) for run in runs])


def mean_over_seeds(scores: np.ndarray) -> Mean | None:
    """The mean of each seed's mean over its defined questions.

    Args:
        scores: float64 [S, Q], NaN where undefined.

    Returns:
        Mean and standard error over seeds. None if a seed has no defined question.
    """
    if np.isnan(scores).all(axis=1).any():
        return None
    means = np.nanmean(scores, axis=1)
    error = means.std(ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
    return Mean(float(means.mean()), float(error))


def paired_difference(
    scores: np.ndarray, baseline: np.ndarray, draws: int = _DRAWS
) -> Difference | None:
    """The mean difference of two arms on the same questions with the same seeds.

    The interval is the 2.5th to 97.5th percentile of a two-way bootstrap: a draw takes S seeds and
    then Q questions with replacement. The draws have a fixed seed. With S seeds the interval is
    too narrow by up to a factor of sqrt((S - 1) / S), and one seed's holds no variation of seeds.

    Args:
        scores: float64 [S, Q], NaN where undefined.
        baseline: the same seeds and questions of the other arm.
        draws: number of draws.

    Returns:
        Difference and interval, over the questions that are defined everywhere. None without any.
    """
    difference = scores - baseline
    difference = difference[:, ~np.isnan(difference).any(axis=0)]
    num_seeds, num_questions = difference.shape
    if not difference.size:
        return None
    random = np.random.default_rng(_SEED)
    chosen = random.integers(num_seeds, size=(draws, num_seeds))
    # The mean over the chosen seeds, by draw and question: [draws, S] x [S, Q].
    weights = (chosen[:, :, None] == np.arange(num_seeds)).mean(axis=1)
    step = max(1, _CHUNK // num_questions)
    means = np.concatenate(
        [
            _resampled_means(random, weights[start : start + step] @ difference)
            for start in range(0, draws, step)
        ]
    )
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(difference.mean()), float(low), float(high))


def _resampled_means(random: np.random.Generator, values: np.ndarray) -> np.ndarray:
    """The mean of each row over as many of its columns, drawn with replacement."""
    columns = random.integers(values.shape[1], size=values.shape)
    return np.take_along_axis(values, columns, axis=1).mean(axis=1)
