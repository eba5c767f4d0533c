"""The record of a step whose loss or gradients are not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from dragkit.distributed.ranks import Ranks
from dragkit.errors import DragkitError
from dragkit.trainer.phase import StepOutput

# What a loss that is not finite comes from, first that which others are computed from.
_CAUSES = {
    "retrieval": "the retriever's fact scores, or their loss, are",
    "generator": "the generator's logits at the answers, or their loss, are",
}


class NumericalError(DragkitError):
    """A loss or a gradient is not finite. The weights were not updated."""

    exit_code = 70


def numerical_error(
    path: Path,
    step: int,
    norm: float,
    parameters: Mapping[str, nn.Parameter],
    model: nn.Module,
    questions: Sequence[str],
    outputs: Sequence[StepOutput],
    ranks: Ranks,
) -> NumericalError:
    """Records a step with the gradient norm `norm` and returns the error to raise.

    Rank 0 writes `path`. The error names the first component that is not finite: weights of the
    model, fact scores, the generator's logits, or gradients alone.

    Args:
        path: of the record.
        step, norm: the step and its gradient norm.
        parameters: those that are trained, with their gradients.
        model: all weights.
        questions, outputs: those of this rank. All ranks must call this.
    """
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    bad = _not_finite(gradients)
    bad_weights = _not_finite(dict(model.named_parameters()))
    # Written as text, because JSON has no NaN and no infinity.
    parts = [{key: str(float(value)) for key, value in out.parts.items()} for out in outputs]
    records = ranks.all_gather_object([list(questions), parts, bad_weights])
    all_parts = [part for _, rank_parts, _ in records for part in rank_parts]
    bad_weights = list(dict.fromkeys(name for *_, names in records for name in names))
    record = {
        "step": step,
        "questions": [question for rank_questions, *_ in records for question in rank_questions],
        "parts": all_parts,
        "gradient_norm": str(norm),
        "weights_not_finite": bad_weights,
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
        f"{_cause(bad_weights, all_parts, bad)}. {where} Lower --lr, or look at these questions."
    )


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold NaN or infinity, in this rank's shards."""
    local = {name: getattr(x, "to_local", lambda x=x: x)() for name, x in tensors.items()}
    floats = {name: x for name, x in local.items() if x.is_floating_point()}
    return [name for name, x in floats.items() if not bool(x.isfinite().all())]


def _cause(weights: list[str], parts: list[dict[str, str]], gradients: list[str]) -> str:
    """Says what is not finite, first that which others are computed from."""
    if weights:
        return f"{len(weights)} weights are not finite, first {', '.join(weights[:3])}"
    for part, what in _CAUSES.items():
        if any(not math.isfinite(float(values.get(part, 0.0))) for values in parts):
            return f"The weights are finite, but {what} not"
    return (
        f"The losses are finite, but the gradients of {len(gradients)} parameters are not, first "
        f"{', '.join(gradients[:3])}"
    )
