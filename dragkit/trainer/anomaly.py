"""The check that a step's loss and gradients are finite, and the record of a step that is not."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.data.store import PackedStore
from dragkit.distributed.ranks import Ranks
from dragkit.errors import DragkitError
from dragkit.generator.to_host import AsyncToHost
from dragkit.trainer.phase import StepOutput

# What a loss that is not finite comes from, first that which others are computed from.
_CAUSES = {
    "retrieval": "the retriever's fact scores, or their loss, are",
    "generator": "the generator's logits at the answers, or their loss, are",
}


class NumericalError(DragkitError):
    """A loss or a gradient is not finite. The weights were not updated."""

    exit_code = 70


class _Step(NamedTuple):
    """A step whose numbers are on their way to the host.

    Attributes:
        step: the optimizer step.
        rows, outputs: this rank's questions, and the results of its micro-batches.
        names: names of the P parameters with a gradient.
        numbers: loss, norm of all gradients and norms of the P gradients, float32 [2+P].
    """

    step: int
    rows: list[int]
    outputs: Sequence[StepOutput]
    names: list[str]
    numbers: AsyncToHost


class FiniteCheck:
    """Stops a run at a step whose loss or gradients are not finite, before its update.

    On a CPU a step is checked at once. On a GPU that would make the host wait for every step, so
    the device skips the update of this step and of all later ones, and the host reads the numbers
    one step later. Weights and moments are then those before the step, as on a CPU.

    Args:
        run_dir: folder of the record.
        model: all weights.
        parameters: those that `optimizer` trains, by name.
        optimizer: a fused optimizer.
        store: the training questions.
        ranks: ranks that train together.
        device: device of the model.
        late: whether the host reads the numbers of a step one step later.
    """

    def __init__(
        self,
        run_dir: Path,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        store: PackedStore,
        ranks: Ranks,
        device: torch.device,
        *,
        late: bool,
    ) -> None:
        self.run_dir, self.model, self.parameters = run_dir, model, parameters
        self.optimizer, self.store, self.ranks, self.late = optimizer, store, ranks, late
        self._waiting: _Step | None = None
        self._skip = torch.zeros((), device=device)
        if late:
            # Fused optimizers update nothing while this is not 0.
            optimizer.found_inf = self._skip  # type: ignore[attr-defined]

    def check(self, step: int, rows: list[int], outputs: Sequence[StepOutput]) -> Tensor:
        """Checks a step, between its backward and its update. All ranks must call this.

        Args:
            step: the optimizer step.
            rows, outputs: this rank's questions, and the results of its micro-batches.

        Returns:
            float32 [] norm of all gradients.

        Raises:
            NumericalError: this step is not finite, or with `late` the one before.
        """
        # Gradients alone do not tell: infinite scores have a gradient of 0.
        loss = torch.stack([out.loss.float() for out in outputs]).sum()
        # Each rank has its own loss. The gradients are summed over ranks already.
        self.ranks.all_reduce_(loss)
        grads = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        norms = torch._foreach_norm(list(grads.values())) if grads else []
        norm = torch.linalg.vector_norm(torch.stack([*norms, loss.new_zeros(())]))
        numbers = AsyncToHost(torch.stack([loss, norm, *norms]))
        checked = _Step(step, rows, outputs, list(grads), numbers)
        if self.late:
            self._skip.logical_or_((loss.isfinite() & norm.isfinite()).logical_not())
            self.settle()
            self._waiting = checked
        else:
            self._waiting = checked
            self.settle()
        return norm

    def settle(self) -> None:
        """Checks the last step now, before its results are read or saved. All ranks must call this.

        Raises:
            NumericalError: it is not finite.
        """
        checked, self._waiting = self._waiting, None
        if checked is None:
            return
        loss, norm, *norms = checked.numbers.result()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        pairs = zip(checked.names, norms, strict=True)
        error = self._error(checked, norm, [name for name, x in pairs if not math.isfinite(x)])
        # A caller that goes on must not train on these gradients, and must train.
        self.optimizer.zero_grad(set_to_none=True)
        self._skip.zero_()
        raise error

    def _error(self, checked: _Step, norm: float, bad: list[str]) -> NumericalError:
        """Writes the record on rank 0, and returns the error to raise.

        The error names the first component that is not finite: weights of the model, fact scores,
        the generator's logits, or the gradients `bad` alone.
        """
        questions = [self.store.question_id(row) for row in checked.rows]
        bad_weights = _not_finite(dict(self.model.named_parameters()))
        # Written as text, because JSON has no NaN and no infinity.
        parts = [{k: str(float(x)) for k, x in out.parts.items()} for out in checked.outputs]
        records = self.ranks.all_gather_object([questions, parts, bad_weights])
        all_questions = [question for rank_questions, *_ in records for question in rank_questions]
        all_parts = [part for _, rank_parts, _ in records for part in rank_parts]
        bad_weights = list(dict.fromkeys(name for *_, names in records for name in names))
        record = {
            "step": checked.step,
            "questions": all_questions,
            "parts": all_parts,
            "gradient_norm": str(norm),
            "weights_not_finite": bad_weights,
            "parameters_with_bad_gradients": bad,
        }
        path = self.run_dir / f"anomaly-{checked.step:08d}.json"
        where = f"Questions, losses and norms are in {path}."
        if self.ranks.is_main:
            try:
                path.write_text(json.dumps(record, indent=2) + "\n")
            except OSError as error:
                where = f"Their questions could not be written to {path} ({error})."
        return NumericalError(
            f"step {checked.step}: the gradient norm is {norm}, so the weights were not updated. "
            f"{_cause(bad_weights, all_parts, bad)}. {where} Lower --lr, or look at these "
            "questions."
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
