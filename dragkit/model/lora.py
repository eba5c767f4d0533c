"""Linear layers with low-rank adapters, in as few matrix products as exact gradients need."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _AdaptedLinear(torch.autograd.Function):
    """y = x (W + s B A)^T for a frozen W; gradients for x, A and B.

    The adapted weight costs one small product, after which x passes through one matrix instead of
    three. Only the weights' gradients keep the low rank: they never have the size of W.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        scale: float,
        *up: Tensor,
    ) -> Tensor:
        ranks = [b.shape[1] for b in up]
        update = [b @ a for b, a in zip(up, down.split(ranks), strict=True)]
        whole = torch.add(weight, torch.cat(update) if len(up) > 1 else update[0], alpha=scale)
        ctx.save_for_backward(x, whole, down, *up)
        ctx.scale = scale
        return F.linear(x, whole, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, whole, down, *up = ctx.saved_tensors
        grad_x = grad @ whole if ctx.needs_input_grad[0] else None
        rows, flat = x.flatten(0, -2), grad.flatten(0, -2)
        parts = flat.split([b.shape[0] for b in up], dim=1)
        inner = torch.cat([g @ b for g, b in zip(parts, up, strict=True)], dim=1)
        grad_down = (inner.mT @ rows) * ctx.scale
        reduced = (rows @ down.mT).split([b.shape[1] for b in up], dim=1)
        grad_up = [(g.mT @ r) * ctx.scale for g, r in zip(parts, reduced, strict=True)]
        return grad_x, None, None, grad_down, None, *grad_up


def _plain_adapter(layer: nn.Module) -> str | None:
    """Name of the only adapter, if it adds s B A x to a frozen linear layer and nothing else."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters or layer.merged:
        return None
    base = layer.base_layer
    if type(base) is not nn.Linear or base.weight.requires_grad or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in getattr(layer, "lora_variant", {}):
        return None
    dropout, up = layer.lora_dropout[name], layer.lora_B[name]
    if up.bias is not None or (dropout.training and getattr(dropout, "p", 0.0) > 0.0):
        return None
    weights = (base.weight, layer.lora_A[name].weight, up.weight)
    # In half precision W + s B A would round what the sum of two products keeps.
    exact = all(w.dtype == base.weight.dtype and w.dtype.itemsize >= 4 for w in weights)
    return name if exact else None


def adapted_linear(x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
    """Outputs of linear layers that read the same rows, side by side.

    Layers under plain LoRA in float32 or float64 are computed in one product; whatever else stands
    there (no adapter, dropout at work, several adapters, half precision) computes itself.

    Args:
        x: float [..., I]; layers: linear layers of width I, with a PEFT adapter or without.

    Returns:
        float [..., O], O the sum of the layers' widths, in their order.
    """
    names = [_plain_adapter(layer) for layer in layers]
    scales = {
        layer.scaling[name] for layer, name in zip(layers, names, strict=True) if name is not None
    }
    bases = [getattr(layer, "base_layer", layer) for layer in layers]
    biases = [base.bias for base in bases]
    together = None not in names and len(scales) == 1 and len({b is None for b in biases}) == 1
    if not together or x.dtype != bases[0].weight.dtype:
        outputs = [layer(x) for layer in layers]
        return torch.cat(outputs, dim=-1) if len(outputs) > 1 else outputs[0]

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]

    down = joined([layer.lora_A[n].weight for layer, n in zip(layers, names, strict=True)])
    up = [layer.lora_B[n].weight for layer, n in zip(layers, names, strict=True)]
    weight = joined([base.weight for base in bases])
    bias = None if biases[0] is None else joined(biases)
    return _AdaptedLinear.apply(x, weight, bias, down, scales.pop(), *up)
