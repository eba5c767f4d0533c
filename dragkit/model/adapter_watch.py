"""Whether every adapter learns: a dead one costs memory, time and a false claim."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dragkit.errors import DragkitError

logger = logging.getLogger(__name__)

# Steps within which every routed expert should have had a token.
LAST_STEP = 50
_NAMED = 5


class DeadAdapterError(DragkitError):
    """An adapter that training does not reach."""

    exit_code = 70


class _Adapter(NamedTuple):
    """The two factors of one adapted matrix; `experts` is 0 unless they hold routed experts."""

    name: str
    down: nn.Parameter
    up: nn.Parameter
    experts: int


def _adapters(model: nn.Module) -> list[_Adapter]:
    found = []
    for path, module in model.named_modules():
        own = getattr(module, "parameter_name", None)
        parts = [p for p in path.split(".") if p != "base_layer"]
        for adapter in getattr(module, "lora_A", ()):
            down, up = module.lora_A[adapter].weight, module.lora_B[adapter].weight
            name = ".".join(parts if own is None else [*parts, own])
            if down.requires_grad and up.requires_grad:
                experts = 0 if own is None else module.num_experts
                found.append(_Adapter(name.removeprefix("base_model.model."), down, up, experts))
    return found


def _largest(tensors: list[Tensor]) -> list[float]:
    """Largest magnitude in each tensor, NaN where one is in it; one wait for the device."""
    norms = [torch.linalg.vector_norm(t.detach(), math.inf).float() for t in tensors]
    return torch.stack(norms).tolist() if norms else []


class AdapterWatch:
    """Sees to it that gradients reach every adapter.

    In y = W x + s B A x, B begins at zero and A does not. So B has a gradient at the first step,
    and A as soon as B has moved, at the second. The host waits for the device at these two steps
    and at step 50, where routed experts are looked at: before that, some may have had no token.

    Args:
        model: with PEFT adapters, or without, where there is nothing to watch.
    """

    def __init__(self, model: nn.Module) -> None:
        self._open = _adapters(model)
        self._routed = [adapter for adapter in self._open if adapter.experts]
        self.step = 0

    def check(self, supervised: int) -> None:
        """Looks at the gradients of one optimizer step, before they are used and cleared.

        Args:
            supervised: answer tokens of the step; without any, there is nothing to see.

        Raises:
            DeadAdapterError: an adapter that should have a gradient has none, or not a finite one.
        """
        if supervised == 0 or self.step >= LAST_STEP:
            return
        self.step += 1
        if self._open:
            self._check_gradients(supervised)
        if self.step == LAST_STEP:
            self._report()

    def _check_gradients(self, supervised: int) -> None:
        unreached = [
            f"{adapter.name} ({factor})"
            for adapter in self._open
            for factor, tensor in (("lora_A", adapter.down), ("lora_B", adapter.up))
            if tensor.grad is None
        ]
        if unreached:
            raise self._dead(unreached, supervised)
        bad, still_open = [], []
        of_up = _largest([adapter.up.grad for adapter in self._open])
        of_down = _largest([adapter.down.grad for adapter in self._open])
        moved = _largest([adapter.up for adapter in self._open])
        for adapter, up, down, value in zip(self._open, of_up, of_down, moved, strict=True):
            if not (math.isfinite(up) and math.isfinite(down)):
                bad.append(adapter.name)
            elif adapter.experts:
                continue  # which of them had a token is seen at the end
            elif up == 0.0:
                unreached.append(f"{adapter.name} (lora_B)")
            elif value == 0.0:
                still_open.append(adapter)
            elif down == 0.0:
                unreached.append(f"{adapter.name} (lora_A)")
        if bad:
            raise DeadAdapterError(
                f"optimizer step {self.step}: gradients of {len(bad)} adapters are not finite, "
                f"first {', '.join(bad[:_NAMED])}. Lower --lora_lr or --lr."
            )
        if unreached:
            raise self._dead(unreached, supervised)
        self._open = still_open

    def _dead(self, names: list[str], supervised: int) -> DeadAdapterError:
        return DeadAdapterError(
            f"optimizer step {self.step}: no gradient in {len(names)} adapter tensors, first "
            f"{', '.join(names[:_NAMED])}, although {supervised} answer tokens were supervised. "
            "The forward in use does not go through these adapters, so they would stay as they "
            "began: a fused kernel reads the bare weight, or no answer depends on the layer. Take "
            "them out of generator.lora_targets, or set generator.freeze_lm to train none."
        )

    def _report(self) -> None:
        """Warns of what 50 steps have not reached."""
        if self._open:
            names = [adapter.name for adapter in self._open]
            logger.warning(
                "after %d steps lora_B is still zero in %d adapters, first %s; is their learning "
                "rate zero?",
                LAST_STEP,
                len(names),
                ", ".join(names[:_NAMED]),
            )
        idle: dict[str, set[int]] = defaultdict(set)
        for adapter in self._routed:
            # B begins at zero and only a gradient moves it, so it remembers who had a token.
            seen = adapter.up.detach() != 0
            if adapter.up.grad is not None:
                seen |= adapter.up.grad != 0
            seen = seen.view(seen.shape[0], -1, adapter.experts).any(1).any(0)
            layer = adapter.name.rpartition(".")[0]
            idle[layer] |= {e for e, had in enumerate(seen.tolist()) if not had}
        count = sum(map(len, idle.values()))
        if count:
            listed = "; ".join(
                f"{k}: {', '.join(map(str, sorted(v)))}" for k, v in idle.items() if v
            )
            logger.warning(
                "after %d steps %d routed experts have had no token, so their adapters are as they "
                "began: %s",
                LAST_STEP,
                count,
                listed,
            )
