"""Checks in the first optimizer steps that every adapter gets a gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dragkit.errors import DragkitError
from dragkit.generator.lora.coverage import adapted_layers

# Steps after which adapters are no longer checked.
LAST_CHECKED_STEP = 50
_NOT_FINITE = "gradients that are not finite. Lower --lora_lr or --lr."
_MISSING = (
    "no gradient, although answer tokens were supervised. The forward does not use these adapters: "
    "a fused kernel reads the bare weight, or no answer depends on the layer. Remove them from "
    "generator.lora_targets, or set generator.freeze_lm to train no adapter."
)


class AdapterNotTrainedError(DragkitError):
    """An adapter gets no gradient."""

    exit_code = 70


class AdapterWatch:
    """Stops a run in which an adapter gets no gradient.

    In y = W x + s B A x, B begins at zero and A does not. So B has a gradient at the first step,
    and A has one as soon as B is not zero. The host waits for the device at these two steps, and at
    later ones while the learning rate is zero. A routed expert may have had no token, so gradients
    of stacked experts may be zero, but must exist.

    Args:
        model: with PEFT adapters, or without, where nothing is checked.
    """

    def __init__(self, model: nn.Module) -> None:
        # Adapters still to be checked: name, A, B, and whether it adapts stacked experts.
        self._open: list[tuple[str, Tensor, Tensor, bool]] = []
        self.step = 0
        for name, module in adapted_layers(model):
            stacked = hasattr(module, "parameter_name")
            for key in module.lora_A:
                a, b = module.lora_A[key].weight, module.lora_B[key].weight
                if a.requires_grad and b.requires_grad:
                    self._open.append((name, a, b, stacked))

    def check(self, num_supervised: int) -> None:
        """Checks the gradients of one optimizer step, before the optimizer uses them.

        Args:
            num_supervised: answer tokens of the step. Without any, nothing is checked.

        Raises:
            AdapterNotTrainedError: a gradient is missing, zero or not finite.
        """
        if num_supervised == 0 or self.step >= LAST_CHECKED_STEP or not self._open:
            return
        self.step += 1
        # A missing gradient has no norm, so it is an error before the norms are read.
        missing = [
            f"{name} (lora_{factor})"
            for name, *pair, _ in self._open
            for factor, tensor in zip("AB", pair, strict=True)
            if tensor.grad is None
        ]
        self._raise_for(_MISSING, missing)
        tensors = [t.detach() for _, a, b, _ in self._open for t in (a.grad, b.grad, b)]
        norms = [torch.linalg.vector_norm(t, math.inf).float() for t in tensors]
        not_finite, still_open = [], []
        # The only wait for the device.
        largest = torch.stack(norms).view(-1, 3).tolist()
        for adapter, (grad_a, grad_b, b) in zip(self._open, largest, strict=True):
            name, *_, stacked = adapter
            if not math.isfinite(grad_a + grad_b):
                not_finite.append(name)
            elif not stacked and grad_b == 0.0:
                missing.append(f"{name} (lora_B)")
            # While B is zero, the gradient of A is zero too.
            elif not stacked and b == 0.0:
                still_open.append(adapter)
            elif not stacked and grad_a == 0.0:
                missing.append(f"{name} (lora_A)")
        self._raise_for(_NOT_FINITE, not_finite)
        self._raise_for(_MISSING, missing)
        self._open = still_open

    def _raise_for(self, problem: str, names: list[str]) -> None:
        if names:
            raise AdapterNotTrainedError(
                f"optimizer step {self.step}: {len(names)} adapter tensors have {problem} "
                f"The first are {', '.join(names[:5])}."
            )
