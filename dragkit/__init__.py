"""Differentiable retrieval-augmented generation over knowledge graphs.

The public functions and types are imported on first use, so `import dragkit` does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dragkit.config.resolve import load_config
    from dragkit.config.schema import TrainConfig
    from dragkit.data.question_file import Question
    from dragkit.eval.evaluate import EvaluationResult
    from dragkit.trainer.evaluate_run import Run, evaluate_run, load_run
    from dragkit.trainer.train_run import TrainResult, train_run

__version__ = "0.1.0"

__all__ = [
    "EvaluationResult",
    "Question",
    "Run",
    "TrainConfig",
    "TrainResult",
    "evaluate_run",
    "load_config",
    "load_run",
    "read_questions",
    "train_run",
]

_MODULES = {
    "EvaluationResult": "dragkit.eval.evaluate",
    "Question": "dragkit.data.question_file",
    "Run": "dragkit.trainer.evaluate_run",
    "TrainConfig": "dragkit.config.schema",
    "TrainResult": "dragkit.trainer.train_run",
    "evaluate_run": "dragkit.trainer.evaluate_run",
    "load_config": "dragkit.config.resolve",
    "load_run": "dragkit.trainer.evaluate_run",
    "train_run": "dragkit.trainer.train_run",
}


def read_questions(path: str | Path) -> list[Question]:
    """Reads a question file.

    Args:
        path: JSONL, plain or gzip.

    Raises:
        DataError: lists every unusable row, or the file holds no row.
        MissingInputError: there is no such file.
    """
    from dragkit.data.question_file import read_questions

    return list(read_questions(path).questions)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
