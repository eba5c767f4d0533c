"""Whether every adapter learns: a dead one costs memory, time and a false claim."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dragkit.errors import DragkitError

# Steps after which no adapter is looked at any more.
LAST_CHECKED_STEP = 50
_INFINITE = "gradients that are not finite. Lower --lora_lr or --lr."
_MISSING = (
    "no gradient, although answer tokens were supervised. The forward does not go through these "
    "adapters: a fused kernel reads the bare weight, or no answer depends on the layer. Take them "
    "out of generator.lora_targets, or set generator.freeze_lm to train none."
)


class AdapterNotTrainedError(DragkitError):
    """An adapter that training does not reach."""

    exit_code = 70


class AdapterWatch:
    """Stops a run in which an adapter gets no gradient.

    In y = W x + s B A x, B begins at zero and A does not. So B has a gradient at the first step,
    and A as soon as B has moved, at the second. The host waits for the device at these steps only,
    and at later ones if the learning rate is still zero. A routed expert may have had no token, so
    gradients of stacked experts may be zero but not missing.

    Args:
        model: with PEFT adapters, or without, where there is nothing to watch.
    """

    def __init__(self, model: nn.Module) -> None:
        # Of each adapter: its name, A, B, and whether it adapts stacked experts.
        self._open: list[tuple[str, Tensor, Tensor, bool]] = []
        self.step = 0
        for path, module in model.named_modules():
            stack = getattr(module, "parameter_name", "base_layer")
            parts = [part for part in (*path.split("."), stack) if part != "base_layer"]
            name = ".".join(parts).removeprefix("base_model.model.")
            for key in getattr(module, "lora_A", ()):
                a, b = module.lora_A[key].weight, module.lora_B[key].weight
                if a.requires_grad and b.requires_grad:
                    self._open.append((name, a, b, stack != "base_layer"))

    def check(self, supervised: int) -> None:
        """Looks at the gradients of one optimizer step, before they are used and cleared.

        Args:
            supervised: answer tokens of the step; without any, nothing is checked.

        Raises:
            DeadAdapterError: an adapter that should have a gradient has none, or not a finite one.
        """
        if supervised == 0 or self.step >= LAST_CHECKED_STEP or not self._open:
            return
        self.step += 1
        missing = [
            f"{name} (lora_{factor})"
            for name, *pair, _ in self._open
            for factor, tensor in zip("AB", pair, strict=True)
            if tensor.grad is None
        ]
        self._stop_at(_MISSING, missing)
        tensors = [t.detach() for _, a, b, _ in self._open for t in (a.grad, b.grad, b)]
        norms = [torch.linalg.vector_norm(t, math.inf).float() for t in tensors]
        infinite, still_open = [], []
        # One wait for the device.
        largest = torch.stack(norms).view(-1, 3).tolist()
        for adapter, (of_a, of_b, moved) in zip(self._open, largest, strict=True):
            name, *_, stacked = adapter
            if not math.isfinite(of_a + of_b):
                infinite.append(name)
            elif not stacked and of_b == 0.0:
                missing.append(f"{name} (lora_B)")
            elif not stacked and moved == 0.0:
                still_open.append(adapter)
            elif not stacked and of_a == 0.0:
                missing.append(f"{name} (lora_A)")
        self._stop_at(_INFINITE, infinite)
        self._stop_at(_MISSING, missing)
        self._open = still_open

    def _stop_at(self, problem: str, names: list[str]) -> None:
        if names:
            named = f"optimizer step {self.step}: {len(names)} adapter tensors have {problem}"
            raise AdapterNotTrainedError(f"{named} First {', '.join(names[:5])}.")
