"""The record of a step whose gradients are not finite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from dragkit.distributed.ranks import Ranks
from dragkit.errors import DragkitError
from dragkit.trainer.phase import StepOutput


class NumericalError(DragkitError):
    """A gradient is not finite. The weights were not updated."""

    exit_code = 70


def numerical_error(
    path: Path,
    step: int,
    norm: float,
    parameters: Mapping[str, nn.Parameter],
    questions: Sequence[str],
    outputs: Sequence[StepOutput],
    ranks: Ranks,
) -> NumericalError:
    """Records a step with the gradient norm `norm` and returns the error to raise.

    Rank 0 writes `path`. Questions and outputs are those of this rank. All ranks must call this.
    """
    bad = [
        name
        for name, parameter in parameters.items()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]
    # Written as text, because JSON has no NaN and no infinity.
    parts = [{key: str(float(value)) for key, value in out.parts.items()} for out in outputs]
    records = ranks.all_gather_object([list(questions), parts])
    record = {
        "step": step,
        "questions": [question for rank_questions, _ in records for question in rank_questions],
        "parts": [part for _, rank_parts in records for part in rank_parts],
        "gradient_norm": str(norm),
        "parameters_with_bad_gradients": bad,
    }
    where = f"Questions, losses and norms are in {path}."
    if ranks.is_main:
        try:
            path.write_text(json.dumps(record, indent=2) + "\n")
        except OSError as error:
            where = f"Their questions could not be written to {path} ({error})."
    return NumericalError(
        f"step {step}: the gradient norm is {norm}, so the weights were not updated. "
        f"{len(bad)} parameters have gradients that are not finite, first {', '.join(bad[:3])}. "
        f"{where} Lower --lr, or look at these questions."
    )
