"""What is written down of a step whose gradients are not finite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dragkit.distributed.ranks import Ranks
from dragkit.errors import DragkitError
from dragkit.trainer.phase import StepOutput


class NumericalError(DragkitError):
    """A loss or gradient that is not finite; nothing was updated."""

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
    """The error that ends a run, with a record of the step beside it, which the first rank writes.

    Args:
        path: of the record; step: the optimizer step; norm: of all gradients.
        parameters: trained ones by name, with their gradients.
        questions, outputs: of this rank's micro-batches; ranks: all must come here.
    """
    bad = [name for name, parameter in parameters.items() if _not_finite(parameter.grad)]
    parts = [{key: str(float(value)) for key, value in out.parts.items()} for out in outputs]
    everyone = ranks.all_gather_object([list(questions), parts])
    record = {
        "step": step,
        "questions": [question for own, _ in everyone for question in own],
        "parts": [part for _, own in everyone for part in own],
        "gradient_norm": str(norm),
        "parameters_with_bad_gradients": bad,
    }
    if ranks.is_main:
        path.write_text(json.dumps(record, indent=2) + "\n")
    return NumericalError(
        f"step {step}: the gradient norm is {norm}, so nothing was updated. "
        f"{len(bad)} parameters have such gradients, first {', '.join(bad[:3])}. "
        f"Questions, losses and norms are in {path}. Lower --lr, or look at these questions."
    )


def _not_finite(gradient: Tensor | None) -> bool:
    return gradient is not None and not bool(torch.isfinite(gradient).all())
